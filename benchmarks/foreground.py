"""A command that stays while its container runs, and hands on what the program writes."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import trio

from benchmarks.clock_program import time_in
from benchmarks.figures import CannotMeasure

START_TIMEOUT_S = 120
END_TIMEOUT_S = 60
_MAX_LINE_BYTES = 1024


class Foreground:
    """One such command. `end` must follow, once something has ended the container."""

    def __init__(self, process: trio.Process, first_line: bytes) -> None:
        self._process = process
        self._first_line = first_line

    @property
    def first_instruction(self) -> float:
        """When the program's first instruction ran, in `time.monotonic()`'s seconds."""
        return time_in(self._first_line)

    @classmethod
    async def start(cls, command: Sequence[str], log: Path) -> Foreground:
        """Returns when the program has written its line. Raises `CannotMeasure`.

        The command's own words go to the file `log`. When this raises it has ended.
        """
        with log.open("ab") as words:
            process = await trio.lowlevel.open_process(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=words
            )
        line = b""
        try:
            with trio.move_on_after(START_TIMEOUT_S):
                line = await _first_line(process)
            if not line.endswith(b"\n"):
                raise CannotMeasure(f"`{Path(command[0]).name}` started nothing: {_end_of(log)}")
        except BaseException:
            await _end(process)
            raise
        return cls(process, line)

    async def end(self) -> None:
        """Wait for the command's end; past the deadline, kill it. Idempotent."""
        with trio.move_on_after(END_TIMEOUT_S):
            await self._process.wait()
        await _end(self._process)


async def _first_line(process: trio.Process) -> bytes:
    """Up to the first newline, or to the end of what is written."""
    line = b""
    while process.stdout is not None and b"\n" not in line and len(line) < _MAX_LINE_BYTES:
        chunk = await process.stdout.receive_some(_MAX_LINE_BYTES)
        if not chunk:
            break
        line += bytes(chunk)
    return line


async def _end(process: trio.Process) -> None:
    with trio.CancelScope(shield=True):
        if process.stdout is not None:
            await process.stdout.aclose()
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _end_of(log: Path) -> str:
    return log.read_bytes()[-1000:].decode(errors="replace").strip()
