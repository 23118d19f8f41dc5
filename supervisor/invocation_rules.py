"""What a call of an additional entry point must be, before any runtime sees it.

ACON image spec 1.0, "Additional Entry Points": executable files in
`/lib/acon/entrypoint.d/`; only those whose names begin with an uppercase letter may be
invoked from outside, the others are the image's own.
"""

from __future__ import annotations

from supervisor.container_seams import Invocation
from supervisor.errors import FormatError, PolicyDenied

MAX_NAME_BYTES = 255
MAX_TIMEOUT_S = 86_400
MAX_CAPTURE_BYTES = 16 * 1024 * 1024
_UPPERCASE = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


def check_invocation(invocation: Invocation) -> None:
    """Raises `FormatError` for what no command could be given, `PolicyDenied` for a name that
    the outside may not ask for."""
    name = invocation.entry_point
    if not name or "/" in name or len(_word(name, "entry_point")) > MAX_NAME_BYTES:
        raise FormatError(
            "entry_point",
            "must be the name of a file",
            expected=f"1 to {MAX_NAME_BYTES} bytes without /",
            actual=repr(name[:80]),
        )
    if name[0] not in _UPPERCASE:
        raise PolicyDenied(
            name, "only entry points that begin with A to Z can be invoked from outside"
        )
    for at, argument in enumerate(invocation.arguments):
        _word(argument, f"arguments[{at}]")
    for at, setting in enumerate(invocation.environment):
        _word(setting, f"environment[{at}]")
        if setting.find("=") < 1:
            raise FormatError(f"environment[{at}]", "must be NAME=VALUE", actual=repr(setting[:80]))
    # Written so that "not a number" is refused too.
    if not 0 < invocation.timeout_s <= MAX_TIMEOUT_S:
        raise FormatError(
            "timeout_s",
            "must be positive and bounded",
            expected=f"at most {MAX_TIMEOUT_S} s",
            actual=invocation.timeout_s,
        )
    if not 0 <= invocation.capture_bytes <= MAX_CAPTURE_BYTES:
        raise FormatError(
            "capture_bytes",
            "must be bounded",
            expected=f"0 to {MAX_CAPTURE_BYTES}",
            actual=invocation.capture_bytes,
        )


def _word(text: str, item: str) -> bytes:
    """As execve(2) would be given it."""
    try:
        raw = text.encode()
    except UnicodeEncodeError as error:
        raise FormatError(item, "must be Unicode text", actual=error.reason) from error
    if b"\0" in raw:
        raise FormatError(item, "a NUL would end it early", actual=repr(text[:80]))
    return raw
