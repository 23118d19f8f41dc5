"""A container's own socket: evidence about itself, and nothing of the management API."""

from __future__ import annotations

import base64
import errno
import gc
import struct
import tracemalloc
from pathlib import Path

import pytest
import structlog
import structlog.testing
import trio
import trio.testing
from http_fakes import (
    IMAGE_ID,
    FakeContainer,
    ask,
    ask_json,
    container_served,
    listening,
    plugin,
    raw_client,
)

from plugins.http_api import server
from plugins.http_api.connections import BorrowedListener, BoundedStream
from plugins.http_api.settings import Settings
from supervisor import Busy, Conflict, FormatError, Refusal
from supervisor.formats.status import AttestationData

NONCE = "0f" * 16
KEY = "ab" * 48


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
        ("PUT", "/evidence"),
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


async def test_five_hundred_containers_that_ask_nothing_cost_next_to_nothing(
    tmp_path: Path,
) -> None:
    """Also when each has asked before. A task and a socket alone are some 3,500 bytes."""
    api = plugin(Settings(), tmp_path)
    async with trio.open_nursery() as nursery:

        async def serve_one(container_id: int) -> None:
            async with listening(tmp_path / f"{container_id}.sock") as listener:
                await api.serve_container(
                    listener, FakeContainer(container_id), trio.TASK_STATUS_IGNORED
                )

        nursery.start_soon(serve_one, 500)
        await trio.testing.wait_all_tasks_blocked(0.05)
        await ask(tmp_path / "500.sock", "GET", "/self")  # what is made once, for all
        gc.collect()
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        for container_id in range(500):
            nursery.start_soon(serve_one, container_id)
        await trio.testing.wait_all_tasks_blocked(0.1)
        gc.collect()
        idle, _ = tracemalloc.get_traced_memory()
        for container_id in range(500):
            answer = await ask(tmp_path / f"{container_id}.sock", "GET", "/self")
            assert answer.json == {"container_id": container_id, "image_id": IMAGE_ID}
        await trio.testing.wait_all_tasks_blocked(0.1)
        gc.collect()
        idle_again, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        nursery.cancel_scope.cancel()
    assert (idle - before) / 500 < 8_000
    assert (idle_again - before) / 500 < 8_000


async def test_whoever_connects_while_the_last_connection_ends_is_served(tmp_path: Path) -> None:
    answers: list[int] = []
    async with container_served(FakeContainer(), tmp_path) as socket, trio.open_nursery() as many:

        async def ask_often() -> None:
            for _ in range(100):
                answers.append((await ask(socket, "GET", "/self")).status)

        for _ in range(2):
            many.start_soon(ask_often)
    assert answers == [200] * 200


async def test_a_connection_that_says_nothing_does_not_hold_up_the_end(tmp_path: Path) -> None:
    api = plugin(Settings(shutdown_s=3600.0), tmp_path)
    path = tmp_path / "c.sock"
    with trio.fail_after(10):
        async with listening(path) as listener, raw_client(path), trio.open_nursery() as nursery:
            await nursery.start(api.serve_container, listener, FakeContainer())
            assert (await ask(path, "GET", "/self")).status == 200
            nursery.cancel_scope.cancel()


async def test_a_connection_that_says_nothing_is_ended_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server._HYPERCORN, "keep_alive_timeout", 0.1)
    async with container_served(FakeContainer(), tmp_path) as socket, raw_client(socket) as client:
        with trio.fail_after(5):
            assert await client.stream.receive_some() == b""


async def test_a_lack_of_descriptors_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine, failures = BorrowedListener.accept, [errno.EMFILE, errno.ENOMEM]

    async def accept(self: BorrowedListener) -> BoundedStream:
        if failures:
            raise OSError(failures.pop(), "there are none")
        return await genuine(self)

    monkeypatch.setattr(BorrowedListener, "accept", accept)
    async with container_served(FakeContainer(), tmp_path) as socket:
        with trio.fail_after(5):
            assert (await ask(socket, "GET", "/self")).status == 200
    assert not failures


