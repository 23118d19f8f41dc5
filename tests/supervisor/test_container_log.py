from __future__ import annotations

import itertools
import tracemalloc
from collections import defaultdict
from collections.abc import Callable

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from supervisor.container_log import (
    LINE_COST_BYTES,
    MAX_LINE_BYTES,
    MIN_KEPT_BYTES,
    ContainerLog,
)
from supervisor.operations import LogLine

KEPT_BYTES = 64 * 1024
ALL = 10**9

# Texts with many newlines, texts with none, and lines around the length at which they are cut.
chunks = st.one_of(
    st.lists(st.sampled_from([b"\n", b"a", b"\xff\x00", b"b" * 700, b"c" * 1024]), max_size=6).map(
        b"".join
    ),
    st.binary(max_size=50),
)
writes = st.lists(st.tuples(st.integers(0, 3), chunks), max_size=40)


def texts(lines: tuple[LogLine, ...]) -> list[bytes]:
    return [line.text for line in lines]


def cost(lines: tuple[LogLine, ...]) -> int:
    return sum(LINE_COST_BYTES + len(line.text) for line in lines)


@given(writes)
def test_a_reader_who_keeps_up_gets_every_byte_of_every_descriptor(
    writes: list[tuple[int, bytes]],
) -> None:
    # All that one write can bring fits, so a reader after each write loses nothing.
    log = ContainerLog(kept_bytes=32 * MIN_KEPT_BYTES, now_ns=itertools.count().__next__)
    seen: list[LogLine] = []
    written: dict[int, bytes] = defaultdict(bytes)

    def read() -> None:
        page = log.page(after=seen[-1].number if seen else 0, max_lines=ALL)
        assert page.lost_lines == 0
        seen.extend(page.lines)

    for fd, chunk in writes:
        log.write(fd, chunk)
        written[fd] += chunk
        read()
    log.end_run()
    read()

    assert [line.number for line in seen] == list(range(1, len(seen) + 1))
    for fd, stream in written.items():
        told = b"".join(line.text + b"\n" * (not line.cut) for line in seen if line.fd == fd)
        # The end of a run ends a line.
        whole = stream if stream.endswith(b"\n") or not stream else stream + b"\n"
        assert told == whole


@given(writes)
def test_what_is_kept_is_the_end_of_what_was_written_and_within_the_bound(
    writes: list[tuple[int, bytes]],
) -> None:
    small = ContainerLog(kept_bytes=MIN_KEPT_BYTES, now_ns=lambda: 0)
    everything: list[tuple[int, bytes, bool]] = []
    seen = 0
    for fd, chunk in writes:
        # In small pieces, so that nothing of one of them is driven out before it was read.
        for start in range(0, len(chunk), 8):
            small.write(fd, chunk[start : start + 8])
            page = small.page(after=seen, max_lines=ALL)
            everything += [(line.fd, line.text, line.cut) for line in page.lines]
            seen += page.lost_lines + len(page.lines)
            assert page.lost_lines == 0
    whole = small.page(after=0, max_lines=ALL)
    assert whole.lost_lines + len(whole.lines) == len(everything)
    assert [(line.fd, line.text, line.cut) for line in whole.lines] == everything[
        whole.lost_lines :
    ]
    assert cost(whole.lines) <= MIN_KEPT_BYTES
    if whole.lost_lines:
        # Unfinished lines take half at most; the rest is used up to the longest line.
        longest = MIN_KEPT_BYTES // 4 + LINE_COST_BYTES
        assert cost(whole.lines) > MIN_KEPT_BYTES // 2 - longest


@given(writes, st.integers(0, 60), st.integers(1, 7))
def test_pages_one_after_another_give_what_one_large_page_gives(
    writes: list[tuple[int, bytes]], after: int, max_lines: int
) -> None:
    log = ContainerLog(kept_bytes=MIN_KEPT_BYTES, now_ns=itertools.count().__next__)
    for fd, chunk in writes:
        log.write(fd, chunk)
    log.end_run()
    whole = log.page(after=after, max_lines=ALL)
    assert whole.ended
    pages = [log.page(after=after, max_lines=max_lines)]
    while not pages[-1].ended:
        assert len(pages[-1].lines) == max_lines
        pages.append(log.page(after=pages[-1].lines[-1].number, max_lines=max_lines))
    assert tuple(line for page in pages for line in page.lines) == whole.lines
    assert [page.lost_lines for page in pages] == [whole.lost_lines] + [0] * (len(pages) - 1)


