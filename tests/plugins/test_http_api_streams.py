"""Logs as lines of JSON: what is there, what comes, and readers of every kind."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing
from http_fakes import FakeOperations, ask, raw_client, served
from http_streams import LineReader, read_all, reading

from plugins.http_api import connections
from plugins.http_api.followers import Followers
from plugins.http_api.streams import PIECE_BYTES, piece_of

LOGS = "/api/v2/containers/1/logs"
FOLLOW = f"{LOGS}?follow=1"


def texts(values: list[dict[str, object]]) -> list[object]:
    return [value["text"] for value in values if "text" in value]


async def wait_for_a_place(socket: Path) -> None:
    """Until another follower is taken in."""
    with trio.fail_after(5):
        while True:
            async with reading(socket, FOLLOW) as reader:
                if reader.status == 200:
                    return
                assert reader.status == 503
            # This connection is not to be the one too many for the next.
            await trio.testing.wait_all_tasks_blocked(0.01)


@asynccontextmanager
async def following(socket: Path, target: str = FOLLOW) -> AsyncIterator[LineReader]:
    """A follower that the server has taken in: its first heartbeat, or first line, is there."""
    async with reading(socket, target) as reader:
        assert reader.status == 200
        yield reader


async def test_what_is_kept_is_given_line_by_line_with_where_to_go_on(tmp_path: Path) -> None:
    operations = FakeOperations()
    operations.logs[1].write(1, b"one\n\ntwo\n")
    operations.logs[1].write(7, "drei ä\u2028\x00\n".encode())
    async with served(operations, tmp_path) as socket, reading(socket, LOGS) as reader:
        values = await reader.values()
        headers = reader.headers
    assert headers["content-type"] == "application/x-ndjson"
    assert headers["transfer-encoding"] == "chunked"
    assert headers["cache-control"] == "no-store"
    times = [value.pop("time") for value in values[:-1]]
    assert values == [
        {"number": 1, "fd": 1, "text": "one", "cut": False},
        {"number": 2, "fd": 1, "text": "", "cut": False},
        {"number": 3, "fd": 1, "text": "two", "cut": False},
        {"number": 4, "fd": 7, "text": "drei ä\u2028\x00", "cut": False},
        {"ended": False, "after": 4},
    ]
    for time in times:
        assert isinstance(time, str)
        assert time.endswith("Z")
        assert datetime.fromisoformat(time).utcoffset() is not None


async def test_lines_that_are_not_utf8_come_as_bytes_and_long_ones_in_parts(
    tmp_path: Path,
) -> None:
    operations = FakeOperations()
    operations.logs[1].write(2, b"\xff\x00\n" + b"x" * 5000 + b"\n")
    async with served(operations, tmp_path) as socket:
        binary, first, rest, _ = await read_all(socket, LOGS)
    assert "text" not in binary
    assert base64.b64decode(str(binary["bytes"]), validate=True) == b"\xff\x00"
    assert (first["cut"], rest["cut"]) == (True, False)
    assert len(str(first["text"])) + len(str(rest["text"])) == 5000


async def test_the_log_of_an_ended_container_says_that_nothing_follows(tmp_path: Path) -> None:
    operations = FakeOperations()
    operations.logs[1].write(1, b"last words")
    operations.logs[1].end_run()
    async with served(operations, tmp_path) as socket:
        once = await read_all(socket, LOGS)
        followed = await read_all(socket, FOLLOW)
    assert texts(once) == texts(followed) == ["last words"]
    assert once[-1] == followed[-1] == {"ended": True}


async def test_a_reader_that_asks_again_misses_nothing_and_sees_nothing_twice(
    tmp_path: Path,
) -> None:
    operations = FakeOperations()
    log = operations.logs[1]
    seen: list[object] = []
    after: object = 0
    async with served(operations, tmp_path, follow_deadline_s=0.05) as socket:
        for step in range(40):
            log.write(1, b"".join(b"%d\n" % (step * 3 + i) for i in range(3)))
            follow = step % 2
            values = await read_all(socket, f"{LOGS}?after={after}&follow={follow}")
            seen += texts(values)
            assert values[-1]["ended"] is False
            after = values[-1]["after"]
    assert seen == [str(number) for number in range(120)]


async def test_lines_arrive_as_they_are_written_until_the_container_ends(tmp_path: Path) -> None:
    operations = FakeOperations()
    log = operations.logs[1]
    log.write(1, b"before\n")
    async with served(operations, tmp_path) as socket, following(socket) as reader:
        assert (await reader.value())["text"] == "before"
        for text in ("one", "two"):
            log.write(1, text.encode() + b"\n")
            assert (await reader.value())["text"] == text
        log.write(1, b"unfinished")
        log.end_run()
        rest = await reader.values()
    assert texts(rest) == ["unfinished"]
    assert rest[-1] == {"ended": True}


async def test_lines_that_are_gone_are_counted(tmp_path: Path) -> None:
    operations = FakeOperations()
    log = operations.logs[1]
    for number in range(1, 1001):
        log.write(1, b"%d\n" % number)
    async with served(operations, tmp_path) as socket:
        from_start = await read_all(socket, LOGS)
        from_ten = await read_all(socket, f"{LOGS}?after=10")
        from_end = await read_all(socket, f"{LOGS}?after=999")
    first = from_start[1]["number"]
    assert isinstance(first, int)
    assert first > 11
    assert from_start[0] == {"lost_lines": first - 1}
    assert from_ten[0] == {"lost_lines": first - 11}
    assert [value["number"] for value in from_start[1:-1]] == list(range(first, 1001))
    assert texts(from_end) == ["1000"]


async def test_a_slow_reader_holds_up_nobody_and_is_told_what_it_lost(tmp_path: Path) -> None:
    operations = FakeOperations()
    log = operations.logs[1]
    lines = 4000
    line = b"x" * 1000 + b"\n"
    async with served(operations, tmp_path) as socket, following(socket) as slow:
        assert await slow.line() == b""
        async with following(socket) as quick:
            assert await quick.line() == b""
            for number in range(1, lines + 1):
                log.write(1, line)
                assert (await quick.value())["number"] == number
                # The other API calls go on as well.
                if number % 1000 == 0:
                    assert (await ask(socket, "GET", "/api/v2/images")).status == 200
        log.end_run()
        values = await slow.values()
    numbers = [value["number"] for value in values if "number" in value]
    lost = [value["lost_lines"] for value in values if "lost_lines" in value]
    assert numbers == sorted(set(map(int, map(str, numbers))))
    assert numbers[-1] == lines
    assert len(numbers) + sum(map(int, map(str, lost))) == lines
    assert len(lost) == 1
    assert values[-1] == {"ended": True}


async def test_reading_once_ends_although_the_container_never_stops_writing(
    tmp_path: Path,
) -> None:
    operations = FakeOperations()
    log = operations.logs[1]
    log.write(1, b"first\n")

    async def flood() -> None:
        while True:
            log.write(1, b"x" * 1000 + b"\n")
            await trio.lowlevel.checkpoint()

    async with served(operations, tmp_path) as socket, trio.open_nursery() as nursery:
        nursery.start_soon(flood)
        with trio.fail_after(10):
            values = await read_all(socket, LOGS)
        nursery.cancel_scope.cancel()
    assert values[-1]["ended"] is False
    assert len(values) < 300


def test_what_is_sent_at_one_time_is_bounded() -> None:
    lines = [b"%07d\n" % number for number in range(100_000)]
    data, count = piece_of(lines)
    assert data == b"".join(lines[:count])
    assert PIECE_BYTES <= len(data) < PIECE_BYTES + len(lines[0])
    assert piece_of([b"x" * 200_000, b"y"]) == (b"x" * 200_000, 1)
    assert piece_of([]) == (b"", 0)


async def test_silence_is_broken_by_heartbeats(tmp_path: Path) -> None:
    async with (
        served(FakeOperations(), tmp_path, follow_heartbeat_s=0.02) as socket,
        following(socket) as reader,
    ):
        beats = [await reader.line() for _ in range(5)]
    assert beats == [b""] * 5


async def test_between_heartbeats_there_is_silence(tmp_path: Path) -> None:
    async with served(FakeOperations(), tmp_path) as socket, following(socket) as reader:
        assert await reader.line() == b""
        with trio.move_on_after(0.2) as silence:
            await reader.line()
    assert silence.cancelled_caught


async def test_a_follower_is_asked_to_come_back_when_its_time_is_over(tmp_path: Path) -> None:
    operations = FakeOperations()
    operations.logs[1].write(1, b"one\n")
    async with (
        served(operations, tmp_path, follow_deadline_s=0.1) as socket,
        following(socket) as reader,
    ):
        values = await reader.values()
        # The connection is as good as after any answer.
        await reader.stream.send_all(b"GET /api/v2/images HTTP/1.1\r\nHost: td\r\n\r\n")
        again = LineReader(reader.stream)
        while not again.is_whole:
            await again.read_more()
    assert texts(values) == ["one"]
    assert values[-1] == {"ended": False, "after": 1}
    assert again.status == 200


async def test_a_follower_outlives_the_time_that_requests_have(tmp_path: Path) -> None:
    operations = FakeOperations()
    limits = {"request_deadline_s": 0.1, "follow_heartbeat_s": 0.05}
    async with served(operations, tmp_path, **limits) as socket, following(socket) as reader:
        for _ in range(8):
            assert await reader.line() == b""
        operations.logs[1].write(1, b"still here\n")
        assert (await reader.value())["text"] == "still here"


async def test_a_follower_may_read_as_slowly_as_it_likes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "_SEND_BASE_S", 0.05)
    monkeypatch.setattr(connections, "_SEND_MIN_BYTES_PER_S", 1 << 40)
    operations = FakeOperations()
    log = operations.logs[1]
    async with served(operations, tmp_path) as socket, following(socket) as slow:
        # More than the socket's buffers hold: the server has to wait for the reader.
        for _ in range(2000):
            log.write(1, b"x" * 1000 + b"\n")
            await trio.lowlevel.checkpoint()
        await trio.sleep(0.3)
        log.end_run()
        values = await slow.values()
    assert values[-1] == {"ended": True}


async def test_nothing_is_kept_of_a_follower_s_waits(tmp_path: Path) -> None:
    followers = Followers(most=1, heartbeat_s=0.001, deadline_s=60)
    for _ in range(3):
        with followers.pause(trio.current_time()):
            await trio.sleep_forever()
    assert not followers._pauses


async def test_followers_are_bounded_and_take_no_requests_place(tmp_path: Path) -> None:
    operations = FakeOperations()
    async with (
        served(operations, tmp_path, max_followers=3, max_requests=1) as socket,
        following(socket),
        following(socket),
    ):
        async with following(socket):
            refused = await ask(socket, "GET", FOLLOW)
            others = [await ask(socket, "GET", "/api/v2/images") for _ in range(3)]
            once = await read_all(socket, LOGS)
        await wait_for_a_place(socket)
    assert (refused.status, refused.kind, refused.headers["retry-after"]) == (503, "busy", "1")
    assert [answer.status for answer in others] == [200] * 3
    assert once == [{"ended": False, "after": 0}]


async def test_a_follower_that_vanished_behind_a_second_request_is_found_by_its_heartbeat(
    tmp_path: Path,
) -> None:
    # What was pipelined behind the stream keeps the server from reading, so from seeing the end.
    # The next one is taken in when there is nothing left of the connection.
    settings = {"max_connections": 1, "max_followers": 1, "follow_heartbeat_s": 0.05}
    async with served(FakeOperations(), tmp_path, **settings) as socket:
        stream = await trio.open_unix_socket(str(socket))
        request = f"GET {FOLLOW} HTTP/1.1\r\nHost: td\r\n\r\n".encode()
        await stream.send_all(request * 2)
        reader = LineReader(stream)
        assert await reader.line() == b""
        await stream.aclose()
        await wait_for_a_place(socket)


@pytest.mark.parametrize("reads", [True, False], ids=["reads", "does-not-read"])
async def test_shutdown_ends_followers_in_order(tmp_path: Path, reads: bool) -> None:
    operations = FakeOperations()
    log = operations.logs[1]
    with trio.fail_after(8):
        async with served(operations, tmp_path, shutdown_s=0.5) as socket:
            stream = await trio.open_unix_socket(str(socket))
            await stream.send_all(f"GET {FOLLOW} HTTP/1.1\r\nHost: td\r\n\r\n".encode())
            reader = LineReader(stream)
            assert await reader.line() == b""
            log.write(1, b"one\n")
            assert (await reader.value())["text"] == "one"
            if not reads:
                for _ in range(2000):
                    log.write(1, b"x" * 1000 + b"\n")
                    await trio.lowlevel.checkpoint()
    if reads:
        assert await reader.values() == [{"ended": False, "after": 1}]
    else:
        with pytest.raises(EOFError):
            await reader.values()
    await stream.aclose()


async def test_a_container_that_is_forgotten_ends_its_followers(tmp_path: Path) -> None:
    operations = FakeOperations()
    async with served(operations, tmp_path) as socket, following(socket) as reader:
        assert await reader.line() == b""
        operations.logs.pop(1).close()
        assert await reader.values() == [{"ended": True}]


async def test_another_run_continues_the_numbers(tmp_path: Path) -> None:
    operations = FakeOperations()
    log = operations.logs[1]
    log.write(1, b"first run")
    log.end_run()
    async with served(operations, tmp_path) as socket:
        first = await read_all(socket, FOLLOW)
        log.begin_run()
        async with following(socket, f"{FOLLOW}&after=1") as reader:
            log.write(1, b"second run\n")
            value = await reader.value()
    assert first[-1] == {"ended": True}
    assert (value["number"], value["text"]) == (2, "second run")


@pytest.mark.parametrize(
    ("query", "status", "item"),
    [
        ("after=-1", 400, "after"),
        ("after=01", 400, "after"),
        ("after=1.0", 400, "after"),
        ("after=", 400, "after"),
        ("after=99999999999999999999", 400, "after"),
        ("after=%31%20", 400, "after"),
        ("after=1&after=1", 400, "query"),
        ("follow=2", 400, "follow"),
        ("follow=true", 400, "follow"),
        ("folow=1", 400, "query"),
        ("after=2", 409, "after"),
        ("after=2&follow=1", 409, "after"),
    ],
)
async def test_wrong_numbers_are_refused_by_name(
    tmp_path: Path, query: str, status: int, item: str
) -> None:
    operations = FakeOperations()
    operations.logs[1].write(1, b"one\n")
    async with served(operations, tmp_path) as socket:
        answer = await ask(socket, "GET", f"{LOGS}?{query}")
    assert answer.status == status
    assert msgspec.json.decode(answer.body)["error"]["item"] == item


@pytest.mark.parametrize("follow", ["0", "1"])
@pytest.mark.parametrize("container_id", ["9", "0", "x", "4294967296"])
async def test_a_container_that_is_not_here_has_no_log(
    tmp_path: Path, container_id: str, follow: str
) -> None:
    target = f"/api/v2/containers/{container_id}/logs?follow={follow}"
    async with served(FakeOperations(), tmp_path) as socket:
        answer = await ask(socket, "GET", target)
    assert answer.status == (404 if container_id == "9" else 400)


async def test_a_head_request_does_not_follow(tmp_path: Path) -> None:
    async with (
        served(FakeOperations(), tmp_path, max_followers=1) as socket,
        raw_client(socket) as client,
    ):
        await client.send(f"HEAD {FOLLOW} HTTP/1.1\r\nHost: td\r\n\r\n".encode())
        head = await client.answer("HEAD")
        await client.send(b"GET /api/v2/images HTTP/1.1\r\nHost: td\r\n\r\n")
        assert (await client.answer()).status == 200
    assert (head.status, head.body) == (200, b"")


async def test_a_client_of_http_1_0_is_told_the_end_by_the_end_of_the_connection(
    tmp_path: Path,
) -> None:
    operations = FakeOperations()
    operations.logs[1].write(1, b"one\n")
    operations.logs[1].end_run()
    async with (
        served(operations, tmp_path) as socket,
        reading(socket, FOLLOW, version="1.0") as reader,
    ):
        values = await reader.values()
    assert "transfer-encoding" not in reader.headers
    assert values[-1] == {"ended": True}


async def test_two_hundred_followers_all_get_every_line(tmp_path: Path) -> None:
    operations = FakeOperations()
    log = operations.logs[1]
    count = 200
    done: list[list[object]] = []

    async def one(socket: Path, task_status: trio.TaskStatus[None]) -> None:
        async with following(socket) as reader:
            assert await reader.line() == b""
            task_status.started()
            done.append(texts(await reader.values()))

    async with (
        served(operations, tmp_path, max_followers=count) as socket,
        trio.open_nursery() as nursery,
    ):
        for _ in range(count):
            await nursery.start(one, socket)
        for number in range(10):
            log.write(1, b"%d\n" % number)
            await trio.lowlevel.checkpoint()
        log.end_run()
    assert done == [[str(number) for number in range(10)]] * count
