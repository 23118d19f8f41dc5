"""A container's own socket: evidence about itself, and nothing of the management API."""

from __future__ import annotations

import base64
import gc
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing
from http_fakes import IMAGE_ID, FakeContainer, ask, ask_json, plugin, raw_client

from plugins.http_api import HttpApi
from plugins.http_api.settings import Settings

NONCE = "0f" * 16
KEY = "ab" * 48


@asynccontextmanager
async def listening(path: Path) -> AsyncIterator[trio.SocketListener]:
    sock = trio.socket.socket(trio.socket.AF_UNIX)
    with sock:
        await sock.bind(str(path))
        sock.listen(64)
        yield trio.SocketListener(sock)


@asynccontextmanager
async def container_served(
    container: FakeContainer, folder: Path, api: HttpApi | None = None, **settings: object
) -> AsyncIterator[Path]:
    api = api or plugin(msgspec.convert(settings, Settings), folder)
    path = folder / f"{container.container_id}.sock"
    async with listening(path) as listener, trio.open_nursery() as nursery:
        await nursery.start(api.serve_container, listener, container)
        yield path
        nursery.cancel_scope.cancel()


async def test_a_container_gets_evidence_for_its_key_and_data(tmp_path: Path) -> None:
    container = FakeContainer()
    wanted = {
        "nonce": NONCE,
        "public_key_sha384": KEY,
        "user_data": base64.b64encode(b"\x00hi").decode(),
    }
    async with container_served(container, tmp_path) as socket:
        full = await ask_json(socket, "POST", "/evidence", wanted)
        bare = await ask_json(socket, "POST", "/evidence", {"nonce": NONCE})
        itself = await ask(socket, "GET", "/self")
    nonce = bytes.fromhex(NONCE)
    assert container.asked == [(nonce, KEY, b"\x00hi"), (nonce, None, None)]
    assert full.body == bare.body == b'{"container":5}'
    assert itself.json == {"container_id": 5, "image_id": IMAGE_ID}


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("GET", "/api/v2/images"),
        ("GET", "/api/v2/status"),
        ("POST", "/api/v2/evidence"),
        ("POST", "/api/v2/seal"),
        ("POST", "/api/v1/manifest/finalize"),
        ("GET", "/api/v1/container/inspect"),
        ("GET", "/evidence"),
        ("POST", "/self"),
        ("POST", "//evidence"),
        ("POST", "/x/../evidence"),
    ],
)
async def test_the_containers_socket_has_no_management_calls(
    tmp_path: Path, method: str, target: str
) -> None:
    container = FakeContainer()
    async with container_served(container, tmp_path) as socket:
        answer = await ask(socket, method, target, body=b"{}" if method == "POST" else None)
    assert answer.status == 404
    assert not container.asked


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b'{"nonce":"%s","container_id":6}' % NONCE.encode(),
        b'{"nonce":"%s","public_key_sha384":"%s"}' % (NONCE.encode(), KEY.upper().encode()),
        b'{"nonce":"%s","public_key_sha384":"ab"}' % NONCE.encode(),
        b'{"nonce":"%s","user_data":"not base64!"}' % NONCE.encode(),
        b'{"nonce":"%s","nonce":"%s"}' % (NONCE.encode(), NONCE.encode()),
    ],
)
async def test_a_wrong_request_for_evidence_is_refused(tmp_path: Path, body: bytes) -> None:
    container = FakeContainer()
    async with container_served(container, tmp_path) as socket:
        answer = await ask(socket, "POST", "/evidence", body=body)
    assert (answer.status, answer.kind) == (400, "format")
    assert not container.asked


async def test_two_containers_that_share_the_plugin_speak_for_themselves(tmp_path: Path) -> None:
    one, two = FakeContainer(1), FakeContainer(2)
    api = plugin(Settings(), tmp_path)
    async with (
        container_served(one, tmp_path, api) as first,
        container_served(two, tmp_path, api) as second,
    ):
        answers = [
            (await ask_json(socket, "POST", "/evidence", {"nonce": NONCE})).body
            for socket in (first, second)
        ]
    assert answers == [b'{"container":1}', b'{"container":2}']
    assert len(one.asked) == len(two.asked) == 1


async def test_a_container_that_holds_all_its_connections_disturbs_no_other(
    tmp_path: Path,
) -> None:
    api = plugin(Settings(container_max_connections=2), tmp_path)
    async with (
        container_served(FakeContainer(1), tmp_path, api) as greedy,
        container_served(FakeContainer(2), tmp_path, api) as other,
        raw_client(greedy),
        raw_client(greedy),
    ):
        await trio.testing.wait_all_tasks_blocked(0.05)
        busy = await ask(greedy, "GET", "/self")
        fine = await ask(other, "GET", "/self")
    assert (busy.status, busy.kind) == (503, "busy")
    assert fine.status == 200


async def test_a_large_body_from_a_container_is_refused(tmp_path: Path) -> None:
    async with container_served(FakeContainer(), tmp_path) as socket:
        answer = await ask(socket, "POST", "/evidence", body=bytes(65537))
    assert (answer.status, answer.kind) == (400, "format")


async def test_the_listener_stays_open_for_the_one_who_made_it(tmp_path: Path) -> None:
    api = plugin(Settings(), tmp_path)
    async with listening(tmp_path / "c.sock") as listener:
        for container_id in (1, 2):
            async with trio.open_nursery() as nursery:
                await nursery.start(api.serve_container, listener, FakeContainer(container_id))
                answer = await ask(tmp_path / "c.sock", "GET", "/self")
                nursery.cancel_scope.cancel()
            assert answer.json == {"container_id": container_id, "image_id": IMAGE_ID}


async def test_five_hundred_containers_cost_little_memory(tmp_path: Path) -> None:
    api = plugin(Settings(), tmp_path)
    async with trio.open_nursery() as nursery:

        async def serve_one(container_id: int) -> None:
            async with listening(tmp_path / f"{container_id}.sock") as listener:
                await api.serve_container(
                    listener, FakeContainer(container_id), trio.TASK_STATUS_IGNORED
                )

        gc.collect()
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        for container_id in range(500):
            nursery.start_soon(serve_one, container_id)
        await trio.testing.wait_all_tasks_blocked(0.1)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        answer = await ask(tmp_path / "499.sock", "GET", "/self")
        nursery.cancel_scope.cancel()
    assert answer.json == {"container_id": 499, "image_id": IMAGE_ID}
    assert (after - before) / 500 < 40_000
