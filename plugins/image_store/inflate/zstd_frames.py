"""Zstandard (RFC 8878), decompressed step by step.

The library gives out all that it can make of its input, and 4 bytes can make 128 KiB of
output. So frames are walked here, and it gets one block at a time.
"""

from __future__ import annotations

from zstandard import (
    FRAME_HEADER,
    ZstdDecompressor,
    ZstdError,
    frame_header_size,
    get_frame_parameters,
)

from plugins.image_store.inflate.damage import (
    MAX_WINDOW_BYTES,
    ZSTD_CUT_SHORT,
    ZSTD_DICTIONARY,
    ZSTD_INVALID,
    ZSTD_TRAILING,
    ZSTD_WINDOW,
    StreamDamaged,
)
from plugins.image_store.inflate.stream_input import StreamInput

TYPE_CHECKING = False  # as in `worker`
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

SKIPPABLE_MAGICS = range(0x184D2A50, 0x184D2A60)  # 3.1.2
SMALLEST_HEADER_BYTES = 5  # magic and descriptor, which tells the rest
MAX_BLOCK_BYTES = 128 * 1024  # 3.1.1.2.4
RLE_BLOCK, RESERVED_BLOCK = 1, 3  # 3.1.1.2.2
CHECKSUM_BYTES = 4
SKIP_BYTES = 1 << 20


def unzstd(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The plain bytes of one or more frames; skippable ones in between are passed over.

    So zstd:chunked is plain zstd here. No piece is empty or longer than 128 KiB. `chunks`
    is read to its end; anything else that follows a frame raises `StreamDamaged`, as does
    what is no zstd, is cut short, has a wrong checksum or needs a larger window.
    """
    stream = StreamInput(chunks, cut_short=ZSTD_CUT_SHORT)
    decompressor = ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
    first = stream.exactly(1)
    not_zstd = ZSTD_INVALID
    while first:
        magic = first + stream.exactly(3)
        number = int.from_bytes(magic, "little")
        if number in SKIPPABLE_MAGICS:
            _skip(stream, int.from_bytes(stream.exactly(4), "little"))
        elif magic == FRAME_HEADER:
            yield from _frame(stream, decompressor)
        else:
            raise StreamDamaged(not_zstd, f"begins with {magic.hex()}, not {FRAME_HEADER.hex()}")
        not_zstd = ZSTD_TRAILING
        first = bytes(stream.some(1))


def _skip(stream: StreamInput, size_bytes: int) -> None:
    while size_bytes:
        size_bytes -= len(stream.some_more(min(size_bytes, SKIP_BYTES)))


def _frame(stream: StreamInput, decompressor: ZstdDecompressor) -> Iterator[bytes]:
    """A frame from behind its magic number on."""
    try:
        header = FRAME_HEADER + stream.exactly(SMALLEST_HEADER_BYTES - len(FRAME_HEADER))
        header += stream.exactly(frame_header_size(header) - len(header))
        parameters = get_frame_parameters(header)
        if parameters.window_size > MAX_WINDOW_BYTES:
            raise StreamDamaged(ZSTD_WINDOW, f"{parameters.window_size} bytes")
        if parameters.dict_id:
            raise StreamDamaged(ZSTD_DICTIONARY, f"dictionary {parameters.dict_id}")
        decoder = decompressor.decompressobj()
        decoder.decompress(header)
        is_last = False
        while not is_last:
            is_last, block = _block(stream)
            if piece := decoder.decompress(block):
                yield piece
        if parameters.has_checksum:
            decoder.decompress(stream.exactly(CHECKSUM_BYTES))
    except ZstdError as error:
        raise StreamDamaged(ZSTD_INVALID, str(error)) from error
    if not decoder.eof:
        raise StreamDamaged(ZSTD_INVALID, "its last block does not end its frame")


def _block(stream: StreamInput) -> tuple[bool, bytes]:
    """Whether it is the last one, and the block with its header (3.1.1.2)."""
    header = stream.exactly(3)
    number = int.from_bytes(header, "little")
    kind, size_bytes = number >> 1 & 3, number >> 3
    if kind == RESERVED_BLOCK or size_bytes > MAX_BLOCK_BYTES:
        raise StreamDamaged(ZSTD_INVALID, f"a block of kind {kind} and {size_bytes} bytes")
    return bool(number & 1), header + stream.exactly(1 if kind == RLE_BLOCK else size_bytes)
