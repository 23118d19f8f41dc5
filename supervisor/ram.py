"""What must stay in RAM: layers, secrets, the journal and what containers are started from.

The host can read and change a disk after something on it was verified, and swap would
put RAM on one. Both are refused at the start.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from supervisor.errors import ConfigError

PROC_SWAPS = Path("/proc/swaps")
PROC_MOUNTS = Path("/proc/self/mountinfo")
RAM_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs"})


def active_swap(table: str) -> tuple[str, ...]:
    """The swap areas in the text of `/proc/swaps` (proc(5)), zram (compressed RAM) left out."""
    areas = [line.split()[0] for line in table.splitlines()[1:] if line.strip()]
    return tuple(area for area in areas if not area.startswith("/dev/zram"))


def refuse_active_swap(path: Path = PROC_SWAPS) -> None:
    """Raises `ConfigError` while swap other than zram is active, or when nobody can tell."""
    try:
        areas = active_swap(path.read_text())
    except OSError as error:
        raise ConfigError(str(path), "must be readable to rule out swap", actual=error) from error
    if areas:
        raise ConfigError(
            str(path),
            "no swap but zram may be active (swapoff, or unsafe_allow_swap)",
            expected="none",
            actual=", ".join(areas),
        )


def file_system_of(path: Path, mounts: str) -> str:
    """The type of the file system that an existing `path` lies on.

    `mounts` is the text of `/proc/self/mountinfo` (proc(5)): the last mount at the longest
    matching path counts, since later mounts hide earlier ones.
    """
    resolved = path.resolve()
    best, found = -1, "unknown"
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")
        point = Path(_unescaped(left.split()[4]))
        if resolved.is_relative_to(point) and len(point.parts) >= best:
            best, found = len(point.parts), right.split()[0]
    return found


def _unescaped(point: str) -> str:
    """proc(5) writes blanks and backslashes as octal numbers, and all other bytes as they are."""
    return os.fsdecode(
        re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), os.fsencode(point))
    )


def refuse_disk(path: Path, mounts: Path = PROC_MOUNTS) -> None:
    """Raises `ConfigError` unless `path` (which exists) lies in RAM: on tmpfs or ramfs."""
    try:
        kind = file_system_of(path, mounts.read_text())
    except (OSError, ValueError, IndexError) as error:
        raise ConfigError(
            str(mounts), "must be readable to rule out a disk", actual=error
        ) from error
    if kind not in RAM_FILE_SYSTEMS:
        raise ConfigError(
            f"$.runtime_dir: {path}",
            "must lie in RAM; mount a tmpfs there (or unsafe_allow_runtime_dir_on_disk)",
            expected=" or ".join(sorted(RAM_FILE_SYSTEMS)),
            actual=kind,
        )
