"""What a process uses, as proc(5) tells it."""

from __future__ import annotations

import os
from pathlib import Path

_KB_PER_MB = 1_000_000 / 1024  # the kernel counts in units of 1,024 bytes


def resident_megabytes(pid: int) -> float:
    """1 MB is 1,000,000 bytes."""
    return _megabytes(Path(f"/proc/{pid}/status"), "VmRSS:")


def proportional_megabytes(pid: int) -> float:
    """What it shares with others counts in part only."""
    return _megabytes(Path(f"/proc/{pid}/smaps_rollup"), "Pss:")


def processor_seconds(pid: int) -> float:
    """Of all its threads, those that have ended too; in steps of the kernel's tick (10 ms)."""
    # The name, in parentheses, may have spaces in it.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    user, system = int(fields[11]), int(fields[12])
    return (user + system) / os.sysconf("SC_CLK_TCK")


def _megabytes(path: Path, key: str) -> float:
    for line in path.read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / _KB_PER_MB
    raise KeyError(f"{path}: {key}")
