"""The daemon dies at any moment, the TD lives on: log and register still agree."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest
from integration_images import Image, ImageMaker, layers_of, upload_of
from integration_machine import (
    Machine,
    failed_checks,
    is_alive,
    operations_of,
    records_of,
    wait_until,
)

from acon.client import Client
from supervisor.errors import Conflict, MeasurementHalted, Refusal
from supervisor.formats.evidence import decode_evidence

pytestmark = pytest.mark.root


def test_after_a_crash_containers_are_ended_and_images_stay_admitted(
    machine: Machine, patient: Image, other: Image
) -> None:
    machine.start_daemon()
    machine.load(patient, other)
    machine.seal()
    pids = [machine.start(image).pid for image in (patient, other)]
    before = machine.require_agreement()
    policy = machine.new_policy()
    machine.kill_daemon()
    assert all(pid is not None and is_alive(pid) for pid in pids)
    assert machine.mounts()

    machine.start_daemon()

    assert not any(pid is not None and is_alive(pid) for pid in pids)
    assert machine.container_processes() == set()
    assert machine.containers() == ()
    # Nothing new was measured: the same supervisor starts, and says the same of itself.
    after = machine.require_agreement(policy)
    assert after == before
    assert operations_of(after).count("Start") == 1
    # Admitted without loading; their layers were in the memory that died.
    views = {view.image_id: view for view in machine.images()}
    assert list(views) == [patient.image_id, other.image_id]
    for image in (patient, other):
        named = {str(layer.digest) for layer in layers_of(image)}
        assert set(views[image.image_id].missing_layers) == named
    with pytest.raises(Conflict, match="missing"):
        machine.start(patient)
    # The seal outlives the daemon, and uploads are no admissions.
    assert machine.status().sealed
    machine.load_layers(patient, other)
    again = [machine.start(image).pid for image in (patient, other)]
    assert all(pid is not None and is_alive(pid) for pid in again)
    # A start that was measured before is the same start: nothing is extended twice.
    assert machine.require_agreement(policy) == before


def test_a_supervisor_with_another_configuration_is_measured_after_a_crash(
    machine: Machine, patient: Image
) -> None:
    machine.start_daemon()
    machine.load(patient)
    policy = machine.new_policy()
    machine.require_agreement(policy)
    machine.kill_daemon()
    machine.write_config(top='log_level = "debug"')
    machine.start_daemon()
    nonce, raw = machine.fetch_evidence()
    records = records_of(decode_evidence(raw))
    assert operations_of(records) == ["Start", "AdmitImages", "Start"]
    assert records[0].content != records[2].content
    # Who expects the first configuration learns of the second.
    failed = failed_checks(machine.judge(nonce, raw, policy))
    assert failed and all(check.startswith("supervisor.config:") for check in failed)


def test_a_loaded_image_can_be_told_again_after_a_crash(machine: Machine, patient: Image) -> None:
    machine.start_daemon()
    machine.load(patient)
    before = machine.require_agreement()
    machine.kill_daemon()
    machine.start_daemon()
    machine.acon("load", patient.folder)
    machine.acon("start", "patient")
    records = machine.require_agreement()
    assert records[: len(before)] == before
    assert operations_of(records) == ["Start", "AdmitImages", "StartContainer"]


@pytest.mark.parametrize("seed", range(4))
def test_a_kill_at_a_random_moment_leaves_log_and_register_in_agreement(
    machine: Machine, images: ImageMaker, patient: Image, other: Image, seed: int
) -> None:
    """Two crashes while images are loaded and started; whatever was done by then is known."""
    chance = random.Random(seed)
    group = [patient, other, images.make(f"bulky-{seed}", ballast=chance.randbytes(2 << 20))]
    known: list[bytes] = []
    for _ in range(2):
        machine.start_daemon()
        busy = threading.Thread(target=_load_and_start_until_refused, args=(machine, group))
        busy.start()
        time.sleep(chance.uniform(0, 0.6))
        machine.kill_daemon()
        busy.join()
        machine.start_daemon()
        assert machine.status().measurement == "ok"
        assert machine.container_processes() == set()
        records = [record.raw for record in machine.require_agreement()]
        # The log only ever grows, and names each thing once.
        assert records[: len(known)] == known
        assert len(set(records)) == len(records)
        known = records
        machine.kill_daemon()
    machine.start_daemon()
    machine.load(*group)
    for image in group:
        machine.start(image)
    operations = operations_of(machine.require_agreement())
    assert operations.count("Start") == 1
    assert operations.count("AdmitImages") == len(group)
    assert operations.count("StartContainer") == len(group)
    assert machine.stop_daemon() == 0


def _load_and_start_until_refused(machine: Machine, group: list[Image]) -> None:
    async def work(client: Client) -> None:
        while True:
            for image in group:
                await client.admit([upload_of(image)])
                for layer in layers_of(image):
                    await client.upload_layer(layer.digest, layer)
                await client.start(image.image_id)

    with pytest.raises(Refusal):
        machine.ask(work)


def test_a_boot_of_the_td_puts_the_journal_aside(machine: Machine, patient: Image) -> None:
    machine.start_daemon()
    machine.load(patient)
    before = machine.require_agreement()
    machine.kill_daemon()
    machine.boot()
    assert machine.register() == bytes(48)

    machine.start_daemon()

    assert machine.images() == ()
    records = machine.require_agreement()
    assert records == before[:1]
    (note,) = machine.status().notes
    assert "a new boot" in note
    (aside,) = machine.runtime_dir.glob("journal.old-*")
    assert all(record.raw in aside.read_bytes() for record in before)
    machine.load(patient)
    machine.start(patient)
    machine.require_agreement()


def test_without_its_td_the_daemon_halts_and_still_tells_its_status(
    machine: Machine, patient: Image, other: Image
) -> None:
    machine.start_daemon()
    machine.load(patient)
    pid = machine.start(patient).pid
    assert pid is not None and machine.td is not None
    machine.td.kill()
    machine.td.wait()

    # The first thing that is to be measured finds out.
    with pytest.raises(MeasurementHalted):
        machine.load(other)
    status = machine.status()
    assert status.measurement.startswith("halted: ")
    assert [image.image_id for image in status.images] == [patient.image_id]
    assert [container.state for container in status.containers] == ["running"]
    with pytest.raises(MeasurementHalted):
        machine.fetch_evidence()
    with pytest.raises(MeasurementHalted):
        machine.load(other)
    with pytest.raises(MeasurementHalted):
        machine.start(patient)
    with pytest.raises(MeasurementHalted):
        machine.seal()
    # A new TD is not the one whose log this is: nothing heals by itself.
    machine.power_on()
    with pytest.raises(MeasurementHalted):
        machine.fetch_evidence()
    assert is_alive(pid)
    assert machine.stop_daemon() == 0
    machine.require_nothing_left()


def test_a_register_that_somebody_else_extended_halts_the_next_daemon(
    machine: Machine, patient: Image
) -> None:
    """The register is neither zero nor what the journal says: somebody else wrote to it."""
    machine.start_daemon()
    machine.load(patient)
    machine.kill_daemon()
    machine.extend_behind_its_back()
    machine.start_daemon()
    assert machine.status().measurement.startswith("halted: ")
    assert machine.images() == ()
    with pytest.raises(MeasurementHalted):
        machine.fetch_evidence()
    with pytest.raises(MeasurementHalted):
        machine.load(patient)
    assert machine.stop_daemon() == 0


def test_a_crash_during_shutdown_is_mended_by_the_next_daemon(
    machine: Machine, images: ImageMaker
) -> None:
    stubborn = images.make("stubborn", "trap '' TERM\n: > /tmp/ready\nwhile :; do sleep 1; done\n")
    machine.write_config(more="[containers]\nstop_timeout_s = 600")
    machine.start_daemon()
    machine.load(stubborn)
    pid = machine.start(stubborn).pid
    assert pid is not None and machine.daemon is not None
    wait_until(Path(f"/proc/{pid}/root/tmp/ready").exists, "a container that ignores SIGTERM")
    machine.daemon.terminate()
    wait_until(lambda: machine.log_events("stopping"), "a daemon that is stopping")
    machine.kill_daemon()
    assert is_alive(pid)
    machine.start_daemon()
    assert not is_alive(pid)
    machine.require_agreement()
    assert machine.stop_daemon() == 0
    machine.require_nothing_left()
