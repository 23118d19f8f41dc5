"""Many clients at once, and such as vanish, over the real sockets."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import trio
from integration_images import Image, ImageMaker, layers_of, upload_of
from integration_machine import (
    Machine,
    is_alive,
    operations_of,
    uid_in_machine,
    wait_until,
)

from acon.client import Client
from acon.local_layer import LocalLayer
from supervisor.errors import Conflict
from supervisor.formats.log_events import AdmitImagesEvent, decode_event

pytestmark = pytest.mark.root

CROWD = 50
LEGION = 500
RACERS = 24


def test_fifty_images_are_loaded_and_fifty_containers_started_at_once(
    machine: Machine, images: ImageMaker
) -> None:
    crowd = [images.make(f"crowd-{number}", ballast=b"%d" % number) for number in range(CROWD)]
    machine.write_config(
        http=f"max_uploads = {2 * CROWD}\nrequest_deadline_s = 600.0",
        more=f"[containers]\nstart_timeout_s = 600\nstop_timeout_s = 60\n"
        f"[plugin.image_store]\nmax_uploads = {2 * CROWD}\n"
        "[plugin.oci_runtime]\nstart_timeout_s = 600",
    )
    machine.start_daemon()

    async def load_and_start(client: Client) -> None:
        async with trio.open_nursery() as nursery:
            for image in crowd:
                nursery.start_soon(client.admit, [upload_of(image)])
        async with trio.open_nursery() as nursery:
            for layer in layers_of(*crowd):
                nursery.start_soon(client.upload_layer, layer.digest, layer)
        async with trio.open_nursery() as nursery:
            for image in crowd:
                nursery.start_soon(client.start, image.image_id)

    machine.ask(load_and_start)

    views = machine.containers()
    assert {view.image_id for view in views} == {image.image_id for image in crowd}
    assert [view.state for view in views] == ["running"] * CROWD
    pids = [view.pid for view in views if view.pid is not None]
    assert len(set(pids)) == CROWD
    assert len({uid_in_machine(pid) for pid in pids}) == CROWD
    for pid in pids:
        ready = Path(f"/proc/{pid}/root/tmp/ready")
        wait_until(ready.exists, "a container whose program runs")
        assert ready.read_text() == "uid 0\n"
    operations = operations_of(machine.require_agreement())
    assert operations.count("AdmitImages") == operations.count("StartContainer") == CROWD
    assert machine.stop_daemon() == 0
    assert not any(is_alive(pid) for pid in pids)
    machine.require_nothing_left()


def test_five_hundred_containers_of_one_image_run_at_once_and_end_with_the_supervisor(
    machine: Machine, images: ImageMaker
) -> None:
    image = images.make("legion")
    machine.write_config(
        http="request_deadline_s = 600.0\nmax_requests = 600\nmax_connections = 600",
        more="[containers]\nstart_timeout_s = 600\nstop_timeout_s = 60\n"
        "[plugin.oci_runtime]\nstart_timeout_s = 600",
    )
    machine.start_daemon()
    machine.load(image)

    async def start(client: Client) -> None:
        places = trio.Semaphore(16)

        async def one() -> None:
            async with places:
                await client.start(image.image_id)

        async with trio.open_nursery() as nursery:
            for _ in range(LEGION):
                nursery.start_soon(one)

    machine.ask(start)
    views = machine.containers()
    assert [view.state for view in views] == ["running"] * LEGION
    pids = [view.pid for view in views if view.pid is not None]
    assert len({uid_in_machine(pid) for pid in pids}) == LEGION
    # Every start but the first said nothing new.
    assert operations_of(machine.require_agreement()).count("StartContainer") == 1
    assert machine.stop_daemon() == 0
    assert not any(is_alive(pid) for pid in pids)
    machine.require_nothing_left()


def test_a_seal_that_races_with_loads_wins_or_loses_against_each_and_the_log_says_which(
    machine: Machine, images: ImageMaker
) -> None:
    racers = [images.make(f"racer-{number}", ballast=b"%d" % number) for number in range(RACERS)]
    machine.start_daemon()
    admitted: set[str] = set()
    refused: set[str] = set()

    async def load(client: Client, image: Image) -> None:
        try:
            await client.admit([upload_of(image)])
            admitted.add(image.image_id)
        except Conflict as error:
            assert "after the seal" in error.rule
            refused.add(image.image_id)

    async def race(client: Client) -> None:
        # One is in for certain, and one is late for certain.
        await load(client, racers[0])
        async with trio.open_nursery() as nursery:
            for image in racers[1 : RACERS // 2]:
                nursery.start_soon(load, client, image)
            nursery.start_soon(client.seal)
            for image in racers[RACERS // 2 : -1]:
                nursery.start_soon(load, client, image)
        await load(client, racers[-1])

    machine.ask(race)

    assert racers[0].image_id in admitted and racers[-1].image_id in refused
    assert len(admitted) + len(refused) == RACERS
    records = machine.require_agreement()
    assert operations_of(records) == ["Start", *["AdmitImages"] * len(admitted), "Seal"]
    events = [decode_event(record.operation, record.content) for record in records]
    logged = [event.image_ids[0] for event in events if isinstance(event, AdmitImagesEvent)]
    assert set(logged) == admitted
    assert {image.image_id for image in machine.images()} == admitted


def test_an_upload_whose_client_vanished_goes_on_where_it_broke_off(
    machine: Machine, images: ImageMaker
) -> None:
    image = images.make("long", ballast=os.urandom(8 << 20))
    machine.start_daemon()
    _, ballast = _admit_with_base(machine, image)
    _send_half_and_vanish(machine, ballast)
    wait_until(lambda: _state(machine, ballast) == "incomplete", "the bytes that came")

    sent: list[int] = []

    async def resume(client: Client) -> None:
        before = await client.layer_state(ballast.digest)
        assert before.received_bytes is not None and before.received_bytes > 0
        await client.upload_layer(
            ballast.digest, ballast, progress=lambda done, total: sent.append(done)
        )
        # What was there was not sent again.
        assert sent[0] > before.received_bytes

    machine.ask(resume)
    assert machine.start(image).state == "running"
    machine.require_agreement()


def test_the_bytes_of_an_upload_that_nobody_continues_are_freed(
    machine: Machine, images: ImageMaker
) -> None:
    image = images.make("abandoned", ballast=os.urandom(8 << 20))
    machine.write_config(http="upload_keep_s = 0.5")
    machine.start_daemon()
    _, ballast = _admit_with_base(machine, image)
    kept = _layer_files(machine)
    _send_half_and_vanish(machine, ballast)

    wait_until(lambda: machine.log_events("upload abandoned"), "the end of its time")
    wait_until(lambda: _state(machine, ballast) == "absent", "an upload that is forgotten")
    assert _layer_files(machine) == kept
    # The daemon serves on, and takes the layer from somebody who stays.
    machine.load_layers(image)
    assert machine.start(image).state == "running"


def test_a_client_that_stops_in_mid_upload_does_not_stop_the_shutdown(
    machine: Machine, images: ImageMaker
) -> None:
    image = images.make("stuck", ballast=os.urandom(8 << 20))
    machine.start_daemon()
    _, ballast = _admit_with_base(machine, image)
    with _half_sent(machine, ballast):
        wait_until(lambda: _state(machine, ballast) == "incomplete", "an upload under way")
        assert machine.stop_daemon() == 0
    machine.require_nothing_left()


def _admit_with_base(machine: Machine, image: Image) -> tuple[LocalLayer, LocalLayer]:
    """Admit an image and upload its base; returns both layers."""
    base, top = layers_of(image)

    async def work(client: Client) -> None:
        await client.admit([upload_of(image)])
        await client.upload_layer(base.digest, base)

    machine.ask(work)
    return base, top


def _half_sent(machine: Machine, layer: LocalLayer) -> socket.socket:
    """A connection that announced all of the layer and has sent half of it."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(str(machine.api))
    # As resumable uploads are sent: a first part that says how much there will be.
    last = layer.size_bytes - 1
    connection.sendall(
        f"PUT /api/v2/layers/{layer.digest} HTTP/1.1\r\nHost: acond\r\n"
        f"Content-Length: {layer.size_bytes}\r\n"
        f"Content-Range: bytes 0-{last}/{layer.size_bytes}\r\n\r\n".encode()
    )
    left = layer.size_bytes // 2
    for chunk in layer.chunks(0):
        connection.sendall(chunk[:left])
        left -= len(chunk[:left])
    return connection


def _send_half_and_vanish(machine: Machine, layer: LocalLayer) -> None:
    with _half_sent(machine, layer):
        wait_until(lambda: _state(machine, layer) == "incomplete", "an upload under way")


def _state(machine: Machine, layer: LocalLayer) -> str:
    return machine.ask(lambda client: client.layer_state(layer.digest)).state


def _layer_files(machine: Machine) -> int:
    """Anonymous files of layers that the daemon holds."""
    assert machine.daemon is not None
    found = 0
    for link in Path(f"/proc/{machine.daemon.pid}/fd").iterdir():
        try:
            found += os.readlink(link).startswith("/memfd:layer")
        except FileNotFoundError:
            continue
    return found