def test_lines_of_descriptors_that_are_written_in_turns_are_not_mixed() -> None:
    log = ContainerLog(kept_bytes=KEPT_BYTES)
    for fd, chunk in ((1, b"out"), (2, b"err\n"), (1, b"put\nne"), (7, b"\n"), (1, b"xt\n")):
        log.write(fd, chunk)
    lines = log.page(after=0, max_lines=ALL).lines
    assert [(line.fd, line.text) for line in lines] == [
        (2, b"err"),
        (1, b"output"),
        (7, b""),
        (1, b"next"),
    ]


def test_a_lines_time_is_when_it_began() -> None:
    log = ContainerLog(kept_bytes=KEPT_BYTES, now_ns=iter([10, 20, 30]).__next__)
    log.write(1, b"slow")
    log.write(1, b"ly\nquick\nlast")
    log.write(2, b"other\n")
    log.end_run()
    lines = log.page(after=0, max_lines=ALL).lines
    assert [(line.text, line.time_ns) for line in lines] == [
        (b"slowly", 10),
        (b"quick", 20),
        (b"other", 30),
        (b"last", 20),
    ]


@pytest.mark.parametrize("chunk_bytes", [1000, MAX_LINE_BYTES, 64 * 1024])
def test_an_endless_line_is_cut_and_bounded(chunk_bytes: int) -> None:
    log = ContainerLog(kept_bytes=KEPT_BYTES)
    for _ in range(1024 * 1024 // chunk_bytes):
        log.write(1, b"x" * chunk_bytes)
    log.end_run()
    page = log.page(after=0, max_lines=ALL)
    assert page.lost_lines > 0
    assert all(line.cut and len(line.text) == MAX_LINE_BYTES for line in page.lines[:-1])
    assert not page.lines[-1].cut
    assert cost(page.lines) <= KEPT_BYTES


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (MAX_LINE_BYTES, [(MAX_LINE_BYTES, False)]),
        (MAX_LINE_BYTES + 1, [(MAX_LINE_BYTES, True), (1, False)]),
    ],
)
def test_a_line_is_cut_only_where_it_is_too_long(
    length: int, expected: list[tuple[int, bool]]
) -> None:
    for parts in ((b"y" * length + b"\n",), (b"y" * length, b"\n")):
        log = ContainerLog(kept_bytes=KEPT_BYTES)
        for part in parts:
            log.write(1, part)
        lines = log.page(after=0, max_lines=ALL).lines
        assert [(len(line.text), line.cut) for line in lines] == expected


def flood_of_empty_lines(log: ContainerLog) -> None:
    for _ in range(64):
        log.write(1, b"\n" * 16_384)


def flood_of_short_lines(log: ContainerLog) -> None:
    # One at a time: each has a time of its own.
    for number in range(20_000):
        log.write(1, b"%06d\n" % number)


def flood_of_one_line(log: ContainerLog) -> None:
    for _ in range(64):
        log.write(1, b"z" * 65_536)


def flood_of_unfinished_lines(log: ContainerLog) -> None:
    for number in range(64 * 200):
        log.write(number % 64, b"u" * 100)


@pytest.mark.parametrize(
    "flood",
    [
        flood_of_empty_lines,
        flood_of_short_lines,
        flood_of_one_line,
        flood_of_unfinished_lines,
    ],
)
@pytest.mark.parametrize("kept_bytes", [MIN_KEPT_BYTES, KEPT_BYTES])
def test_the_memory_that_python_takes_is_bounded(
    flood: Callable[[ContainerLog], None], kept_bytes: int
) -> None:
    log = ContainerLog(kept_bytes=kept_bytes)
    tracemalloc.start()
    try:
        flood(log)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert log.page(after=0, max_lines=ALL).lost_lines > 0
    # The allocator and the containers round up: by a quarter, and a few fixed objects.
    assert taken < kept_bytes * 5 // 4 + 8192


def test_every_lost_line_is_counted_in_a_flood_of_empty_ones() -> None:
    log = ContainerLog(kept_bytes=KEPT_BYTES)
    flood_of_empty_lines(log)
    page = log.page(after=1000, max_lines=ALL)
    assert len(page.lines) == KEPT_BYTES // LINE_COST_BYTES
    assert page.lost_lines + len(page.lines) == 64 * 16_384 - 1000


