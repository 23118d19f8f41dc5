from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import trio
import trio.testing
from oci_runtime_rig import open_fds, running_rig

from plugins.oci_runtime.output import (
    CHUNK_BYTES,
    DRAIN_BYTES,
    Output,
    open_streams,
    output_pace,
)
from plugins.oci_runtime.pace import Pace
from plugins.oci_runtime.shim_program import MAX_KEPT_FD
from supervisor import ExitStatus, PolicyDenied

OWNER = os.getuid()
PIPE_BYTES = 64 * 1024


class Sink:
    """Remembers what it was given."""

    def __init__(self) -> None:
        self.written: dict[int, bytearray] = {}
        self.times_s: list[float] = []

    def write(self, fd: int, chunk: bytes) -> None:
        self.written.setdefault(fd, bytearray()).extend(chunk)
        self.times_s.append(trio.current_time())


def null_pace() -> Pace:
    return Pace(bytes_per_s=1e12, reads_per_s=1e9, rest_s=0)


@contextmanager
def started(
    output: Output, nursery: trio.Nursery, *log_fds: int, first: bytes = b""
) -> Iterator[dict[int, int]]:
    """What a program would hold, its number -> descriptor, while `output` is read.

    `first` is written to each of them before.
    """
    with open_streams(log_fds, owner=OWNER) as streams:
        ends = {fd: os.dup(descriptor) for fd, descriptor in streams.fds.items()}
        for fd in log_fds:
            os.write(ends[fd], first)
        output.start(nursery, streams)
    try:
        yield ends
    finally:
        for end in ends.values():
            with suppress(OSError):
                os.close(end)


def test_every_log_descriptor_is_a_pipe_and_the_other_standard_ones_are_null() -> None:
    with open_streams((2, 5, 5, 63), owner=OWNER) as streams:
        what = {fd: os.readlink(f"/proc/self/fd/{ours}") for fd, ours in streams.fds.items()}
        assert sorted(what) == [0, 1, 2, 5, 63]
        assert what[0] == what[1] == os.devnull
        assert all(what[fd].startswith("pipe:") for fd in (2, 5, 63))
        assert len({what[fd] for fd in (2, 5, 63)}) == 3


def test_no_descriptor_is_inherited_by_chance_and_none_stays_open() -> None:
    before = open_fds()
    with open_streams((1, 7), owner=OWNER) as streams:
        assert not any(os.get_inheritable(ours) for ours in streams.fds.values())
        assert os.get_blocking(streams.fds[1])
    assert open_fds() == before
    with open_streams((1, 7), owner=OWNER) as streams:
        kept = streams.take()
    assert open_fds() == before + 2
    for end in kept.values():
        assert not os.get_blocking(end)
        os.close(end)


@pytest.mark.parametrize("log_fds", [(1, MAX_KEPT_FD + 1), (-1,)])
def test_a_descriptor_beyond_the_limit_is_refused_by_name(log_fds: tuple[int, ...]) -> None:
    before = open_fds()
    with pytest.raises(PolicyDenied) as caught, open_streams(log_fds, owner=OWNER):
        pass
    assert caught.value.item == "logFDs"
    assert caught.value.expected == f"0 to {MAX_KEPT_FD}"
    assert open_fds() == before


@pytest.mark.root
def test_a_pipe_belongs_to_the_containers_root_who_may_open_it_anew() -> None:
    with open_streams((1,), owner=123_456) as streams:
        path = f"/proc/{os.getpid()}/fd/{streams.fds[1]}"
        assert os.stat(path).st_uid == 123_456
        # As `echo > /dev/stdout` does.
        subprocess.run(
            ["/bin/sh", "-c", "echo again > /dev/stdout"],
            stdout=streams.fds[1],
            user=123_456,
            group=123_456,
            check=True,
        )
        (end,) = streams.take().values()
        assert os.read(end, 100) == b"again\n"
        os.close(end)


