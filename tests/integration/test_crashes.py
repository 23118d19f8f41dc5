"""The daemon dies at any moment, the TD lives on: log and register still agree."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import cast

import pytest
from integration_images import Image, ImageFile, ImageMaker, layers_of, upload_of
from integration_machine import (
    PATIENCE_S,
    Machine,
    failed_checks,
    is_alive,
    operations_of,
    records_of,
    wait_until,
)

from acon.client import Client
from supervisor.container_seams import Invocation
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


INVOKED = "sleep 4711"


@pytest.fixture(scope="module")
def callable_image(images: ImageMaker) -> Image:
    """Runs until it is asked to end, and has an entry point that takes its time."""
    slow = ImageFile(f"#!/bin/sh\n{INVOKED}\n".encode())
    return images.make("callable", files={"lib/acon/entrypoint.d/Slow": slow})


def start_for_ever(machine: Machine, image: Image, _container_id: int) -> None:
    async def work(client: Client) -> None:
        while True:
            await client.start(image.image_id)

    machine.ask(work)


def invoke_for_ever(machine: Machine, _image: Image, container_id: int) -> None:
    invocation = Invocation(entry_point="Slow", capture_bytes=0, timeout_s=300)
    machine.ask(lambda client: client.invoke(container_id, invocation))


def restart_for_ever(machine: Machine, _image: Image, container_id: int) -> None:
    async def work(client: Client) -> None:
        while True:
            await client.restart(container_id, timeout_s=60)

    machine.ask(work)


def a_runtime_starts(machine: Machine) -> bool:
    return any(" run --detach " in line for line in machine.processes())


def a_command_runs(machine: Machine) -> bool:
    mark = b"\0".join(word.encode() for word in INVOKED.split())
    for pid in machine.container_processes():
        with suppress(OSError):  # it may have ended since
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(mark):
                return True
    return False


@pytest.mark.parametrize(
    ("work", "is_under_way"),
    [
        (None, lambda machine: True),
        (start_for_ever, a_runtime_starts),
        (invoke_for_ever, a_command_runs),
        (restart_for_ever, a_runtime_starts),
    ],
    ids=["running", "starting", "invoking", "restarting"],
)
def test_what_a_killed_daemon_was_at_is_ended_first_and_told(
    machine: Machine,
    callable_image: Image,
    work: Callable[[Machine, Image, int], None] | None,
    is_under_way: Callable[[Machine], bool],
) -> None:
    machine.start_daemon()
    machine.load(callable_image)
    # One that nothing is done with is there in every case.
    bystander, container = (machine.start(callable_image) for _ in range(2))
    with ThreadPoolExecutor(1) as thread:
        busy = work and thread.submit(work, machine, callable_image, container.container_id)
        wait_until(lambda: is_under_way(machine), "a daemon that is in the midst of it")
        machine.kill_daemon()
        if busy is not None:
            with pytest.raises(Refusal):
                busy.result(PATIENCE_S)
    assert bystander.pid is not None and is_alive(bystander.pid)
    left = machine.container_processes()

    machine.start_daemon()

    assert machine.container_processes() == set()
    # A first process is not quite gone before init has reaped a command that was invoked in it.
    wait_until(lambda: not any(is_alive(pid) for pid in left), "the end of all that was left")
    assert machine.containers() == ()
    (note,) = [one for one in machine.status().notes if "what it had left was ended" in one]
    machine.load_layers(callable_image)
    machine.start(callable_image)
    happened = machine.events()
    # Before anything is admitted, fetched or started, and once.
    assert [one.type for one in happened].index("predecessor.ended") == 0
    assert [one.type for one in happened].count("predecessor.ended") == 1
    ended = happened[0].event
    assert str(bystander.container_id) in cast(list[str], ended["containers"])
    assert cast(int, ended["processes"]) >= 2
    assert f"processes: {ended['processes']}" in note
    # What a daemon ended in order is no predecessor's.
    assert machine.stop_daemon() == 0
    machine.start_daemon()
    assert not [one for one in machine.status().notes if "what it had left was ended" in one]
    assert "predecessor.ended" not in [one.type for one in machine.events()]


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
    assert sum("a new boot" in note for note in machine.status().notes) == 1
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