def test_lines_that_are_driven_out_at_once_are_counted_as_they_would_be_cut() -> None:
    log = ContainerLog(kept_bytes=MIN_KEPT_BYTES)
    # Cut at a quarter of what is kept: the first line makes three.
    log.write(1, b"x" * 3000 + b"\n" * 100)
    page = log.page(after=0, max_lines=ALL)
    assert texts(page.lines) == [b""] * (MIN_KEPT_BYTES // LINE_COST_BYTES)
    assert page.lost_lines + len(page.lines) == 102


def test_a_log_that_could_not_hold_a_line_is_refused() -> None:
    with pytest.raises(ValueError, match=f"at least {MIN_KEPT_BYTES}"):
        ContainerLog(kept_bytes=MIN_KEPT_BYTES - 1)


def test_a_log_lasts_over_runs_and_is_at_its_end_between_them() -> None:
    log = ContainerLog(kept_bytes=KEPT_BYTES)
    log.write(1, b"first run\nunfinished")
    assert not log.page(after=0, max_lines=ALL).ended
    log.end_run()
    log.end_run()
    page = log.page(after=0, max_lines=ALL)
    assert texts(page.lines) == [b"first run", b"unfinished"]
    assert page.ended
    assert not log.page(after=0, max_lines=1).ended
    log.begin_run()
    log.write(1, b" is another line\n")
    page = log.page(after=2, max_lines=ALL)
    assert texts(page.lines) == [b" is another line"]
    assert [line.number for line in page.lines] == [3]
    assert not page.ended


def test_a_reader_ahead_of_the_log_gets_nothing_and_loses_nothing() -> None:
    log = ContainerLog(kept_bytes=KEPT_BYTES)
    log.write(1, b"one\n")
    for after in (1, 2, 10**12):
        page = log.page(after=after, max_lines=ALL)
        assert page.lines == ()
        assert page.lost_lines == 0
    assert texts(log.page(after=-5, max_lines=ALL).lines) == [b"one"]


async def test_each_of_many_followers_gets_every_line_and_then_the_end() -> None:
    log = ContainerLog(kept_bytes=KEPT_BYTES)
    heard: list[list[bytes]] = [[] for _ in range(200)]

    async def follow(texts_heard: list[bytes]) -> None:
        after = 0
        while True:
            page = log.page(after=after, max_lines=3)
            texts_heard += texts(page.lines)
            after += len(page.lines)
            if page.ended:
                return
            await log.wait(after=after)

    async with trio.open_nursery() as nursery:
        for texts_heard in heard:
            nursery.start_soon(follow, texts_heard)
        await trio.testing.wait_all_tasks_blocked()
        for number in range(10):
            log.write(1, b"line %d\nline %d again\n" % (number, number))
            await trio.testing.wait_all_tasks_blocked()
        log.write(1, b"the rest")
        log.end_run()
    said = [b"line %d%s" % (n, again) for n in range(10) for again in (b"", b" again")]
    assert heard == [[*said, b"the rest"]] * 200


async def test_a_follower_who_sleeps_is_told_how_many_lines_went_by() -> None:
    log = ContainerLog(kept_bytes=MIN_KEPT_BYTES)
    log.write(1, b"seen\n")
    await log.wait(after=0)
    for _ in range(100):
        log.write(1, b"w" * 896 + b"\n")
    page = log.page(after=1, max_lines=ALL)
    assert len(page.lines) == 4
    assert page.lost_lines == 96


async def test_a_write_without_a_newline_wakes_nobody() -> None:
    log = ContainerLog(kept_bytes=KEPT_BYTES)
    log.write(1, b"not yet")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: log.wait(after=0))
        await trio.testing.wait_all_tasks_blocked()
        assert nursery.child_tasks
        log.write(1, b" but now\n")


async def test_a_follower_who_goes_away_is_forgotten() -> None:
    log = ContainerLog(kept_bytes=KEPT_BYTES)
    with trio.move_on_after(0):
        await log.wait(after=0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: log.wait(after=0))
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert not log._readers


async def test_closing_sends_every_follower_away_and_frees_the_lines() -> None:
    log = ContainerLog(kept_bytes=KEPT_BYTES)
    log.write(1, b"gone\n")
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(lambda: log.wait(after=1))
        await trio.testing.wait_all_tasks_blocked()
        log.close()
    log.close()
    page = log.page(after=0, max_lines=ALL)
    assert page.lines == ()
    assert page.lost_lines == 1
    assert page.ended