async def test_chunks_reach_the_sink_under_the_programs_own_numbers(
    nursery: trio.Nursery,
) -> None:
    before = open_fds()
    sink = Sink()
    output = Output(sink, null_pace())
    with started(output, nursery, 1, 2, 9) as ends:
        os.write(ends[9], b"nine")
        os.write(ends[1], b"one")
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert sink.written == {9: b"nine", 1: b"one"}
        os.write(ends[2], b"two")
        await output.finish()
    assert sink.written == {9: b"nine", 1: b"one", 2: b"two"}
    assert open_fds() == before


async def test_at_the_end_of_a_run_full_pipes_are_taken_in_at_once(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    # Each read is followed by a rest of an hour, which an end does not wait for.
    sink = Sink()
    output = Output(sink, Pace(bytes_per_s=1e12, reads_per_s=1e9, rest_s=3600))
    with started(output, nursery, 1, 2, first=b"x" * PIPE_BYTES):
        await trio.sleep(1)
        assert sum(map(len, sink.written.values())) == CHUNK_BYTES
        await output.finish()
        assert trio.current_time() == 1
    assert sink.written == {1: b"x" * PIPE_BYTES, 2: b"x" * PIPE_BYTES}


async def test_a_writer_who_outlives_the_container_is_not_waited_for(
    nursery: trio.Nursery,
) -> None:
    # Another container may have been handed the pipe's other end.
    sink = Sink()
    output = Output(sink, null_pace())
    with started(output, nursery, 1) as ends:
        os.write(ends[1], b"last words")
        await output.finish()
        assert sink.written == {1: b"last words"}
        with pytest.raises(BrokenPipeError):
            os.write(ends[1], b"heard by nobody")


async def test_what_is_drained_at_the_end_is_bounded(nursery: trio.Nursery) -> None:
    class Endless(Sink):
        """Whatever is taken out of the pipe is at once replaced."""

        def write(self, fd: int, chunk: bytes) -> None:
            super().write(fd, chunk)
            os.write(ends[1], chunk)

    sink = Endless()
    output = Output(sink, Pace(bytes_per_s=1, reads_per_s=1, rest_s=3600))
    with started(output, nursery, 1, first=b"m" * PIPE_BYTES) as ends:
        await output.finish()
    assert DRAIN_BYTES <= len(sink.written[1]) <= DRAIN_BYTES + 2 * CHUNK_BYTES


async def test_output_that_was_never_started_can_be_finished() -> None:
    before = open_fds()
    output = Output(Sink(), null_pace())
    await output.finish()
    await output.finish()
    assert open_fds() == before


async def test_a_cancelled_end_gives_the_descriptors_back(nursery: trio.Nursery) -> None:
    before = open_fds()
    output = Output(Sink(), null_pace())
    with started(output, nursery, 1, first=b"lost"), trio.CancelScope() as scope:
        scope.cancel()
        await output.finish()
    assert open_fds() == before


async def test_a_nursery_that_is_cancelled_first_loses_nothing() -> None:
    # So it is when the whole plugin stops: the readers go, then the containers.
    sink = Sink()
    output = Output(sink, null_pace())
    async with trio.open_nursery() as readers:
        with started(output, readers, 1) as ends:
            await trio.testing.wait_all_tasks_blocked()
            readers.cancel_scope.cancel()
            os.write(ends[1], b"after that")
            with trio.CancelScope(shield=True):
                await output.finish()
    assert sink.written == {1: b"after that"}


async def test_a_program_that_closes_a_descriptor_keeps_the_others(nursery: trio.Nursery) -> None:
    sink = Sink()
    output = Output(sink, null_pace())
    with started(output, nursery, 1, 2) as ends:
        os.close(ends[1])
        await trio.testing.wait_all_tasks_blocked(0.05)
        os.write(ends[2], b"still here")
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert sink.written == {2: b"still here"}
        await output.finish()


async def test_a_reader_who_is_robbed_of_what_made_the_pipe_readable_does_not_spin(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    # The container owns the pipe, so it can open it for reading.
    class CountingPace(Pace):
        rests = 0

        async def rest(self, size_bytes: int) -> None:
            self.rests += 1
            await super().rest(size_bytes)

    sink = Sink()
    pace = CountingPace(bytes_per_s=1e12, reads_per_s=1e9, rest_s=10)
    output = Output(sink, pace)
    with started(output, nursery, 1, 2) as ends:
        # One read at a time: while the first rests, the second knows that it is readable.
        os.write(ends[1], b"first")
        await trio.sleep(1)
        os.write(ends[2], b"stolen")
        await trio.sleep(1)
        thief = os.open(f"/proc/self/fd/{ends[2]}", os.O_RDONLY)
        assert os.read(thief, 100) == b"stolen"
        os.close(thief)
        await trio.sleep(30)
        await output.finish()
    assert sink.written == {1: b"first"}
    assert pace.rests == 2


@pytest.mark.parametrize("descriptors", [1, 4])
async def test_a_flood_is_read_at_its_pace_through_however_many_descriptors_it_comes(
    descriptors: int, autojump_clock: trio.testing.MockClock
) -> None:
    floods = 5
    sinks = [Sink() for _ in range(floods + 1)]
    outputs: list[Output] = []
    pace = output_pace()

    async def flood(end: int) -> None:
        os.set_blocking(end, False)
        while True:
            with suppress(BlockingIOError):
                while True:
                    os.write(end, b"f" * 4096)
            await trio.sleep(0.001)

    with ExitStack() as stack:
        async with trio.open_nursery() as nursery:
            for number, sink in enumerate(sinks):
                # The first of them has one descriptor, the others flood all of theirs.
                fds = range(1, 2 if number == 0 else descriptors + 1)
                output = Output(sink, pace)
                outputs.append(output)
                ends = stack.enter_context(started(output, nursery, *fds))
                for fd in fds:
                    nursery.start_soon(flood, ends[fd])
            await trio.sleep(3)
            nursery.cancel_scope.cancel()
    sizes = [sum(map(len, sink.written.values())) for sink in sinks]
    for output in outputs:
        await output.finish()
    assert sum(sizes) <= 3 * 3_200_000 + (floods + 1) * CHUNK_BYTES
    assert min(sizes) > 0
    assert max(sizes) - min(sizes) <= 3 * CHUNK_BYTES


@pytest.mark.root
async def test_a_container_may_open_its_outputs_anew_and_write_through_descriptor_0(
    tmp_path: Path,
) -> None:
    script = "echo out > /dev/stdout; echo err > /dev/stderr; echo zero >&0; echo high >&12"
    async with running_rig(tmp_path) as rig:
        container = await rig.start(rig.spec("/bin/sh", "-c", script, log_fds=(0, 1, 2, 12)))
        try:
            assert await container.wait() == ExitStatus(exit_code=0)
        finally:
            await container.destroy()
    assert {fd: container.log.text(fd) for fd in (0, 1, 2, 12)} == {
        0: b"zero\n",
        1: b"out\n",
        2: b"err\n",
        12: b"high\n",
    }


@pytest.mark.root
async def test_a_container_that_floods_is_heard_to_the_end_and_so_is_its_quiet_neighbour(
    tmp_path: Path,
) -> None:
    size = 600_000
    loud = f"head -c {size} /dev/zero; head -c {size} /dev/zero >&2; echo end"
    quiet = "for n in 1 2 3 4 5; do echo $n; sleep 0.05; done"
    async with running_rig(tmp_path) as rig:
        runs = [await rig.start(rig.spec("/bin/sh", "-c", script)) for script in (loud, quiet)]
        with trio.fail_after(30):
            for run in runs:
                assert await run.wait() == ExitStatus(exit_code=0)
                await run.destroy()
    flood, neighbour = runs
    # What was in the pipes at the end is there too.
    assert flood.log.text(1) == bytes(size) + b"end\n"
    assert flood.log.text(2) == bytes(size)
    assert neighbour.logs() == b"1\n2\n3\n4\n5\n"
