"""gzip (RFC 1952), decompressed step by step.

ISA-L inflates more than twice as fast as zlib. It reads optional header fields wrongly
when they are split between two inputs, so headers are read here; it checks the trailers.
"""

from __future__ import annotations

import zlib

from isal.igzip_lib import DECOMP_GZIP_NO_HDR_VER, IgzipDecompressor, IsalError

from plugins.image_store.inflate.damage import (
    GZIP_CUT_SHORT,
    GZIP_INVALID,
    GZIP_TRAILING,
    StreamDamaged,
)
from plugins.image_store.inflate.stream_input import StreamInput

TYPE_CHECKING = False  # as in `worker`
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# One step's output fits a core's second-level cache; one step's input is what a member
# that ends in it makes the decoder copy, so that many small members stay cheap.
STEP_BYTES = 256 * 1024
INPUT_BYTES = 64 * 1024

# RFC 1952, 2.3: magic, then the one method there is (deflate).
MAGIC = b"\x1f\x8b"
DEFLATE = 8
FIXED_BYTES = 10
FLAG_HEADER_CRC, FLAG_EXTRA, FLAG_NAME, FLAG_COMMENT = 0x02, 0x04, 0x08, 0x10
RESERVED_FLAGS = 0xE0
# Names and comments have no limit of their own; nobody needs longer ones.
MAX_TEXT_BYTES = 64 * 1024


def gunzip(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The plain bytes of one or more concatenated members (RFC 1952, 2.2).

    No piece is empty or longer than `STEP_BYTES`. `chunks` is read to its end: whatever
    follows the last member, even zeros, raises `StreamDamaged`, as does anything that is
    no gzip, is cut short or has a wrong checksum.
    """
    stream = StreamInput(chunks, cut_short=GZIP_CUT_SHORT)
    _Header(stream).skip(stream.exactly(1), not_gzip=GZIP_INVALID)
    yield from _member(stream)
    while following := stream.some(1):
        _Header(stream).skip(bytes(following), not_gzip=GZIP_TRAILING)
        yield from _member(stream)


def _member(stream: StreamInput) -> Iterator[bytes]:
    """A member from behind its header to behind its trailer, whose CRC and size are checked."""
    decoder = IgzipDecompressor(DECOMP_GZIP_NO_HDR_VER)
    while not decoder.eof:
        taken = stream.some_more(INPUT_BYTES) if decoder.needs_input else memoryview(b"")
        try:
            piece = decoder.decompress(taken, STEP_BYTES)
        except IsalError as error:  # type: ignore[misc]  # the library's stub calls it a value
            raise StreamDamaged(GZIP_INVALID, str(error)) from error
        if piece:
            yield piece
    stream.give_back(decoder.unused_data)


class _Header:
    """One member's header, and the CRC over its bytes."""

    def __init__(self, stream: StreamInput) -> None:
        self._stream = stream
        self._crc = 0

    def skip(self, first: bytes, *, not_gzip: str) -> None:
        """Read it to its end; its first byte was taken already."""
        magic = first + self._stream.exactly(1)
        if magic != MAGIC:
            raise StreamDamaged(not_gzip, f"begins with {magic.hex()}, not {MAGIC.hex()}")
        self._crc = zlib.crc32(magic)
        method, flags = self._take(FIXED_BYTES - len(MAGIC))[:2]
        if method != DEFLATE or flags & RESERVED_FLAGS:
            raise StreamDamaged(GZIP_INVALID, f"unknown method {method} or flags {flags:#x}")
        if flags & FLAG_EXTRA:
            self._take(int.from_bytes(self._take(2), "little"))
        for flag in (FLAG_NAME, FLAG_COMMENT):
            if flags & flag:
                self._skip_text()
        if flags & FLAG_HEADER_CRC:
            wanted = self._crc & 0xFFFF
            found = int.from_bytes(self._stream.exactly(2), "little")
            if found != wanted:
                raise StreamDamaged(GZIP_INVALID, f"header CRC {found:#06x}, not {wanted:#06x}")

    def _take(self, size_bytes: int) -> bytes:
        taken = self._stream.exactly(size_bytes)
        self._crc = zlib.crc32(taken, self._crc)
        return taken

    def _skip_text(self) -> None:
        for _ in range(MAX_TEXT_BYTES):
            if self._take(1) == b"\0":
                return
        raise StreamDamaged(GZIP_INVALID, f"a name or comment beyond {MAX_TEXT_BYTES} bytes")
