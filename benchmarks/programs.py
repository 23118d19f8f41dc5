"""Runs other programs to their end; what they say matters only when they fail."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import trio

from benchmarks.figures import CannotMeasure

PROGRAM_TIMEOUT_S = 600


async def run_program(
    command: Sequence[str], log: Path, *, environment: Mapping[str, str] | None = None
) -> None:
    """Raises `CannotMeasure` with its last words when it fails or does not end in time.

    Its words go to the file `log`, since what it leaves running keeps them open. Cancelling
    ends it.
    """
    with log.open("w+b") as words, trio.move_on_after(PROGRAM_TIMEOUT_S) as patience:
        process = await trio.run_process(
            command,
            stdin=subprocess.DEVNULL,
            stdout=words,
            stderr=words,
            check=False,
            env=environment,
        )
        if process.returncode:
            words.seek(0)
            said = words.read()[-1000:].decode(errors="replace").strip()
            raise CannotMeasure(f"`{Path(command[0]).name}` failed: {said}")
    if patience.cancelled_caught:
        raise CannotMeasure(f"`{Path(command[0]).name}` did not end in {PROGRAM_TIMEOUT_S} s")
