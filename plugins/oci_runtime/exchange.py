"""What one command is told through its standard input, and what it answers on its outputs.

All three go on at once, so a command that never reads what it is told, or that writes before
it reads, waits for nobody and nobody for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import trio

from plugins.oci_runtime.pace import Pace

CHUNK_BYTES = 64 * 1024
# What the command itself wrote is in the pipes when it has ended, and no pipe holds more.
DRAIN_BYTES = 1024 * 1024


def exchange_pace() -> Pace:
    """Of the reading of all commands' output: 100 MB/s, since what is too much is only dropped."""
    return Pace(bytes_per_s=100_000_000, reads_per_s=5000, rest_s=0)


class Capture:
    """The first `limit_bytes` of an output; `cut`: there was more."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._kept = bytearray()
        self.cut = False

    def __bytes__(self) -> bytes:
        return bytes(self._kept)

    def take(self, chunk: bytes) -> None:
        room = self._limit_bytes - len(self._kept)
        self._kept += chunk[:room]
        self.cut = self.cut or len(chunk) > room


class Exchange:
    """Three pipes. `theirs` are the command's ends: its number -> our descriptor."""

    def __init__(self, stdin: bytes, *, capture_bytes: int, pace: Pace) -> None:
        self.theirs: dict[int, int] = {}
        self.stdout = Capture(capture_bytes)
        self.stderr = Capture(capture_bytes)
        self._said = stdin
        self._pace = pace
        self._ours: dict[int, trio.lowlevel.FdStream] = {}

    def open(self, *, owner: int) -> None:
        """Make the pipes; they belong to `owner`, who may open them anew. Raises `OSError`."""
        for fd in (0, 1, 2):
            read_end, write_end = os.pipe2(os.O_CLOEXEC)
            theirs, ours = (read_end, write_end) if fd == 0 else (write_end, read_end)
            self.theirs[fd] = theirs
            self._ours[fd] = trio.lowlevel.FdStream(ours)
            os.fchown(theirs, owner, owner)

    def close_theirs(self) -> None:
        """The command has its ends: from now on they close when it closes them. Idempotent."""
        while self.theirs:
            os.close(self.theirs.popitem()[1])

    def close(self) -> None:
        """Give everything back. Idempotent."""
        self.close_theirs()
        for stream in self._ours.values():
            stream.close()

    async def run(self) -> None:
        """Tell and listen until everything is told and nobody can say anything more.

        Cancellable; nothing that was read by then is lost. Does not raise.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell)
            nursery.start_soon(self._listen, self._ours[1], self.stdout)
            nursery.start_soon(self._listen, self._ours[2], self.stderr)

    async def drain(self) -> None:
        """Take in what is in the pipes; the command has ended. Does not wait, is bounded.

        Whoever else has the command's outputs (a child that it left behind) is not heard.
        """
        for stream, capture in ((self._ours[1], self.stdout), (self._ours[2], self.stderr)):
            left = DRAIN_BYTES
            # An empty pipe, or one that broke.
            with suppress(OSError):
                while left > 0 and (chunk := os.read(stream.fileno(), CHUNK_BYTES)):
                    capture.take(chunk)
                    left -= len(chunk)
                    await trio.lowlevel.checkpoint()

    async def _tell(self) -> None:
        # It need not listen.
        with suppress(trio.BrokenResourceError):
            async with self._ours[0] as stream:
                await stream.send_all(self._said)

    async def _listen(self, stream: trio.lowlevel.FdStream, capture: Capture) -> None:
        with suppress(trio.BrokenResourceError):
            while chunk := await stream.receive_some(CHUNK_BYTES):
                capture.take(chunk)
                await self._pace.rest(len(chunk))


@contextmanager
def open_exchange(
    stdin: bytes, *, capture_bytes: int, owner: int, pace: Pace
) -> Iterator[Exchange]:
    """An exchange whose descriptors all close with the block. Raises `OSError`."""
    exchange = Exchange(stdin, capture_bytes=capture_bytes, pace=pace)
    try:
        exchange.open(owner=owner)
        yield exchange
    finally:
        exchange.close()
