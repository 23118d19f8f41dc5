"""Strict reading of tar headers: one entry after the other, refused where parsers disagree.

Understands ustar, pax (POSIX.1-2001, "pax Interchange Format"), GNU (long names and
base-256 numbers) and v7, as image builders write them. Nothing here looks at names'
meaning: `tree` does. All numbers are checked before they are used.
"""

from __future__ import annotations

import dataclasses
import re
import stat
from collections.abc import Callable, Iterator
from mmap import mmap

from plugins.image_store.pax import PaxFields, parse_global_pax, parse_pax
from supervisor import FormatError

BLOCK_BYTES = 512
# As Go's archive/tar: a longer extended header is an attack, not a name.
MAX_EXTENDED_HEADER_BYTES = 1 << 20
MAX_ID = 2**32 - 2
MAX_MTIME_S = 2**55
_ZERO_BLOCK = bytes(BLOCK_BYTES)
_OCTAL = re.compile(rb"[ \0]*([0-7]*)[ \0]*")
_REGULAR = frozenset(b"\x000" + b"7")
_KINDS = {
    ord("2"): stat.S_IFLNK,
    ord("3"): stat.S_IFCHR,
    ord("4"): stat.S_IFBLK,
    ord("5"): stat.S_IFDIR,
    ord("6"): stat.S_IFIFO,
}
_HARD_LINK = ord("1")


@dataclasses.dataclass(slots=True)
class TarEntry:
    """One file of the archive. `mode` has the file type bits (stat.S_IFMT) and 12 bits more.

    `hard_link` is the name of an earlier entry that this one is another name of, and then
    `mode` is that of a regular file and means nothing. `target` is a symbolic link's text.
    Times are nanoseconds since 1970; `data_offset` and `size_bytes` lie in the archive.
    """

    name: bytes
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size_bytes: int
    data_offset: int
    target: bytes
    hard_link: bytes | None
    device: tuple[int, int]
    xattrs: dict[bytes, bytes]


def printable(name: bytes) -> str:
    """A name from a stranger, safe to show and short."""
    return ascii(name.decode("utf-8", "backslashreplace")[:160])


