"""What a container wrote to the descriptors that its owner lets strangers see."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import trio

KEPT_BYTES = 64 * 1024
CHUNK_BYTES = 64 * 1024
# After a full pipe the reader rests, so that a container that floods its output waits
# for us (1.3 MB/s) and the supervisor's one thread does not work for it alone.
REST_S = 0.05
DRAIN_S = 0.5


class Output:
    """The last KEPT_BYTES of one container's output, its streams in order of arrival."""

    def __init__(self) -> None:
        self._kept = bytearray()
        self._scope = trio.CancelScope()
        self._read: trio.Event | None = None

    def tail(self) -> bytes:
        return bytes(self._kept)

    def start(self, nursery: trio.Nursery, streams: Sequence[trio.lowlevel.FdStream]) -> None:
        """Read `streams` in a task of `nursery`, which closes them."""
        self._read = trio.Event()
        nursery.start_soon(self._read_all, streams, self._read)

    async def finish(self) -> None:
        """Take in what is still in the pipes; the writers are dead. Bounded."""
        if self._read is not None:
            with trio.move_on_after(DRAIN_S):
                await self._read.wait()
            # Another container may have been handed our pipe's other end: then no end comes.
            self._scope.cancel()

    async def _read_all(self, streams: Sequence[trio.lowlevel.FdStream], read: trio.Event) -> None:
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    for stream in streams:
                        nursery.start_soon(self._pump, stream)
        finally:
            read.set()

    async def _pump(self, stream: trio.lowlevel.FdStream) -> None:
        # A pipe that breaks costs this container its output, and nobody anything else.
        with suppress(trio.BrokenResourceError):
            async with stream:
                await self._keep(stream)

    async def _keep(self, stream: trio.lowlevel.FdStream) -> None:
        while chunk := await stream.receive_some(CHUNK_BYTES):
            self._kept += chunk
            del self._kept[:-KEPT_BYTES]
            if len(chunk) >= CHUNK_BYTES // 2:
                await trio.sleep(REST_S)


class Streams:
    """Descriptors for a container's fds 1 and 2, and our ends of those that are kept."""

    def __init__(self, stdout: int, stderr: int, kept: list[trio.lowlevel.FdStream]) -> None:
        self.stdout = stdout
        self.stderr = stderr
        self._kept = kept

    def take(self) -> list[trio.lowlevel.FdStream]:
        """Our ends; whoever takes them closes them."""
        kept, self._kept = self._kept, []
        return kept


@contextmanager
def open_streams(log_fds: Sequence[int]) -> Iterator[Streams]:
    """Pipes for those of 1 and 2 that are in `log_fds`, else /dev/null. Raises `OSError`.

    Closes the container's ends at exit (it has copies then), and ours if nobody took them.
    """
    ends: dict[int, int] = {}
    streams = Streams(-1, -1, [])
    try:
        for fd in (1, 2):
            if fd in log_fds:
                read_end, ends[fd] = os.pipe2(os.O_CLOEXEC)
                streams._kept.append(trio.lowlevel.FdStream(read_end))
            else:
                ends[fd] = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        streams.stdout, streams.stderr = ends[1], ends[2]
        yield streams
    finally:
        for fd in ends.values():
            os.close(fd)
        for stream in streams.take():
            stream.close()
