"""What a gate answers."""

from __future__ import annotations

import msgspec


class Allow(msgspec.Struct, frozen=True):
    """No objection."""


class Deny(msgspec.Struct, frozen=True):
    """An objection; `reason` reaches the caller."""

    reason: str