class TarReader:
    """Walks an archive in memory. `between` is called before each header."""

    def __init__(
        self, archive: mmap | bytes, *, label: str, max_entries: int, between: Callable[[], None]
    ) -> None:
        self._archive = archive
        self._label = label
        self._max_entries = max_entries
        self._between = between
        self._offset = 0
        self._entry_name: bytes | None = None

    def __iter__(self) -> Iterator[TarEntry]:
        """Entries in order. Raises `FormatError` naming the offset, or the entry, and the rule."""
        pax: PaxFields | None = None
        long_name: bytes | None = None
        long_link: bytes | None = None
        headers = 0
        while (header := self._next_header()) is not None:
            self._between()
            headers += 1
            if headers > 4 * self._max_entries:
                raise self._refuse("too many headers", f"at most {4 * self._max_entries}")
            kind = header[156]
            if kind in b"xgLK":
                data = self._extended_data(header)
                if kind == ord("g"):
                    parse_global_pax(data, item=self._here())
                elif kind == ord("x"):
                    self._only_one(pax)
                    pax = parse_pax(data, item=self._here())
                elif kind == ord("L"):
                    self._only_one(long_name)
                    long_name = self._long_text(data)
                else:
                    self._only_one(long_link)
                    long_link = self._long_text(data)
                continue
            yield self._entry(header, pax or PaxFields(), long_name, long_link)
            pax = long_name = long_link = None
        if pax is not None or long_name is not None or long_link is not None:
            raise self._refuse("an extended header must be followed by its entry")

    # --- blocks -----------------------------------------------------------------------------

    def _next_header(self) -> bytes | None:
        """The next header block; None at the end of the archive. Moves past it."""
        block = self._block()
        if block is None:
            return None
        if block == _ZERO_BLOCK:
            # Two zero blocks end an archive, and some writers leave one or both away. A
            # single one in the midst ends it for some parsers only.
            following = self._block()
            if following is not None and following != _ZERO_BLOCK:
                raise self._refuse("a lone zero block may not lie between entries")
            return None
        checksum = self._number(block, 148, 8, "checksum")
        if checksum != sum(block) - sum(block[148:156]) + 8 * ord(" "):
            raise self._refuse("a header's checksum must be right")
        return block

    def _block(self) -> bytes | None:
        if self._offset == len(self._archive):
            return None
        block = self._archive[self._offset : self._offset + BLOCK_BYTES]
        if len(block) != BLOCK_BYTES:
            raise self._refuse("the archive is truncated", "whole blocks of 512 bytes")
        self._offset += BLOCK_BYTES
        return block

    def _skip_data(self, size_bytes: int) -> int:
        """Where the data begins; moves past it and its padding."""
        start = self._offset
        padded_bytes = -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES
        if padded_bytes > len(self._archive) - start:
            raise self._refuse(
                "an entry's data must lie inside the archive",
                f"{padded_bytes} bytes",
                f"{len(self._archive) - start} bytes left",
            )
        self._offset += padded_bytes
        return start

    def _extended_data(self, header: bytes) -> bytes:
        size_bytes = self._number(header, 124, 12, "size")
        if not 0 <= size_bytes <= MAX_EXTENDED_HEADER_BYTES:
            raise self._refuse(
                "an extended header is too long",
                f"at most {MAX_EXTENDED_HEADER_BYTES} bytes",
                size_bytes,
            )
        start = self._skip_data(size_bytes)
        return self._archive[start : start + size_bytes]

    def _long_text(self, data: bytes) -> bytes:
        text, _, rest = data.partition(b"\0")
        if rest.strip(b"\0"):
            raise self._refuse("a long name may hold no NUL")
        return text

    # --- entries ----------------------------------------------------------------------------

    def _entry(
        self, header: bytes, pax: PaxFields, long_name: bytes | None, long_link: bytes | None
    ) -> TarEntry:
        name = self._one_of(long_name, pax.path)
        if name is None:
            name = _text(header, 0, 100)
            prefix = _text(header, 345, 155)
            # GNU's own format (magic "ustar  ") keeps times where POSIX has the prefix.
            if prefix and header[257:263] == b"ustar\0":
                name = prefix + b"/" + name
        link = self._one_of(long_link, pax.linkpath)
        if link is None:
            link = _text(header, 157, 100)
        self._entry_name = name

        kind = header[156]
        size_bytes = self._bounded(pax.size, header, 124, 12, "size", 2**63 - 1)
        if kind in _REGULAR:
            file_type = stat.S_IFDIR if name.endswith(b"/") else stat.S_IFREG
        elif kind == _HARD_LINK:
            file_type = stat.S_IFREG
        elif kind in _KINDS:
            file_type = _KINDS[kind]
        elif kind == ord("S"):
            raise self._refuse("sparse files are not supported")
        else:
            raise self._refuse("the entry's type is not known", actual=ascii(chr(kind)))
        is_plain = file_type == stat.S_IFREG and kind != _HARD_LINK
        if size_bytes and not is_plain:
            raise self._refuse("only a file may have data", "0 bytes", f"{size_bytes} bytes")
        entry = TarEntry(
            name=name,
            mode=file_type | (self._number(header, 100, 8, "mode") & 0o7777),
            uid=self._bounded(pax.uid, header, 108, 8, "uid", MAX_ID),
            gid=self._bounded(pax.gid, header, 116, 8, "gid", MAX_ID),
            mtime_ns=self._mtime_ns(pax.mtime_ns, header),
            size_bytes=size_bytes,
            data_offset=self._skip_data(size_bytes),
            target=link if file_type == stat.S_IFLNK else b"",
            hard_link=link if kind == _HARD_LINK else None,
            device=(0, 0),
            xattrs=pax.xattrs,
        )
        if file_type in (stat.S_IFCHR, stat.S_IFBLK):
            if not header.startswith(b"ustar", 257):
                raise self._refuse("only ustar and its successors have devices")
            entry.device = (
                self._bounded(None, header, 329, 8, "device major", 2**12 - 1),
                self._bounded(None, header, 337, 8, "device minor", 2**20 - 1),
            )
        return entry

    def _one_of(self, gnu: bytes | None, pax: bytes | None) -> bytes | None:
        if gnu is not None and pax is not None:
            raise self._refuse("a name may be given by GNU's header or by pax, not by both")
        return pax if gnu is None else gnu

    def _only_one(self, earlier: object | None) -> None:
        if earlier is not None:
            raise self._refuse("an entry may have only one extended header of a kind")

    def _mtime_ns(self, pax_ns: int | None, header: bytes) -> int:
        if pax_ns is None:
            pax_ns = self._number(header, 136, 12, "mtime") * 1_000_000_000
        if abs(pax_ns) > MAX_MTIME_S * 1_000_000_000:
            raise self._refuse("mtime is out of range", actual=f"{pax_ns} ns")
        return pax_ns

    def _bounded(
        self, given: int | None, header: bytes, start: int, length: int, what: str, limit: int
    ) -> int:
        value = self._number(header, start, length, what) if given is None else given
        if not 0 <= value <= limit:
            raise self._refuse(f"{what} is out of range", f"0 to {limit}", value)
        return value

    def _number(self, header: bytes, start: int, length: int, what: str) -> int:
        """Octal digits, or GNU's base-256 two's complement if the first bit is set."""
        field = header[start : start + length]
        if field[0] & 0x80:
            # Bit 7 marks the form; bit 6 is the sign.
            value = int.from_bytes(field, "big") & ((1 << (8 * length - 1)) - 1)
            return value - (1 << (8 * length - 1)) if field[0] & 0x40 else value
        match = _OCTAL.fullmatch(field)
        if match is None:
            raise self._refuse(f"{what} must be an octal number", actual=printable(field))
        return int(match[1] or b"0", 8)

    # --- refusals ---------------------------------------------------------------------------

    def _here(self) -> str:
        where = f"{self._label}, offset {self._offset}"
        if self._entry_name is not None:
            where += f", at or after entry {printable(self._entry_name)}"
        return where

    def _refuse(
        self, rule: str, expected: object | None = None, actual: object | None = None
    ) -> FormatError:
        return FormatError(self._here(), rule, expected=expected, actual=actual)


def _text(header: bytes, start: int, length: int) -> bytes:
    return header[start : start + length].partition(b"\0")[0]
