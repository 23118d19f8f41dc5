"""Fetches over HTTP: how far they are, and that they end with the client that wanted them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing
from http_fakes import FakeOperations, ask, raw_client, served

from acon.client import Client
from plugins.http_api import HttpApi
from supervisor import FileBlob, LayerFetched, LayerProgress, LayerVerified
from supervisor.formats.digest import digest_of
from supervisor.service import Supervisor
from supervisor.testing import InMemory, Owner, in_memory_plugin, manifest, plugin, running

TAR = b"bytes of a layer"
DIGEST = digest_of("sha384", TAR)
LAYER = f"/api/v2/layers/{DIGEST}"
BLOB = FileBlob(file="/blob", blob_digest="sha256:x", media_type="tar", size_bytes=900)
BODY = msgspec.json.encode({"source": BLOB})
FETCH = (
    f"POST {LAYER}/fetch HTTP/1.1\r\nHost: td\r\nContent-Length: {len(BODY)}\r\n\r\n".encode()
    + BODY
)
SEAL = b"POST /api/v2/seal HTTP/1.1\r\nHost: td\r\nContent-Length: 0\r\n\r\n"


def arriving(received_bytes: int, total_bytes: int | None) -> dict[str, object]:
    return {"state": "arriving", "received_bytes": received_bytes, "total_bytes": total_bytes}


ABSENT = {"state": "absent", "received_bytes": 0, "total_bytes": None}


async def state_of(socket: Path) -> object:
    return (await ask(socket, "GET", LAYER)).json


async def test_a_fetch_is_given_up_when_its_client_goes(tmp_path: Path) -> None:
    operations = FakeOperations()
    operations.fetch_hold = trio.Event()
    async with served(operations, tmp_path) as socket:
        async with raw_client(socket) as client:
            await client.send(FETCH)
            await operations.wait_for_fetches(1)
        await operations.wait_for_fetches(0)
        left = await state_of(socket)
    assert operations.given_up == 1
    assert left == ABSENT


async def test_a_client_that_goes_right_behind_its_request_leaves_no_fetch(tmp_path: Path) -> None:
    operations = FakeOperations()
    operations.fetch_hold = trio.Event()
    async with served(operations, tmp_path) as socket:
        for _ in range(20):
            async with raw_client(socket) as client:
                await client.send(FETCH)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert operations.fetching == 0
    assert operations.given_up == len(operations.fetched)


async def test_a_client_that_goes_ends_its_own_fetch_alone(tmp_path: Path) -> None:
    operations = FakeOperations()
    operations.fetch_hold = trio.Event()
    async with served(operations, tmp_path) as socket, raw_client(socket) as patient:
        async with raw_client(socket) as impatient:
            await impatient.send(FETCH)
            await patient.send(FETCH)
            await operations.wait_for_fetches(2)
        await operations.wait_for_fetches(1)
        still = await state_of(socket)
        operations.fetch_hold.set()
        answer = await patient.answer("POST")
    assert still == arriving(0, 900)
    assert answer.json == {"state": "verified"}
    assert operations.given_up == 1


@pytest.mark.parametrize("target", ["/api/v2/seal", "/api/v1/manifest/finalize"])
async def test_every_call_that_waits_ends_with_its_client(tmp_path: Path, target: str) -> None:
    operations = FakeOperations()
    operations.hold = trio.Event()
    async with served(operations, tmp_path) as socket:
        async with raw_client(socket) as client:
            await client.send(SEAL.replace(b"/api/v2/seal", target.encode()))
            with trio.fail_after(5):
                while not operations.running:
                    await trio.testing.wait_all_tasks_blocked(0.01)
        with trio.fail_after(5):
            while operations.running:
                await trio.testing.wait_all_tasks_blocked(0.01)
        after = await ask(socket, "GET", "/api/v2/images")
    assert not operations.sealed
    assert after.status == 200


async def test_a_second_request_of_one_connection_ends_with_the_client_too(tmp_path: Path) -> None:
    operations = FakeOperations()
    operations.fetch_hold = trio.Event()
    async with served(operations, tmp_path) as socket:
        async with raw_client(socket) as client:
            await client.send(b"GET /api/v2/images HTTP/1.1\r\nHost: td\r\n\r\n")
            assert (await client.answer()).status == 200
            await client.send(FETCH)
            await operations.wait_for_fetches(1)
        await operations.wait_for_fetches(0)
    assert operations.given_up == 1


async def test_how_far_a_fetch_is_can_be_asked_while_it_runs(tmp_path: Path) -> None:
    operations = FakeOperations()
    operations.fetch_hold = trio.Event()
    name = str(DIGEST)
    async with served(operations, tmp_path) as socket, raw_client(socket) as client:
        # Nobody waits for it: nothing is kept of it.
        await operations.report(LayerProgress(digest=name, received_bytes=5, total_bytes=9))
        before = await state_of(socket)
        await client.send(FETCH)
        await operations.wait_for_fetches(1)
        states = [await state_of(socket)]
        for event in (
            LayerProgress(digest=name, received_bytes=300, total_bytes=900),
            LayerProgress(digest="sha384/" + "0" * 96, received_bytes=1, total_bytes=1),
            LayerFetched(expected=name, computed=(), size_bytes=2000, source="file:/blob"),
            LayerVerified(digest=name, size_bytes=2000),
        ):
            await operations.report(event)
            states.append(await state_of(socket))
        operations.fetch_hold.set()
        await client.answer("POST")
        after = await state_of(socket)
    assert before == ABSENT
    assert states == [arriving(count, 900) for count in (0, 300, 300, 900, 900)]
    assert after == {"state": "verified", "received_bytes": None, "total_bytes": None}


async def test_a_fetch_of_unknown_size_says_so_and_a_refused_one_is_forgotten(
    tmp_path: Path,
) -> None:
    operations = FakeOperations()
    operations.fetch_hold = trio.Event()
    async with served(operations, tmp_path, transfer_deadline_s=0.3) as socket:
        async with raw_client(socket) as client:
            await client.send(FETCH)
            await operations.wait_for_fetches(1)
            await operations.report(
                LayerProgress(digest=str(DIGEST), received_bytes=7, total_bytes=None)
            )
            unknown = await state_of(socket)
            answer = await client.answer("POST")
        after = await state_of(socket)
    assert unknown == arriving(7, None)
    assert (answer.status, answer.kind) == (408, "deadline")
    assert after == ABSENT


# --- with a real supervisor behind it -----------------------------------------------------------


@asynccontextmanager
async def daemon(folder: Path) -> AsyncIterator[tuple[Supervisor, InMemory, Path]]:
    machine = in_memory_plugin(folder)
    assert isinstance(machine.plugin, InMemory)
    machine.plugin.layers.blobs["sha256:x"] = TAR
    socket = folder / "api.sock"
    api = plugin(HttpApi, folder, name="http_api", table={"socket": str(socket)})
    async with running([machine, api], folder) as supervisor:
        image = Owner("owner").sign(manifest(name="app:1", layers=[str(DIGEST)]))
        await supervisor.admit([image])
        yield supervisor, machine.plugin, socket


async def wait_until_fetching(machine: InMemory, wanted: bool) -> None:
    with trio.fail_after(5):
        while bool(machine.layers.fetching) != wanted:
            await trio.testing.wait_all_tasks_blocked(0.01)


async def test_a_fetch_that_the_client_cancels_leaves_nothing_in_the_daemon(
    tmp_path: Path,
) -> None:
    async with daemon(tmp_path) as (supervisor, machine, socket), Client.over_socket(socket) as one:
        machine.layers.delay_s = 3600
        with trio.CancelScope() as interrupted:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one.fetch_layer, DIGEST, BLOB)
                await wait_until_fetching(machine, True)
                interrupted.cancel()
        await wait_until_fetching(machine, False)
        assert (machine.layers.held_bytes, machine.layers.open_uploads) == (0, 0)
        assert (await one.layer_state(DIGEST)).state == "absent"
        machine.layers.delay_s = 0
        await one.fetch_layer(DIGEST, BLOB)
        assert supervisor.has_layer(DIGEST)


async def test_a_fetch_goes_on_for_the_client_that_stays(tmp_path: Path) -> None:
    async with (
        daemon(tmp_path) as (_, machine, socket),
        Client.over_socket(socket) as leaving,
        Client.over_socket(socket) as staying,
        trio.open_nursery() as nursery,
    ):
        machine.layers.delay_s = 0.5
        first = trio.CancelScope()

        async def leave() -> None:
            with first:
                await leaving.fetch_layer(DIGEST, BLOB)

        nursery.start_soon(leave)
        await wait_until_fetching(machine, True)
        nursery.start_soon(staying.fetch_layer, DIGEST, BLOB)
        await trio.sleep(0.1)
        first.cancel()
    assert machine.layers.fetches == 1
    assert machine.layers.held_bytes == len(TAR)


async def test_the_plugin_hears_of_progress_from_the_supervisor(tmp_path: Path) -> None:
    async with daemon(tmp_path) as (supervisor, machine, socket), Client.over_socket(socket) as one:
        machine.layers.delay_s = 0.6
        seen: list[tuple[int, int | None]] = []

        def note(received: int, total: int | None) -> None:
            seen.append((received, total))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: one.fetch_layer(DIGEST, BLOB, progress=note))
            await wait_until_fetching(machine, True)
            # What a store reports goes this way, to every observer.
            supervisor._layers._host.emit(
                LayerProgress(digest=str(DIGEST), received_bytes=450, total_bytes=900)
            )
    assert (450, 900) in seen
    assert seen[-1] == (900, 900)
