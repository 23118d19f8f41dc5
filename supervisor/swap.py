"""Layers and secrets live in RAM: swap would let the host's disk see them and change them."""

from __future__ import annotations

from pathlib import Path

from supervisor.errors import ConfigError

PROC_SWAPS = Path("/proc/swaps")


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
