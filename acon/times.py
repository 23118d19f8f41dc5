"""Times as people write them on a command line, and as they read them."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from acon.errors import UsageError

_AGO = re.compile(r"([0-9]{1,9})([smhd])")
_UNIT_S = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


def parse_rfc3339(text: str, *, item: str) -> datetime:
    """An aware datetime. Raises `UsageError` for anything that leaves the instant open."""
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        at = None
    if at is None or at.tzinfo is None:
        raise UsageError(
            item,
            "must be a time with its zone (RFC 3339)",
            expected="2026-03-05T12:00:00Z",
            actual=text,
        )
    return at


def parse_since(text: str, *, item: str, now: datetime) -> datetime:
    """RFC 3339, or how long before `now`: 90s, 10m, 2h, 1d. Raises `UsageError`."""
    ago = _AGO.fullmatch(text)
    if ago is None:
        return parse_rfc3339(text, item=item)
    try:
        return now - timedelta(seconds=int(ago[1]) * _UNIT_S[ago[2]])
    except OverflowError:
        return datetime.min.replace(tzinfo=UTC)


def rfc3339(at: datetime) -> str:
    """In UTC, to the microsecond."""
    return at.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
