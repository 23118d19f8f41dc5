"""Layers coming in: whole, in parts, from clients that vanish, lie or race."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing
from http_fakes import (
    LIMIT_BYTES,
    Answer,
    FakeOperations,
    ask,
    raw_client,
    refusal_named,
    served,
)

from supervisor import UnknownItem
from supervisor.formats.digest import digest_of

DATA = bytes(range(256)) * 4096  # 1 MiB
DIGEST = digest_of("sha384", DATA)
TARGET = f"/api/v2/layers/{DIGEST}"
HEAD = f"PUT {TARGET} HTTP/1.1\r\nHost: td\r\n"


def state_of(state: str, received_bytes: int, total_bytes: int | None) -> dict[str, object]:
    return {"state": state, "received_bytes": received_bytes, "total_bytes": total_bytes}


async def put(socket: Path, body: bytes, *headers: str, target: str = TARGET) -> Answer:
    return await ask(socket, "PUT", target, *headers, body=body)


async def vanish_after(socket: Path, operations: FakeOperations, body: bytes, head: str) -> None:
    """Send a head and some bytes, wait until they arrived, and go."""
    async with raw_client(socket) as client:
        await client.send(head.encode() + body)
        await operations.wait_for_upload(0, len(body))


async def wait_until_parked(socket: Path, received_bytes: int) -> None:
    """Until the server noticed that its client vanished: then a wrong offset says so."""
    with trio.fail_after(5):
        while True:
            answer = await put(socket, b"x", "Content-Range: bytes 0-0/9")
            if f"expected {received_bytes}".encode() in answer.body:
                return
            await trio.sleep(0.01)


async def test_a_whole_layer_is_verified_and_then_known(tmp_path: Path) -> None:
    operations = FakeOperations()
    async with served(operations, tmp_path) as socket:
        absent = await ask(socket, "GET", TARGET)
        answer = await put(socket, DATA)
        state = await ask(socket, "GET", TARGET)
        again = await put(socket, DATA)
    verified = state_of("verified", len(DATA), len(DATA))
    assert absent.json == state_of("absent", 0, None)
    assert answer.json == state.json == again.json == verified
    assert operations.layers == {DIGEST: DATA}
    assert len(operations.uploads) == 1


async def test_a_layer_comes_in_three_ranges(tmp_path: Path) -> None:
    operations = FakeOperations()
    third = len(DATA) // 3
    async with served(operations, tmp_path) as socket:
        cuts = [(0, third), (third, 2 * third), (2 * third, len(DATA))]
        answers = [
            await put(
                socket, DATA[start:end], f"Content-Range: bytes {start}-{end - 1}/{len(DATA)}"
            )
            for start, end in cuts
        ]
    assert [answer.json for answer in answers] == [
        state_of("incomplete", third, len(DATA)),
        state_of("incomplete", 2 * third, len(DATA)),
        state_of("verified", len(DATA), len(DATA)),
    ]
    assert operations.layers == {DIGEST: DATA}


async def test_a_client_that_vanishes_can_go_on_where_it_was(tmp_path: Path) -> None:
    operations = FakeOperations()
    half = len(DATA) // 2
    async with served(operations, tmp_path) as socket:
        await vanish_after(
            socket, operations, DATA[:half], f"{HEAD}Content-Length: {len(DATA)}\r\n\r\n"
        )
        await wait_until_parked(socket, half)
        state = await ask(socket, "GET", TARGET)
        rest = f"Content-Range: bytes {half}-{len(DATA) - 1}/{len(DATA)}"
        answer = await put(socket, DATA[half:], rest)
    assert state.json == state_of("incomplete", half, len(DATA))
    assert answer.json == state_of("verified", len(DATA), len(DATA))
    assert len(operations.uploads) == 1


async def test_a_layer_that_came_whole_is_verified_although_its_client_vanished(
    tmp_path: Path,
) -> None:
    operations = FakeOperations()
    operations.finish_hold = trio.Event()
    async with served(operations, tmp_path) as socket:
        head = f"{HEAD}Content-Length: {len(DATA)}\r\n\r\n"
        await vanish_after(socket, operations, DATA, head)
        await trio.testing.wait_all_tasks_blocked(0.05)
        operations.finish_hold.set()
        await trio.testing.wait_all_tasks_blocked(0.05)
        state = await ask(socket, "GET", TARGET)
    assert state.json == state_of("verified", len(DATA), len(DATA))


async def test_a_chunked_client_that_vanishes_can_go_on_too(tmp_path: Path) -> None:
    operations = FakeOperations()
    async with served(operations, tmp_path) as socket:
        async with raw_client(socket) as client:
            await client.send(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode())
            await client.send(b"10000\r\n" + DATA[:65536] + b"\r\n")
            await operations.wait_for_upload(0, 65536)
        await wait_until_parked(socket, 65536)
        rest = f"Content-Range: bytes 65536-{len(DATA) - 1}/{len(DATA)}"
        answer = await put(socket, DATA[65536:], rest)
    assert answer.json == state_of("verified", len(DATA), len(DATA))


async def test_nobody_comes_back_and_the_bytes_are_freed(tmp_path: Path) -> None:
    operations = FakeOperations()
    async with served(operations, tmp_path, upload_keep_s=0.2) as socket:
        await vanish_after(socket, operations, DATA[:99], f"{HEAD}Content-Length: 100\r\n\r\n")
        with trio.fail_after(5):
            while not operations.uploads[0].aborted:
                await operations.uploads[0].changed.wait()
        state = await ask(socket, "GET", TARGET)
    assert state.json == state_of("absent", 0, None)


async def test_what_is_open_at_shutdown_is_freed(tmp_path: Path) -> None:
    operations = FakeOperations()
    other = digest_of("sha384", b"other")
    head = f"PUT /api/v2/layers/{other} HTTP/1.1\r\nHost: td\r\nContent-Length: 9\r\n\r\n"
    with trio.fail_after(5):
        async with served(operations, tmp_path, shutdown_s=0.1) as socket:
            await vanish_after(socket, operations, DATA[:99], f"{HEAD}Content-Length: 100\r\n\r\n")
            still_there = await trio.open_unix_socket(str(socket))
            await still_there.send_all(head.encode() + b"12")
            await operations.wait_for_upload(1, 2)
        await still_there.aclose()
    assert [upload.aborted for upload in operations.uploads] == [True, True]


async def test_two_clients_cannot_send_one_layer_at_the_same_time(tmp_path: Path) -> None:
    operations = FakeOperations()
    async with served(operations, tmp_path) as socket, raw_client(socket) as first:
        await first.send(f"{HEAD}Content-Length: {len(DATA)}\r\n\r\n".encode() + DATA[:10])
        await operations.wait_for_upload(0, 10)
        second = await put(socket, DATA)
        resumed = await put(
            socket, DATA[10:], f"Content-Range: bytes 10-{len(DATA) - 1}/{len(DATA)}"
        )
        await first.send(DATA[10:])
        answer = await first.answer("PUT")
    assert (second.status, second.kind) == (409, "conflict")
    assert (resumed.status, resumed.kind) == (409, "conflict")
    assert answer.json == state_of("verified", len(DATA), len(DATA))


async def test_wrong_bytes_are_refused_and_freed(tmp_path: Path) -> None:
    operations = FakeOperations()
    async with served(operations, tmp_path) as socket:
        answer = await put(socket, DATA[:-1] + b"x")
        state = await ask(socket, "GET", TARGET)
        good = await put(socket, DATA)
    assert (answer.status, answer.kind) == (400, "digest")
    assert state.json == state_of("absent", 0, None)
    assert operations.uploads[0].aborted
    assert good.status == 200


async def test_a_byte_beyond_the_range_ends_the_transfer_at_once(tmp_path: Path) -> None:
    operations = FakeOperations()
    async with served(operations, tmp_path) as socket, raw_client(socket) as client:
        head = f"{HEAD}Content-Range: bytes 0-9/20\r\nTransfer-Encoding: chunked\r\n\r\n"
        # The body does not end: the answer comes although the client goes on sending.
        await client.send(head.encode() + b"a\r\n0123456789\r\n1\r\nx\r\n")
        answer = await client.answer("PUT")
    assert (answer.status, answer.kind) == (400, "format")
    assert answer.headers["connection"] == "close"
    assert operations.uploads[0].aborted


async def test_a_layer_beyond_the_stores_limit_ends_the_transfer_at_once(tmp_path: Path) -> None:
    operations = FakeOperations()
    piece = bytes(65536)
    sent = 0
    async with served(operations, tmp_path) as socket, raw_client(socket) as client:
        await client.send(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode())
        with trio.fail_after(20):
            try:
                while sent < 64 * LIMIT_BYTES:
                    await client.send(b"10000\r\n" + piece + b"\r\n")
                    sent += len(piece)
            except trio.BrokenResourceError:
                pass
        answer = await client.answer("PUT")
    assert (answer.status, answer.kind) == (400, "untrusted")
    assert sent < 4 * LIMIT_BYTES
    assert operations.uploads[0].aborted


async def test_a_body_shorter_than_its_range_is_refused(tmp_path: Path) -> None:
    operations = FakeOperations()
    async with served(operations, tmp_path) as socket, raw_client(socket) as client:
        head = f"{HEAD}Content-Range: bytes 0-9/20\r\nTransfer-Encoding: chunked\r\n\r\n"
        await client.send(head.encode() + b"3\r\n012\r\n0\r\n\r\n")
        answer = await client.answer("PUT")
    assert (answer.status, answer.kind) == (400, "format")
    assert b"7 fewer" in answer.body


@pytest.mark.parametrize(
    "content_range",
    [
        "bytes 0-9",
        "bytes 5-4/20",
        "bytes 0-20/20",
        "bytes */20",
        "bytes 00-9/20",
        "bytes -9/20",
        "octets 0-9/20",
        "bytes 0-8/20",  # the body has ten bytes
    ],
)
async def test_a_range_that_makes_no_sense_is_refused(tmp_path: Path, content_range: str) -> None:
    operations = FakeOperations()
    async with served(operations, tmp_path) as socket:
        answer = await put(socket, b"0123456789", f"Content-Range: {content_range}")
    assert (answer.status, answer.kind) == (400, "format")
    assert not operations.uploads


async def test_a_range_that_does_not_continue_is_refused_and_says_where_to_go_on(
    tmp_path: Path,
) -> None:
    operations = FakeOperations()
    async with served(operations, tmp_path) as socket:
        early = await put(socket, DATA[10:20], "Content-Range: bytes 10-19/100")
        await put(socket, DATA[:10], f"Content-Range: bytes 0-9/{len(DATA)}")
        gap = await put(socket, DATA[11:20], f"Content-Range: bytes 11-19/{len(DATA)}")
        other = await put(socket, DATA[10:20], "Content-Range: bytes 10-19/100")
        rest = f"Content-Range: bytes 10-{len(DATA) - 1}/{len(DATA)}"
        answer = await put(socket, DATA[10:], rest)
    assert [(one.status, one.kind) for one in (early, gap, other)] == [(409, "conflict")] * 3
    assert b"expected 10, got 11" in gap.body
    assert answer.json == state_of("verified", len(DATA), len(DATA))


async def test_a_new_whole_upload_replaces_a_parked_one(tmp_path: Path) -> None:
    operations = FakeOperations()
    async with served(operations, tmp_path) as socket:
        await put(socket, b"wrong", f"Content-Range: bytes 0-4/{len(DATA)}")
        answer = await put(socket, DATA)
    assert answer.json == state_of("verified", len(DATA), len(DATA))
    assert [upload.aborted for upload in operations.uploads] == [True, False]


async def test_a_sender_that_pauses_too_long_is_told_and_may_go_on(tmp_path: Path) -> None:
    operations = FakeOperations()
    async with served(operations, tmp_path, upload_pause_s=0.1) as socket:
        async with raw_client(socket) as client:
            await client.send(f"{HEAD}Content-Length: {len(DATA)}\r\n\r\n".encode() + DATA[:10])
            answer = await client.answer("PUT")
        rest = f"Content-Range: bytes 10-{len(DATA) - 1}/{len(DATA)}"
        resumed = await put(socket, DATA[10:], rest)
    assert (answer.status, answer.kind) == (408, "deadline")
    assert resumed.json == state_of("verified", len(DATA), len(DATA))


async def test_the_number_of_open_uploads_is_bounded(tmp_path: Path) -> None:
    operations = FakeOperations()
    others = [f"/api/v2/layers/{digest_of('sha384', bytes([index]))}" for index in range(3)]
    async with served(operations, tmp_path, max_uploads=2) as socket:
        answers = [
            await put(socket, b"x", "Content-Range: bytes 0-0/2", target=target)
            for target in others
        ]
    assert [answer.status for answer in answers] == [200, 200, 503]
    assert answers[2].headers["retry-after"] == "1"
    assert len(operations.uploads) == 2


async def test_an_upload_that_the_supervisor_refuses_leaves_nothing_open(tmp_path: Path) -> None:
    operations = FakeOperations()
    operations.refusal = refusal_named(UnknownItem)
    async with served(operations, tmp_path, max_uploads=1) as socket:
        refused = await put(socket, DATA)
        operations.refusal = None
        answer = await put(socket, DATA)
    assert (refused.status, refused.kind) == (404, "unknown")
    assert answer.status == 200


async def test_an_empty_layer_is_a_layer(tmp_path: Path) -> None:
    operations = FakeOperations()
    empty = digest_of("sha384", b"")
    async with served(operations, tmp_path) as socket:
        answer = await put(socket, b"", target=f"/api/v2/layers/{empty}")
    assert answer.json == state_of("verified", 0, 0)
    assert operations.layers == {empty: b""}
