"""The descriptors that a container's program is given, and what comes back through them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import trio

from plugins.oci_runtime.pace import Pace
from plugins.oci_runtime.shim_program import MAX_KEPT_FD
from supervisor import LogSink, PolicyDenied

CHUNK_BYTES = 16 * 1024
# No pipe holds more (fs.pipe-max-size). More than that comes only from a living writer, to
# whom the dead container has handed its pipe: that one is not waited for.
DRAIN_BYTES = 1024 * 1024
STOP_S = 1


def output_pace() -> Pace:
    """Of the reading of all containers' output: a lone flood gets 1.6 MB/s, all 3.2 MB/s.

    At 16 KiB a turn, text takes under a tenth of the event loop's time and no turn longer
    than it takes to split 16,384 empty lines (2 ms).
    """
    return Pace(bytes_per_s=3_200_000, reads_per_s=2000, rest_s=0.01)


class Streams:
    """`fds` are for the program: its number -> our descriptor. They close with the block of
    `open_streams`; our own ends close with it too unless somebody takes them."""

    def __init__(self) -> None:
        self.fds: dict[int, int] = {}
        self._kept: dict[int, int] = {}

    def take(self) -> dict[int, int]:
        """Our ends, non-blocking: the program's number -> descriptor. The taker closes them."""
        kept, self._kept = self._kept, {}
        return kept


@contextmanager
def open_streams(log_fds: Iterable[int], *, owner: int) -> Iterator[Streams]:
    """Pipes for `log_fds`; /dev/null for those of 0, 1 and 2 that are not among them.

    The pipes belong to `owner` (the container's root, as an id outside), since programs open
    `/dev/stdout` anew. Raises `PolicyDenied` for numbers above MAX_KEPT_FD, and `OSError`.
    """
    wanted = sorted(set(log_fds))
    if wanted and not 0 <= wanted[0] <= wanted[-1] <= MAX_KEPT_FD:
        raise PolicyDenied(
            "logFDs",
            "must be descriptors that this runtime can give to a program",
            expected=f"0 to {MAX_KEPT_FD}",
            actual=", ".join(map(str, wanted)),
        )
    streams = Streams()
    try:
        for fd in wanted:
            streams._kept[fd], streams.fds[fd] = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(streams._kept[fd], False)
            os.fchown(streams.fds[fd], owner, owner)
        for fd in (0, 1, 2):
            if fd not in streams.fds:
                streams.fds[fd] = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        yield streams
    finally:
        for descriptor in (*streams.fds.values(), *streams.take().values()):
            os.close(descriptor)


class Output:
    """Carries what one run of a container writes to `sink`, from `start` to `finish`."""

    def __init__(self, sink: LogSink, pace: Pace) -> None:
        self._sink = sink
        self._pace = pace
        # One read at a time: with 64 descriptors a container gets no more turns than with one.
        self._turn = trio.Lock()
        self._scope = trio.CancelScope()
        self._reading: trio.Event | None = None
        self._ends: dict[int, int] = {}

    def start(self, nursery: trio.Nursery, streams: Streams) -> None:
        """Read in a task of `nursery`; `finish` must follow, since it closes what we take."""
        self._ends = streams.take()
        self._reading = trio.Event()
        nursery.start_soon(self._read_all, self._reading)

    async def finish(self) -> None:
        """Take in what is still in the pipes, and close them. The writers are dead.

        Idempotent; bounded in bytes and time; when cancelled the rest is lost.
        """
        self._scope.cancel()
        ends, self._ends = self._ends, {}
        try:
            if self._reading is not None:
                # The tasks are cancelled and hold on to nothing: this takes a moment.
                with trio.move_on_after(STOP_S, shield=True):
                    await self._reading.wait()
            for fd, end in ends.items():
                left = DRAIN_BYTES
                while left > 0 and (size := self._read(fd, end)):
                    left -= size
                    await trio.lowlevel.checkpoint()
        finally:
            for end in ends.values():
                os.close(end)

    async def _read_all(self, done: trio.Event) -> None:
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    for fd, end in self._ends.items():
                        nursery.start_soon(self._pump, fd, end)
        finally:
            done.set()

    async def _pump(self, fd: int, end: int) -> None:
        while True:
            await trio.lowlevel.wait_readable(end)
            async with self._turn:
                size = self._read(fd, end)
                if size == 0:
                    return
                await self._pace.rest(size or 0)

    def _read(self, fd: int, end: int) -> int | None:
        """Bytes taken; 0 at the end of the stream; None if there is nothing at the moment."""
        try:
            chunk = os.read(end, CHUNK_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            # A pipe that breaks costs this container its output, and nobody anything else.
            return 0
        if chunk:
            self._sink.write(fd, chunk)
        return len(chunk)
