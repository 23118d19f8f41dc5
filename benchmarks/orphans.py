"""Processes that a program leaves behind when it ends: adopted here, and seen to their end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import trio

from plugins.oci_runtime.kernel import child_subreaper

ORPHANS_TIMEOUT_S = 30
END_TIMEOUT_S = 60
POLL_S = 0.01


@contextmanager
def orphans_reaped() -> Iterator[None]:
    """Adopt what runtimes leave behind, and see it end; a machine's init may not do so."""
    with child_subreaper():
        before = _children()
        try:
            yield
        finally:
            for pid in _children() - before:
                _see_end(pid)


async def reap(pid: int) -> None:
    """Wait for a process that we adopted."""
    with trio.fail_after(END_TIMEOUT_S), suppress(ChildProcessError):
        await trio.to_thread.run_sync(os.waitpid, pid, 0, abandon_on_cancel=True)


def _see_end(pid: int) -> None:
    """Wait for an orphan; past the deadline, end it."""
    deadline = time.monotonic() + ORPHANS_TIMEOUT_S
    with suppress(ChildProcessError):
        while os.waitpid(pid, os.WNOHANG)[0] == 0:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return
            time.sleep(POLL_S)


def _children() -> set[int]:
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        found.update(map(int, (task / "children").read_text().split()))
    return found
