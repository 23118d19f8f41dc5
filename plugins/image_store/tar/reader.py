"""Strict reading of tar headers: one entry after the other, refused where parsers disagree.

Understands ustar, pax (POSIX.1-2001, "pax Interchange Format"), GNU (long names and
base-256 numbers) and v7, as image builders write them. Nothing here looks at names'
meaning: `tree` does. All numbers are checked before they are used.
"""

from __future__ import annotations

import re
import stat
import struct
from collections.abc import Callable, Iterator
from mmap import mmap
from typing import NoReturn
from zlib import adler32

from plugins.image_store.tar.node import NO_DEVICE, Node
from plugins.image_store.tar.pax import PaxFields, parse_global_pax, parse_pax
from supervisor import FormatError

BLOCK_BYTES = 512
# As Go's archive/tar: a longer extended header is an attack, not a name.
MAX_EXTENDED_HEADER_BYTES = 1 << 20
MAX_ID = 2**32 - 2
MAX_SIZE_BYTES = 2**63 - 1
MAX_MTIME_S = 2**55
# A header's size has eleven octal digits: only beyond may a pax header say something else.
MAX_OCTAL_SIZE_BYTES = 8**11 - 1
MAX_MAJOR = 2**12 - 1
MAX_MINOR = 2**20 - 1
# A callback at each header would cost as much as reading it.
HEADERS_BETWEEN = 256
_S_TO_NS = 1_000_000_000
_ZERO_BLOCK = bytes(BLOCK_BYTES)
_HALF_BLOCK_BYTES = BLOCK_BYTES // 2
# name, mode, uid, gid, size, mtime, checksum, type, linkname, magic, version, (uname, gname),
# devmajor, devminor, prefix
_FIELDS = struct.Struct("100s8s8s8s12s12s8sc100s6s2s64x8s8s155s12x")
_Fields = tuple[
    bytes, bytes, bytes, bytes, bytes, bytes, bytes, bytes, bytes, bytes, bytes, bytes, bytes, bytes
]
_OCTAL_DIGITS = b"01234567"
_OCTAL = re.compile(rb"[ \0]*([0-7]*)[ \0]*")
_EXTENDED = b"xgLK"
_HARD_LINK = b"1"
_TYPES = {
    b"\0": stat.S_IFREG,
    b"0": stat.S_IFREG,
    b"7": stat.S_IFREG,
    _HARD_LINK: stat.S_IFREG,
    b"2": stat.S_IFLNK,
    b"3": stat.S_IFCHR,
    b"4": stat.S_IFBLK,
    b"5": stat.S_IFDIR,
    b"6": stat.S_IFIFO,
}
_SILENT = PaxFields()


class TarEntry:
    """One entry of the archive: a name, and the file that it gives this name to.

    `hard_link` is the name of an earlier entry that this one is another name of; then `node`
    says what this entry's header says and stands for no file. Else `node` is new, and not
    judged: its name, target and attributes are as the archive has them.
    """

    __slots__ = ("hard_link", "name", "node")

    def __init__(self, name: bytes, node: Node, hard_link: bytes | None) -> None:
        self.name = name
        self.node = node
        self.hard_link = hard_link


def printable(name: bytes) -> str:
    """A name from a stranger, safe to show and short."""
    return ascii(name.decode("utf-8", "backslashreplace")[:160])


