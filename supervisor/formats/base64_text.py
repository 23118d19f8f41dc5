"""Bytes as standard base64 in JSON: one form for one value."""

from __future__ import annotations

import base64
import binascii

from supervisor.formats.errors import FormatError


def to_base64(raw: bytes) -> str:
    """Standard base64 with padding."""
    return base64.b64encode(raw).decode()


def from_base64(text: str, *, item: str) -> bytes:
    """Strict inverse of `to_base64`: its alphabet, its padding, nothing else."""
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FormatError(item, "standard base64 with padding", actual=str(error)) from None
    if to_base64(raw) != text:
        raise FormatError(item, "standard base64 has one form for one value")
    return raw
