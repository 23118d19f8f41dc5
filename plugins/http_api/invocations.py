"""What a client may ask of an additional entry point, and how far its answer goes.

The bounds are those of one `execve(2)`: a string of 128 KiB, and no more of them together
than fits beside them on a stack of the usual size.
"""

from __future__ import annotations

from collections.abc import Sequence

from supervisor import FormatError, Invocation

MAX_TIMEOUT_S = 3600
MAX_CAPTURE_BYTES = 1 << 20
MAX_STRINGS = 1024
MAX_STRING_BYTES = 128 * 1024 - 1
MAX_STRINGS_BYTES = 1 << 20


def invocation(
    entry_point: str,
    *,
    arguments: Sequence[str],
    environment: Sequence[str],
    stdin: bytes,
    timeout_s: int,
    capture_bytes: int,
) -> Invocation:
    """Checked for its bounds. Raises `FormatError`; which names exist is the supervisor's."""
    _check_range("timeout", timeout_s, 1, MAX_TIMEOUT_S, "s")
    _check_range("capture size", capture_bytes, 0, MAX_CAPTURE_BYTES, "bytes")
    total_bytes = _checked_bytes("arguments", arguments) + _checked_bytes(
        "environment", environment
    )
    if total_bytes > MAX_STRINGS_BYTES:
        raise FormatError(
            "arguments and environment",
            "are bounded together",
            expected=f"at most {MAX_STRINGS_BYTES} bytes",
            actual=total_bytes,
        )
    for setting in environment:
        if setting.find("=") < 1:
            raise FormatError(
                "environment", "must be settings", expected="NAME=VALUE", actual=setting[:160]
            )
    return Invocation(
        entry_point=entry_point,
        arguments=tuple(arguments),
        environment=tuple(environment),
        stdin=stdin,
        timeout_s=timeout_s,
        capture_bytes=capture_bytes,
    )


def restart_timeout_s(timeout_s: int) -> int:
    """How long a restart waits for the old program. Raises `FormatError`."""
    return _check_range("timeout", timeout_s, 1, MAX_TIMEOUT_S, "s")


def _check_range(item: str, value: int, minimum: int, maximum: int, unit: str) -> int:
    if not minimum <= value <= maximum:
        raise FormatError(
            item, "is bounded", expected=f"{minimum} to {maximum} {unit}", actual=value
        )
    return value


def _checked_bytes(item: str, strings: Sequence[str]) -> int:
    """Their size, with the NUL that ends each."""
    if len(strings) > MAX_STRINGS:
        raise FormatError(item, "are few", expected=f"at most {MAX_STRINGS}", actual=len(strings))
    sizes = [len(string.encode()) for string in strings]
    if max(sizes, default=0) > MAX_STRING_BYTES:
        raise FormatError(
            item,
            "each is bounded",
            expected=f"at most {MAX_STRING_BYTES} bytes",
            actual=max(sizes),
        )
    if any("\0" in string for string in strings):
        raise FormatError(item, "must hold no NUL")
    return sum(sizes) + len(sizes)
