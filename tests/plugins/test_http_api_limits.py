"""Bounds: bodies, time, numbers of requests and connections, protocols nobody asked for."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing
from http_fakes import Answer, FakeOperations, RawClient, ask, raw_client, served

SEAL = b"POST /api/v2/seal HTTP/1.1\r\nHost: td\r\nContent-Length: 0\r\n\r\n"


async def wait_for_running(operations: FakeOperations, count: int) -> None:
    with trio.fail_after(10):
        while operations.running < count:
            await trio.testing.wait_all_tasks_blocked(0.01)


async def test_an_announced_body_beyond_the_bound_is_refused_before_it_comes(
    tmp_path: Path,
) -> None:
    operations = FakeOperations()
    async with (
        served(operations, tmp_path, max_request_bytes=2048) as socket,
        raw_client(socket) as client,
    ):
        await client.send(
            b"POST /api/v2/images HTTP/1.1\r\nHost: td\r\nContent-Length: 2049\r\n\r\n"
        )
        answer = await client.answer("POST")
    assert (answer.status, answer.kind) == (400, "format")
    assert b"at most 2048 bytes" in answer.body
    assert answer.headers["connection"] == "close"


async def test_a_chunked_body_beyond_the_bound_is_refused_when_it_gets_there(
    tmp_path: Path,
) -> None:
    async with (
        served(FakeOperations(), tmp_path, max_request_bytes=2048) as socket,
        raw_client(socket) as client,
    ):
        await client.send(
            b"POST /api/v2/images HTTP/1.1\r\nHost: td\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        for _ in range(3):
            await client.send(b"400\r\n" + bytes(1024) + b"\r\n")
        answer = await client.answer("POST")
    assert (answer.status, answer.kind) == (400, "format")


async def test_all_bodies_together_are_bounded_and_their_memory_comes_back(
    tmp_path: Path,
) -> None:
    settings = {"max_request_bytes": 4096, "max_buffered_bytes": 6000}
    head = b"POST /api/v2/images HTTP/1.1\r\nHost: td\r\nContent-Length: 4096\r\n\r\n"
    async with served(FakeOperations(), tmp_path, **settings) as socket:
        async with raw_client(socket) as first, raw_client(socket) as second:
            await first.send(head + bytes(4000))
            await trio.testing.wait_all_tasks_blocked(0.05)
            await second.send(head + bytes(4000))
            busy = await second.answer("POST")
        await trio.testing.wait_all_tasks_blocked(0.05)
        body = b'{"images":[' + b" " * 4000 + b"]}"
        after = await ask(socket, "POST", "/api/v2/images", body=body)
    assert (busy.status, busy.kind) == (503, "busy")
    assert after.status == 200


async def test_a_client_that_sends_its_body_too_slowly_is_told_in_time(tmp_path: Path) -> None:
    async with (
        served(FakeOperations(), tmp_path, request_deadline_s=0.3) as socket,
        raw_client(socket) as client,
    ):
        began = trio.current_time()
        await client.send(
            b"POST /api/v2/images HTTP/1.1\r\nHost: td\r\nContent-Length: 99\r\n\r\n{"
        )
        answer = await client.answer("POST")
        took = trio.current_time() - began
        # The connection is over: the server waits a moment for the rest, then hangs up.
        with pytest.raises(EOFError):
            await client.answer("POST")
    assert (answer.status, answer.kind) == (408, "deadline")
    assert 0.2 < took < 3


async def test_a_call_that_takes_too_long_is_cancelled_and_told(tmp_path: Path) -> None:
    operations = FakeOperations()
    operations.hold = trio.Event()
    async with served(operations, tmp_path, request_deadline_s=0.2) as socket:
        answer = await ask(socket, "POST", "/api/v2/seal", body=b"")
        acon = await ask(socket, "POST", "/api/v1/manifest/finalize", body=b"")
    assert (answer.status, answer.kind) == (408, "deadline")
    assert acon.status == 408
    assert operations.running == 0
    assert not operations.sealed


async def test_two_hundred_requests_run_at_the_same_time(tmp_path: Path) -> None:
    operations = FakeOperations()
    operations.hold = trio.Event()
    answers: list[Answer] = []

    async def one(socket: Path) -> None:
        answers.append(await ask(socket, "POST", "/api/v2/seal", body=b""))

    async with served(operations, tmp_path) as socket, trio.open_nursery() as nursery:
        for _ in range(200):
            nursery.start_soon(one, socket)
        await wait_for_running(operations, 200)
        operations.hold.set()
    assert [answer.status for answer in answers] == [200] * 200
    assert operations.most_running == 200


async def test_a_request_too_many_is_told_to_come_back(tmp_path: Path) -> None:
    operations = FakeOperations()
    operations.hold = trio.Event()
    async with (
        served(operations, tmp_path, max_requests=2) as socket,
        raw_client(socket) as first,
        raw_client(socket) as second,
    ):
        await first.send(SEAL)
        await second.send(SEAL)
        await wait_for_running(operations, 2)
        busy = await ask(socket, "GET", "/api/v2/images")
        acon = await ask(socket, "GET", "/api/v1/container/inspect")
        operations.hold.set()
        answers = [await first.answer("POST"), await second.answer("POST")]
        after = await ask(socket, "GET", "/api/v2/images")
    assert (busy.status, busy.kind, busy.headers["retry-after"]) == (503, "busy", "1")
    assert (acon.status, acon.headers["retry-after"]) == (503, "1")
    assert [answer.status for answer in answers] == [200, 200]
    assert after.status == 200


async def test_a_connection_too_many_is_answered_busy_and_far_too_many_are_closed(
    tmp_path: Path,
) -> None:
    images = b"GET /api/v2/images HTTP/1.1\r\nHost: td\r\n\r\n"
    async with served(FakeOperations(), tmp_path, max_connections=2) as socket:
        streams = [await trio.open_unix_socket(str(socket)) for _ in range(2)]
        for stream in streams:
            client = RawClient(stream)
            await client.send(images)
            assert (await client.answer()).status == 200
        async with raw_client(socket) as third:
            await third.send(images)
            busy = await third.answer()
            with pytest.raises(EOFError):
                await third.answer()
        streams += [await trio.open_unix_socket(str(socket)) for _ in range(40)]
        await trio.testing.wait_all_tasks_blocked(0.05)
        with trio.fail_after(5), pytest.raises(EOFError):
            await RawClient(streams[-1]).answer()
        for stream in streams:
            await stream.aclose()
        await trio.testing.wait_all_tasks_blocked(0.05)
        after = await ask(socket, "GET", "/api/v2/images")
    assert (busy.status, busy.kind, busy.headers["retry-after"]) == (503, "busy", "1")
    assert after.status == 200


async def test_several_requests_go_over_one_connection(tmp_path: Path) -> None:
    async with served(FakeOperations(), tmp_path) as socket, raw_client(socket) as client:
        statuses = []
        for target in (b"images", b"nothing", b"containers"):
            await client.send(b"GET /api/v2/%s HTTP/1.1\r\nHost: td\r\n\r\n" % target)
            statuses.append((await client.answer()).status)
    assert statuses == [200, 404, 200]


@pytest.mark.parametrize(
    "hello",
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
        # HEADERS of stream 1: GET / by indexed fields, END_STREAM and END_HEADERS
        b"\x00\x00\x03\x01\x05\x00\x00\x00\x01\x82\x84\x86",
        b"GET / HTTP/1.1\r\nHost: td\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: td\r\nUpgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\n"
        b"HTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n",
        b"\x16\x03\x01\x00\x05hello",
        b"GET / HTTP/1.1\r\n" + b"X: " + b"x" * 100_000,
        b"\r\n" * 100_000,
    ],
    ids=["http2", "websocket", "h2c", "tls", "long-head", "newlines"],
)
async def test_other_protocols_and_noise_end_their_connection_alone(
    tmp_path: Path, hello: bytes
) -> None:
    async with served(FakeOperations(), tmp_path) as socket:
        async with raw_client(socket) as client:
            with trio.fail_after(5):
                try:
                    await client.send(hello)
                    while await client.stream.receive_some(65536):
                        pass
                except trio.BrokenResourceError:
                    pass
        after = await ask(socket, "GET", "/api/v2/images")
    assert after.status == 200


async def test_an_answer_that_nobody_reads_does_not_hold_up_shutdown(tmp_path: Path) -> None:
    operations = FakeOperations()
    with trio.fail_after(8):
        async with served(operations, tmp_path, shutdown_s=0.2) as socket:
            stream = await trio.open_unix_socket(str(socket))
            # Pipelined requests whose answers fill every buffer on the way back.
            with trio.move_on_after(1):
                while True:
                    await stream.send_all(b"GET /api/v2/images HTTP/1.1\r\nHost: td\r\n\r\n" * 64)
        await stream.aclose()


async def test_a_refused_body_that_goes_on_for_ever_does_not_lock_anything_up(
    tmp_path: Path,
) -> None:
    async with served(FakeOperations(), tmp_path, max_connections=1) as socket:
        async with raw_client(socket) as client:
            await client.send(
                b"PUT /api/v2/nothing HTTP/1.1\r\nHost: td\r\nTransfer-Encoding: chunked\r\n\r\n"
            )
            sent = 0
            with trio.fail_after(10), pytest.raises(trio.BrokenResourceError):
                while True:
                    await client.send(b"10000\r\n" + bytes(65536) + b"\r\n")
                    sent += 65536
            answer = await client.answer("PUT")
        await trio.testing.wait_all_tasks_blocked(0.05)
        after = await ask(socket, "GET", "/api/v2/images")
    assert (answer.status, answer.kind) == (404, "unknown")
    assert sent < 32 << 20
    assert after.status == 200


async def test_running_requests_may_end_during_shutdown(tmp_path: Path) -> None:
    operations = FakeOperations()
    operations.hold = trio.Event()
    answers: list[Answer] = []

    async def ask_to_seal(stream: trio.SocketStream) -> None:
        client = RawClient(stream)
        await client.send(SEAL)
        answers.append(await client.answer("POST"))
        await stream.aclose()

    async def release_soon() -> None:
        await trio.sleep(0.1)
        assert operations.hold is not None
        operations.hold.set()

    async with trio.open_nursery() as nursery:
        async with served(operations, tmp_path, shutdown_s=5) as socket:
            idle = await trio.open_unix_socket(str(socket))
            nursery.start_soon(ask_to_seal, await trio.open_unix_socket(str(socket)))
            await wait_for_running(operations, 1)
            nursery.start_soon(release_soon)
            began = trio.current_time()
        took = trio.current_time() - began
    await idle.aclose()
    assert [answer.status for answer in answers] == [200]
    assert operations.sealed
    assert took < 3


async def test_a_request_that_does_not_end_is_cut_off_at_shutdown(tmp_path: Path) -> None:
    operations = FakeOperations()
    operations.hold = trio.Event()
    with trio.fail_after(5):
        async with served(operations, tmp_path, shutdown_s=0.2) as socket:
            stream = await trio.open_unix_socket(str(socket))
            await stream.send_all(SEAL)
            await wait_for_running(operations, 1)
        with pytest.raises(EOFError):
            await RawClient(stream).answer("POST")
        await stream.aclose()
    assert operations.running == 0
    assert not operations.sealed


async def test_settings_that_are_wrong_are_refused() -> None:
    from plugins.http_api.settings import Settings

    for wrong in (
        {"socket_mode": "600"},
        {"max_requests": 0},
        {"request_deadline_s": 0.0},
        {"tcp": {"address": "0.0.0.0"}},
        {"tcp": {"address": "0.0.0.0", "port": 0, "certificate": "c", "key": "k"}},
        {"sockets": "x"},
    ):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(wrong, Settings)
    assert Settings().socket == "/run/acond/api.sock"


async def test_a_connection_that_its_client_closed_is_free_at_once(tmp_path: Path) -> None:
    async with served(FakeOperations(), tmp_path, max_connections=3) as socket:
        with trio.fail_after(5):
            for _ in range(20):
                assert (await ask(socket, "GET", "/api/v2/images")).status == 200
                await trio.testing.wait_all_tasks_blocked(0.01)
