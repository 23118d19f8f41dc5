"""Times as people write them on a command line."""

from __future__ import annotations

from datetime import datetime

from acon.errors import UsageError


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
