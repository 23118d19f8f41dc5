"""What proc(5) tells of processes, our children among them. Everything here blocks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")


def all_pids() -> Iterator[int]:
    """Every process in our pid namespace."""
    return (int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit())


def adopted_children() -> set[int]:
    """Our children, dead ones included, but for those that our other threads started.

    The kernel gives orphans to the first thread.
    """
    path = PROC / "self" / "task" / str(os.getpid()) / "children"
    return set(map(int, path.read_text(encoding="ascii").split()))


def is_dead(pid: int) -> bool:
    """Dead, though nobody has reaped it yet. Raises `OSError` if it was."""
    stat = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    return stat.rpartition(")")[2].split()[0] in ("Z", "X")
