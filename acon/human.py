"""Times, sizes, signals and states in words, for tables."""

from __future__ import annotations

from datetime import UTC, datetime

from acon.signals import signal_name
from supervisor.formats.status import ContainerStatus
from supervisor.operations import ContainerView

_UNITS_S = (("day", 86_400), ("hour", 3_600), ("minute", 60), ("second", 1))
# Clocks of two machines differ a little; what lies further ahead is shown as it is.
_AHEAD_S = 60


def ago(then: str, now: datetime) -> str:
    """`then` (RFC 3339) as "3 minutes ago"; as it is if it cannot be said that way."""
    try:
        passed_s = (now - datetime.fromisoformat(then)).total_seconds()
    except (ValueError, TypeError):
        return then
    if passed_s < -_AHEAD_S:
        return then
    for unit, length_s in _UNITS_S:
        count = int(passed_s // length_s)
        if count > 0:
            return f"{count} {unit}{'' if count == 1 else 's'} ago"
    return "now"


def utc_now() -> datetime:
    return datetime.now(UTC)


def size(size_bytes: int | None) -> str:
    """As "12 MB" (decimal); "-" for what is not known."""
    from rich.filesize import decimal

    return "-" if size_bytes is None else decimal(size_bytes, precision=0)


def state_in_words(one: ContainerView | ContainerStatus) -> str:
    """How a container is, or how it ended."""
    words = one.state
    if one.exit_code is not None:
        words = f"exited with {one.exit_code}"
    elif one.signal is not None:
        words = f"killed by {signal_name(one.signal)}"
    if isinstance(one, ContainerView) and one.out_of_memory:
        words += ", out of memory"
    return words