async def test_a_request_under_way_may_end_when_the_container_does(tmp_path: Path) -> None:
    container = FakeContainer()
    container.hold = trio.Event()
    api = plugin(Settings(), tmp_path)
    async with (
        listening(tmp_path / "c.sock") as listener,
        raw_client(tmp_path / "c.sock") as client,
    ):
        body = b'{"nonce":"%s"}' % NONCE.encode()
        await client.send(
            b"POST /evidence HTTP/1.1\r\nHost: td\r\nContent-Length: %d\r\n\r\n" % len(body)
        )
        await client.send(body)
        async with trio.open_nursery() as nursery:
            await nursery.start(api.serve_container, listener, container)
            await trio.testing.wait_all_tasks_blocked(0.1)
            nursery.cancel_scope.cancel()
            container.hold.set()
        assert (await client.answer("POST")).body == b'{"container":5}'


# --- attestation data ---------------------------------------------------------------------------


async def test_a_container_says_something_for_outside_evidence_and_takes_it_back(
    tmp_path: Path,
) -> None:
    container = FakeContainer()
    said = {"kind": "text", "data": base64.b64encode(b"ready").decode()}
    async with container_served(container, tmp_path) as socket:
        answers = [
            await ask_json(socket, "PUT", "/attestation-data", said),
            await ask(socket, "DELETE", "/attestation-data"),
        ]
    assert [(answer.status, answer.json) for answer in answers] == [(200, {})] * 2
    assert container.said == [AttestationData(kind="text", data=said["data"]), None]


@pytest.mark.parametrize(
    ("refusal", "status"),
    [
        (FormatError("attestation data.data", "attestation data is bounded"), 400),
        (Conflict("container 5", "does not run"), 409),
        (Busy("attestation data", "all containers' together is bounded"), 503),
    ],
)
async def test_why_attestation_data_is_not_taken_is_answered(
    tmp_path: Path, refusal: Refusal, status: int
) -> None:
    container = FakeContainer()
    container.refusal = refusal
    async with container_served(container, tmp_path) as socket:
        answer = await ask_json(socket, "PUT", "/attestation-data", {"kind": "text", "data": ""})
    assert (answer.status, answer.kind) == (status, refusal.kind)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"{}",
        b'{"kind":"text"}',
        b'{"kind":"text","data":1}',
        b'{"kind":"text","data":"","container_id":6}',
        b'{"kind":"text","kind":"text","data":""}',
        b'[{"kind":"text","data":""}]',
    ],
)
async def test_attestation_data_in_another_shape_is_refused(tmp_path: Path, body: bytes) -> None:
    container = FakeContainer()
    async with container_served(container, tmp_path) as socket:
        answer = await ask(socket, "PUT", "/attestation-data", body=body)
        ways = [await ask(socket, method, "/attestation-data") for method in ("GET", "POST")]
    assert (answer.status, answer.kind) == (400, "format")
    assert [way.status for way in ways] == [404, 404]
    assert container.said == []


async def test_nothing_that_a_container_writes_reaches_the_log(tmp_path: Path) -> None:
    set_nothing = struct.pack("<iIi", 2, 12, 0)
    h2c = (
        b"GET /SECRET HTTP/1.1\r\nHost: SECRET\r\nUpgrade: h2c\r\n"
        b"Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: SECRET%%%\r\n\r\n"
    )
    container = FakeContainer()
    with structlog.testing.capture_logs([structlog.processors.format_exc_info]) as logged:
        async with container_served(container, tmp_path) as socket:
            said = {"kind": "text", "data": base64.b64encode(b"SECRET").decode(), "SECRET": 1}
            for target in ("/attestation-data", "/SECRET"):
                await ask_json(socket, "PUT", target, said)
            # A fault of ours may quote them, as Python's own do.
            container.refusal = UnicodeEncodeError("ascii", "SECRET", 0, 1, "SECRET")
            await ask_json(socket, "DELETE", "/attestation-data")
            async with raw_client(socket) as client:
                await client.send(set_nothing)
                await client.stream.receive_some()
            async with raw_client(socket) as client:
                await client.send(b"\x02SECRET")
            for upgrade in (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nSECRET", h2c):
                async with raw_client(socket) as client:
                    await client.send(upgrade)
                    while await client.stream.receive_some():
                        pass
            async with raw_client(socket) as client:
                await client.send(b"SECRET / HTTP/1.1\r\nHost: SECRET\r\nSECRET\r\n\r\n")
                await client.answer()
    assert [line["event"] for line in logged].count("request") >= 3
    events = [line["event"] for line in logged]
    assert events.count("request failed") == 2
    assert events.count("connection failed") >= 2
    assert "SECRET" not in repr(logged)