class TarReader:
    """Walks an archive in memory. `between` is called every `HEADERS_BETWEEN` headers.

    The archive is the caller's, and is not held beyond the walk.
    """

    def __init__(
        self, archive: mmap | bytes, *, label: str, max_entries: int, between: Callable[[], None]
    ) -> None:
        self._archive = archive
        self._archive_bytes = len(archive)
        self._label = label
        self._max_headers = 4 * max_entries
        self._between = between
        self._offset = 0
        self._headers = 0
        self._entry_name: bytes | None = None

    def __iter__(self) -> Iterator[TarEntry]:
        """Entries in order. Raises `FormatError` naming the offset, or the entry, and the rule."""
        pax: PaxFields | None = None
        long_name: bytes | None = None
        long_link: bytes | None = None
        while (fields := self._next_header()) is not None:
            kind = fields[7]
            if kind not in _EXTENDED:
                yield self._entry(fields, pax or _SILENT, long_name, long_link)
                pax = long_name = long_link = None
                continue
            data = self._extended_data(fields)
            if kind == b"g":
                parse_global_pax(data, where=self._here)
            elif kind == b"x":
                self._only_one(pax)
                pax = parse_pax(data, where=self._here)
            elif kind == b"L":
                self._only_one(long_name)
                long_name = self._long_text(data)
            else:
                self._only_one(long_link)
                long_link = self._long_text(data)
        if pax is not None or long_name is not None or long_link is not None:
            self._refuse("an extended header must be followed by its entry")

    # --- blocks -----------------------------------------------------------------------------

    def _next_header(self) -> _Fields | None:
        """The next header's fields; None at the end of the archive. Moves past it."""
        block = self._block()
        if block is None:
            return None
        if block == _ZERO_BLOCK:
            # Two zero blocks end an archive, and some writers leave one or both away. A
            # single one in the midst ends it for some parsers only.
            following = self._block()
            if following is not None and following != _ZERO_BLOCK:
                self._refuse("a lone zero block may not lie between entries")
            return None
        if self._headers % HEADERS_BETWEEN == 0:
            self._between()
        self._headers += 1
        if self._headers > self._max_headers:
            self._refuse("too many headers", f"at most {self._max_headers}")
        fields: _Fields = _FIELDS.unpack(block)
        self._check_sum(block, fields[6])
        return fields

    def _check_sum(self, block: bytes, field: bytes) -> None:
        """The sum of all bytes, the checksum's own counted as spaces, must be what it says."""
        # Adler-32's lower half is a sum modulo 65521, which half a block cannot reach: the
        # exact sum, many times faster than Python's.
        total = adler32(block[:_HALF_BLOCK_BYTES], 0) & 0xFFFF
        total += adler32(block[_HALF_BLOCK_BYTES:], 0) & 0xFFFF
        digits = field[:6]
        if field[6:] == b"\0 " and not digits.strip(_OCTAL_DIGITS):  # as nearly all write it
            checksum = int(digits, 8)
        else:
            checksum = self._number(field, "checksum", MAX_SIZE_BYTES)
        if checksum != total - sum(field) + 8 * ord(" "):
            self._refuse("a header's checksum must be right")

    def _block(self) -> bytes | None:
        start = self._offset
        if start == self._archive_bytes:
            return None
        self._offset = end = start + BLOCK_BYTES
        if end > self._archive_bytes:
            self._offset = start
            self._refuse("the archive is truncated", "whole blocks of 512 bytes")
        return self._archive[start:end]

    def _skip_data(self, size_bytes: int) -> int:
        """Where the data begins; moves past it and its padding."""
        start = self._offset
        padded_bytes = -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES
        if padded_bytes > self._archive_bytes - start:
            self._refuse(
                "an entry's data must lie inside the archive",
                f"{padded_bytes} bytes",
                f"{self._archive_bytes - start} bytes left",
            )
        self._offset = start + padded_bytes
        return start

    def _extended_data(self, fields: _Fields) -> bytes:
        size_bytes = self._number(fields[4], "size", MAX_SIZE_BYTES)
        if size_bytes > MAX_EXTENDED_HEADER_BYTES:
            self._refuse(
                "an extended header is too long",
                f"at most {MAX_EXTENDED_HEADER_BYTES} bytes",
                size_bytes,
            )
        start = self._skip_data(size_bytes)
        return self._archive[start : start + size_bytes]

    def _long_text(self, data: bytes) -> bytes:
        text, _, rest = data.partition(b"\0")
        if rest.strip(b"\0"):
            self._refuse("a long name may hold no NUL")
        return text

    # --- entries ----------------------------------------------------------------------------

    def _entry(
        self, fields: _Fields, pax: PaxFields, long_name: bytes | None, long_link: bytes | None
    ) -> TarEntry:
        # fmt: off
        (name, mode_field, uid_field, gid_field, size_field, mtime_field, _, kind, link,
         magic, _, major_field, minor_field, prefix) = fields
        # fmt: on
        given = self._one_of(long_name, pax.path)
        if given is not None:
            name = given
        else:
            name = name.partition(b"\0")[0]
            # GNU's own format (magic "ustar  ") keeps times where POSIX has the prefix.
            if prefix[0] and magic == b"ustar\0":
                name = prefix.partition(b"\0")[0] + b"/" + name
        self._entry_name = name

        file_type = _TYPES.get(kind)
        if file_type is None:
            if kind == b"S":
                self._refuse("sparse files are not supported")
            self._refuse("the entry's type is not known", actual=ascii(kind))
        mode = file_type | (self._number(mode_field, "mode", MAX_SIZE_BYTES) & 0o7777)
        is_file = file_type == stat.S_IFREG and kind != _HARD_LINK
        if is_file and name.endswith(b"/"):
            is_file = False
            file_type = stat.S_IFDIR
            mode = mode & 0o7777 | stat.S_IFDIR
        size_bytes = self._number(size_field, "size", MAX_SIZE_BYTES)
        if pax.size is not None and pax.size != size_bytes:
            size_bytes = self._size_beyond(size_bytes, pax.size)
        if size_bytes and not is_file:
            self._refuse("only a file may have data", "0 bytes", f"{size_bytes} bytes")
        uid = self._number(uid_field, "uid", MAX_ID) if pax.uid is None else pax.uid
        gid = self._number(gid_field, "gid", MAX_ID) if pax.gid is None else pax.gid
        if uid > MAX_ID or gid > MAX_ID:  # in the pax header
            self._refuse(f"{'uid' if uid > MAX_ID else 'gid'} is out of range", f"0 to {MAX_ID}")
        if pax.mtime_ns is None:
            mtime_ns = self._number(mtime_field, "mtime", MAX_MTIME_S, -MAX_MTIME_S) * _S_TO_NS
        else:
            mtime_ns = pax.mtime_ns
            if abs(mtime_ns) > MAX_MTIME_S * _S_TO_NS:
                self._refuse("mtime is out of range", actual=f"{mtime_ns} ns")
        data_offset = self._skip_data(size_bytes) if size_bytes else 0
        target = b""
        hard_link: bytes | None = None
        device = NO_DEVICE
        if not is_file and file_type != stat.S_IFDIR:
            given = self._one_of(long_link, pax.linkpath)
            link = link.partition(b"\0")[0] if given is None else given
            if kind == _HARD_LINK:
                hard_link = link
            elif file_type == stat.S_IFLNK:
                target = link
            elif file_type != stat.S_IFIFO:
                device = self._device(magic, major_field, minor_field)
        node = Node(mode, uid, gid, mtime_ns, size_bytes, data_offset, target, device, pax.xattrs)
        return TarEntry(name, node, hard_link)

    def _size_beyond(self, header_bytes: int, pax_bytes: int) -> int:
        """The pax header's size where it differs from the header's, as only large ones may."""
        if pax_bytes <= MAX_OCTAL_SIZE_BYTES:
            # The next header is elsewhere for a parser that knows nothing of pax.
            self._refuse(
                "a pax size must agree with a header that can say it",
                f"{header_bytes} bytes",
                f"{pax_bytes} bytes",
            )
        if pax_bytes > MAX_SIZE_BYTES:
            self._refuse("size is out of range", f"0 to {MAX_SIZE_BYTES}", pax_bytes)
        return pax_bytes

    def _device(self, magic: bytes, major_field: bytes, minor_field: bytes) -> tuple[int, int]:
        if not magic.startswith(b"ustar"):
            self._refuse("only ustar and its successors have devices")
        return (
            self._number(major_field, "device major", MAX_MAJOR),
            self._number(minor_field, "device minor", MAX_MINOR),
        )

    def _one_of(self, gnu: bytes | None, pax: bytes | None) -> bytes | None:
        if gnu is None:
            return pax
        if pax is not None:
            self._refuse("a name may be given by GNU's header or by pax, not by both")
        return gnu

    def _only_one(self, earlier: object | None) -> None:
        if earlier is not None:
            self._refuse("an entry may have only one extended header of a kind")

    # --- numbers ----------------------------------------------------------------------------

    def _number(self, field: bytes, what: str, limit: int, least: int = 0) -> int:
        """Octal digits, or GNU's base-256 two's complement if the first bit is set."""
        digits = field[:-1]
        if not digits.strip(_OCTAL_DIGITS) and field[-1] in b"\0 ":
            value = int(digits, 8)
        elif field[0] & 0x80:
            # Bit 7 marks the form; bit 6 is the sign.
            bits = 8 * len(field) - 1
            value = int.from_bytes(field, "big") & ((1 << bits) - 1)
            if field[0] & 0x40:
                value -= 1 << bits
        else:
            match = _OCTAL.fullmatch(field)
            if match is None:
                self._refuse(f"{what} must be an octal number", actual=printable(field))
            value = int(match[1] or b"0", 8)
        if not least <= value <= limit:
            self._refuse(f"{what} is out of range", f"{least} to {limit}", value)
        return value

    # --- refusals ---------------------------------------------------------------------------

    def _here(self) -> str:
        where = f"{self._label}, offset {self._offset}"
        if self._entry_name is not None:
            where += f", at or after entry {printable(self._entry_name)}"
        return where

    def _refuse(
        self, rule: str, expected: object | None = None, actual: object | None = None
    ) -> NoReturn:
        raise FormatError(self._here(), rule, expected=expected, actual=actual)
