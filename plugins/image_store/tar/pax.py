"""pax extended headers: `LENGTH KEY=VALUE` records (POSIX.1-2001, pax, "Extended Header")."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from plugins.image_store.tar.node import NO_XATTRS
from supervisor import FormatError

# The place in the archive, for messages; called only when something is refused.
Where = Callable[[], str]

_XATTR = b"SCHILY.xattr."
_SPARSE = b"GNU.sparse."
_OVERRIDES = frozenset({b"path", b"linkpath", b"size", b"uid", b"gid", b"mtime"})
# No header is longer than 1 MiB, so neither is a record.
_MAX_LENGTH_DIGITS = 7
_MAX_DECIMAL_DIGITS = 20
_NEWLINE = ord("\n")
_TIME = re.compile(rb"(-?)([0-9]{1,20})(?:\.([0-9]*))?")


class PaxFields:
    """What a header says about the entry after it; None where it is silent."""

    __slots__ = ("gid", "linkpath", "mtime_ns", "path", "size", "uid", "xattrs")

    def __init__(self) -> None:
        self.path: bytes | None = None
        self.linkpath: bytes | None = None
        self.size: int | None = None
        self.uid: int | None = None
        self.gid: int | None = None
        self.mtime_ns: int | None = None
        self.xattrs: Mapping[bytes, bytes] = NO_XATTRS


def parse_pax(data: bytes, *, where: Where) -> PaxFields:
    """Strict. Raises `FormatError`. Keys that change nothing here are passed over."""
    fields = PaxFields()
    xattrs: dict[bytes, bytes] = {}
    for key, value in _records(data, where):
        if key == b"mtime":
            fields.mtime_ns = _time_ns(value, where)
        elif key == b"path":
            fields.path = _name(value, where)
        elif key == b"linkpath":
            fields.linkpath = _name(value, where)
        elif key == b"size":
            fields.size = _decimal(key, value, where)
        elif key == b"uid":
            fields.uid = _decimal(key, value, where)
        elif key == b"gid":
            fields.gid = _decimal(key, value, where)
        elif key.startswith(_XATTR):
            xattrs[key[len(_XATTR) :]] = value
        elif key.startswith(_SPARSE):
            raise FormatError(where(), "sparse files are not supported", actual=ascii(key[:160]))
    if xattrs:
        fields.xattrs = xattrs
    return fields


def parse_global_pax(data: bytes, *, where: Where) -> None:
    """Refuse a global header that would change entries: some parsers apply it, some do not."""
    for key, _ in _records(data, where):
        if key in _OVERRIDES or key.startswith((_XATTR, _SPARSE)):
            raise FormatError(
                where(), "a global pax header may not change entries", actual=ascii(key[:160])
            )


def _records(data: bytes, where: Where) -> Iterator[tuple[bytes, bytes]]:
    start = 0
    while start < len(data):
        space = data.find(b" ", start, start + _MAX_LENGTH_DIGITS + 1)
        digits = data[start:space]
        # bytes.isdigit knows the ten ASCII digits alone, and b"" is none.
        if space < 0 or not digits.isdigit() or digits.startswith(b"0"):
            raise FormatError(where(), "a pax record begins with its length")
        end = start + int(digits)
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if space >= end or end > len(data) or data[end - 1] != _NEWLINE or not equals or not key:
            raise FormatError(
                where(),
                "a pax record is LENGTH KEY=VALUE and a newline",
                actual=ascii(data[space + 1 : end][:80]),
            )
        yield key, value
        start = end


# An empty value takes an earlier one back (POSIX): the plain header counts again.


def _name(value: bytes, where: Where) -> bytes | None:
    if b"\0" in value:
        raise FormatError(where(), "a name may hold no NUL", actual=ascii(value[:160]))
    return value or None


def _decimal(key: bytes, value: bytes, where: Where) -> int | None:
    if not value:
        return None
    if len(value) > _MAX_DECIMAL_DIGITS or not value.isdigit():
        raise FormatError(
            where(), f"pax {key.decode()} must be a decimal number", actual=ascii(value[:80])
        )
    return int(value)


def _time_ns(value: bytes, where: Where) -> int | None:
    if not value:
        return None
    match = _TIME.fullmatch(value)
    if match is None:
        raise FormatError(where(), "pax mtime must be seconds", actual=ascii(value[:80]))
    sign, seconds, fraction = match.groups()
    mtime_ns = int(seconds) * 1_000_000_000
    if fraction:
        mtime_ns += int(fraction[:9].ljust(9, b"0"))
        if sign and fraction[9:].strip(b"0"):
            mtime_ns += 1  # what is finer is rounded down, as GNU tar does
    return -mtime_ns if sign else mtime_ns
