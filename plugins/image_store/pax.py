"""pax extended headers: `LENGTH KEY=VALUE` records (POSIX.1-2001, pax, "Extended Header")."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from supervisor import FormatError

_XATTR = b"SCHILY.xattr."
_SPARSE = b"GNU.sparse."
_OVERRIDES = frozenset({b"path", b"linkpath", b"size", b"uid", b"gid", b"mtime"})
_LENGTH = re.compile(rb"([1-9][0-9]{0,8}) ")
_DECIMAL = re.compile(rb"[0-9]{1,20}")
_TIME = re.compile(rb"(-?)([0-9]{1,20})(?:\.([0-9]*))?")


@dataclasses.dataclass(slots=True)
class PaxFields:
    """What a header says about the entry after it; None where it is silent."""

    path: bytes | None = None
    linkpath: bytes | None = None
    size: int | None = None
    uid: int | None = None
    gid: int | None = None
    mtime_ns: int | None = None
    xattrs: dict[bytes, bytes] = dataclasses.field(default_factory=dict)


def parse_pax(data: bytes, *, item: str) -> PaxFields:
    """Strict. Raises `FormatError`. Keys that change nothing here are passed over."""
    fields = PaxFields()
    for key, value in _records(data, item):
        if key.startswith(_SPARSE):
            raise FormatError(item, "sparse files are not supported", actual=ascii(key))
        if key.startswith(_XATTR):
            fields.xattrs[key[len(_XATTR) :]] = value
        elif key == b"path":
            fields.path = _name(value, item)
        elif key == b"linkpath":
            fields.linkpath = _name(value, item)
        elif key == b"size":
            fields.size = _decimal(key, value, item)
        elif key == b"uid":
            fields.uid = _decimal(key, value, item)
        elif key == b"gid":
            fields.gid = _decimal(key, value, item)
        elif key == b"mtime":
            fields.mtime_ns = _time_ns(value, item)
    return fields


def parse_global_pax(data: bytes, *, item: str) -> None:
    """Refuse a global header that would change entries: some parsers apply it, some do not."""
    for key, _ in _records(data, item):
        if key in _OVERRIDES or key.startswith((_XATTR, _SPARSE)):
            raise FormatError(item, "a global pax header may not change entries", actual=ascii(key))


def _records(data: bytes, item: str) -> Iterator[tuple[bytes, bytes]]:
    offset = 0
    while offset < len(data):
        match = _LENGTH.match(data, offset)
        if match is None:
            raise FormatError(item, "a pax record begins with its length")
        end = offset + int(match[1])
        record = data[match.end() : end]
        key, equals, value = record.partition(b"=")
        if end > len(data) or not record.endswith(b"\n") or not equals or not key:
            raise FormatError(
                item, "a pax record is LENGTH KEY=VALUE and a newline", actual=ascii(record[:80])
            )
        yield key, value[:-1]
        offset = end


# An empty value takes an earlier one back (POSIX): the plain header counts again.


def _name(value: bytes, item: str) -> bytes | None:
    if b"\0" in value:
        raise FormatError(item, "a name may hold no NUL", actual=ascii(value[:160]))
    return value or None


def _decimal(key: bytes, value: bytes, item: str) -> int | None:
    if not value:
        return None
    if _DECIMAL.fullmatch(value) is None:
        raise FormatError(
            item, f"pax {key.decode()} must be a decimal number", actual=ascii(value[:80])
        )
    return int(value)


def _time_ns(value: bytes, item: str) -> int | None:
    if not value:
        return None
    match = _TIME.fullmatch(value)
    if match is None:
        raise FormatError(item, "pax mtime must be seconds", actual=ascii(value[:80]))
    fraction = (match[3] or b"")[:9].ljust(9, b"0")
    mtime_ns = int(match[2]) * 1_000_000_000 + int(fraction)
    return -mtime_ns if match[1] else mtime_ns
