"""Directories as EROFS keeps them: blocks of sorted entries, each with its names behind them."""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator, Sequence

from plugins.image_store.index.records import BLOCK_BYTES

ENTRY_BYTES = 12
# nid, where the name begins in the block, type, zero
_ENTRY = struct.Struct("<QHBx")
_TYPES = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: 2,
    stat.S_IFCHR: 3,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFLNK: 7,
}


def entry_type(mode: int) -> int:
    """EROFS' number for a file's type (stat.S_IFMT of `mode`)."""
    return _TYPES[stat.S_IFMT(mode)]


def directory_bytes(names: Sequence[bytes]) -> int:
    """The size of a directory with these names, "." and ".." among them."""
    size_bytes = ENTRY_BYTES * len(names) + sum(map(len, names))
    if size_bytes <= BLOCK_BYTES:
        return size_bytes
    blocks = list(_blocks(names))
    start, end = blocks[-1]
    last_bytes = sum(ENTRY_BYTES + len(name) for name in names[start:end])
    return (len(blocks) - 1) * BLOCK_BYTES + last_bytes


def packed_directory(names: Sequence[bytes], nids: Sequence[int], types: bytes) -> Iterator[bytes]:
    """One block after the other; all are full blocks but the last, which ends with its names.

    `names` are sorted as bytes are, which is how the kernel searches. `nids` and `types`
    belong to them one by one.
    """
    for start, end in _blocks(names):
        name_offset = ENTRY_BYTES * (end - start)
        block = []
        for position in range(start, end):
            block.append(_ENTRY.pack(nids[position], name_offset, types[position]))
            name_offset += len(names[position])
        block += names[start:end]
        packed = b"".join(block)
        yield packed if end == len(names) else packed.ljust(BLOCK_BYTES, b"\0")


def _blocks(names: Sequence[bytes]) -> Iterator[tuple[int, int]]:
    """Which names share a block: as many as fit. A name has 255 bytes at most."""
    start = used_bytes = 0
    for position, name in enumerate(names):
        entry_bytes = ENTRY_BYTES + len(name)
        if used_bytes + entry_bytes > BLOCK_BYTES:
            yield start, position
            start, used_bytes = position, 0
        used_bytes += entry_bytes
    yield start, len(names)
