"""How EROFS writes down a file system and its files (Linux, fs/erofs/erofs_fs.h).

All integers are little-endian. Only what an index needs: blocks of 512 bytes as in a tar,
one device (the tar), extended inodes. No clock and no UUID, so that one tree has one index.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from plugins.image_store.tar.node import Node

BLOCK_BITS = 9
BLOCK_BYTES = 1 << BLOCK_BITS
SUPERBLOCK_OFFSET = 1024
DEVICE_SLOT_BYTES = 128
DEVICE_OFFSET = 1152
META_BLOCK = 3  # the first after the device slot
META_OFFSET = META_BLOCK * BLOCK_BYTES
NID_BYTES = 32  # inodes are counted in units of this
INODE_BYTES = 64
CHUNK_BYTES = 8
XATTR_HEADER_BYTES = 12
MAX_CHUNK_BITS = 31
MAX_FILE_BYTES = BLOCK_BYTES << MAX_CHUNK_BITS

# How an inode's data lie (its i_format, bits 1 to 3): in blocks of the index, in the index
# right behind the inode, or in chunks of a device.
IN_BLOCKS = 0
INLINE = 2
IN_CHUNKS = 4

_MAGIC = 0xE0F5E1E2
_COMPAT_MTIME = 2
_INCOMPAT_CHUNKED_FILE = 4
_INCOMPAT_DEVICE_TABLE = 8
# magic, (checksum), compat, block bits, root nid, inodes, (epoch), blocks, meta block,
# (xattr block, uuid, volume name), incompat, (compression), devices, slot; the rest is zero.
_SUPERBLOCK = struct.Struct("<I4xIBxHQ12xII4x32xI2xHH38x")
_DEVICE_SLOT = struct.Struct("<64xI60x")
# format, xattr count, mode, zero, size, union, (ino), uid, gid, mtime, mtime_ns, nlink
_INODE = struct.Struct("<HHHxxQI4xIIqII16x")
_CHUNK_FORMAT_48_BYTE_ENTRIES = 0x20
_DEVICE_ID = 1
_CHUNK = struct.Struct("<HHI")
_XATTR_ENTRY = struct.Struct("<BBH")
_XATTR_PREFIXES = ((b"user.", 1), (b"trusted.", 4), (b"security.", 6))
_S_TO_NS = 1_000_000_000


def superblock(*, root_nid: int, inodes: int, size_bytes: int, tar_blocks: int) -> bytes:
    """What stands before the inodes, from the file's first byte on."""
    head = _SUPERBLOCK.pack(
        _MAGIC,
        _COMPAT_MTIME,
        BLOCK_BITS,
        root_nid,
        inodes,
        size_bytes // BLOCK_BYTES,
        META_BLOCK,
        _INCOMPAT_CHUNKED_FILE | _INCOMPAT_DEVICE_TABLE,
        1,
        DEVICE_OFFSET // DEVICE_SLOT_BYTES,
    )
    slot = _DEVICE_SLOT.pack(tar_blocks)
    return (bytes(SUPERBLOCK_OFFSET) + head + slot).ljust(META_OFFSET, b"\0")


def inode(
    node: Node, *, layout: int, xattrs_bytes: int, size_bytes: int, where: int, nlink: int
) -> bytes:
    """An extended inode: 64 bytes. `where`: start block, chunk format or device number."""
    seconds, nanoseconds = divmod(node.mtime_ns, _S_TO_NS)
    return _INODE.pack(
        1 | layout << 1,
        (xattrs_bytes - XATTR_HEADER_BYTES) // 4 + 1 if xattrs_bytes else 0,
        node.mode,
        size_bytes,
        where,
        node.uid,
        node.gid,
        seconds,
        nanoseconds,
        nlink,
    )


def chunk_format(size_bytes: int) -> int:
    """The `where` of a file in a single chunk, the smallest power of two that holds it."""
    return _CHUNK_FORMAT_48_BYTE_ENTRIES | max(0, (size_bytes - 1).bit_length() - BLOCK_BITS)


def chunk(data_offset: int) -> bytes:
    """The entry of the chunk that begins there in the tar."""
    return _CHUNK.pack(0, _DEVICE_ID, data_offset // BLOCK_BYTES)


def device_number(device: tuple[int, int]) -> int:
    """As the kernel keeps it (linux/kdev_t.h, new_encode_dev)."""
    major, minor = device
    return minor & 0xFF | major << 8 | (minor & ~0xFF) << 12


def xattrs_bytes(xattrs: Mapping[bytes, bytes]) -> int:
    """How many bytes `packed_xattrs` will have."""
    if not xattrs:
        return 0
    total_bytes = XATTR_HEADER_BYTES
    for name, value in xattrs.items():
        prefix, _ = _prefix_of(name)
        total_bytes += aligned(_XATTR_ENTRY.size + len(name) - len(prefix) + len(value), 4)
    return total_bytes


def packed_xattrs(xattrs: Mapping[bytes, bytes]) -> bytes:
    """What follows an inode that has attributes; nothing if there are none."""
    if not xattrs:
        return b""
    packed = bytearray(XATTR_HEADER_BYTES)
    for name, value in sorted(xattrs.items()):
        prefix, index = _prefix_of(name)
        packed += _XATTR_ENTRY.pack(len(name) - len(prefix), index, len(value))
        packed += name[len(prefix) :]
        packed += value
        packed += bytes(-len(packed) % 4)
    return bytes(packed)


def _prefix_of(name: bytes) -> tuple[bytes, int]:
    for prefix, index in _XATTR_PREFIXES:
        if name.startswith(prefix):
            return prefix, index
    raise ValueError(f"a tree holds no attribute like {name!r}")


def aligned(count: int, unit: int) -> int:
    """`count` rounded up to a multiple of `unit`."""
    return -(-count // unit) * unit
