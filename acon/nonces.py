"""Nonces on the command line."""

from __future__ import annotations

from acon.errors import UsageError

MIN_BYTES, MAX_BYTES = 16, 64


def parse_nonce(text: str) -> bytes:
    """16 to 64 bytes from hex. Raises `UsageError`."""
    try:
        nonce = bytes.fromhex(text)
    except ValueError:
        nonce = b""
    if not MIN_BYTES <= len(nonce) <= MAX_BYTES:
        raise UsageError(
            "--nonce", f"must be {MIN_BYTES} to {MAX_BYTES} bytes in hex", actual=text[:160]
        )
    return nonce
