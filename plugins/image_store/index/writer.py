"""Writes an index out, front to back, as its layout says."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping

from plugins.image_store.index.directories import entry_type, packed_directory
from plugins.image_store.index.layout import Directory, Layout, file_head_bytes, is_inline
from plugins.image_store.index.records import (
    BLOCK_BYTES,
    IN_BLOCKS,
    IN_CHUNKS,
    INLINE,
    INODE_BYTES,
    META_OFFSET,
    NID_BYTES,
    chunk,
    chunk_format,
    device_number,
    inode,
    packed_xattrs,
    superblock,
    xattrs_bytes,
)
from plugins.image_store.tar.node import NO_XATTRS, Node

# What is gathered before it is written.
WRITE_BYTES = 256 * 1024
# A callback at each inode would cost as much as packing it.
INODES_BETWEEN = 256


def write_layout(layout: Layout, fd: int, *, tar_blocks: int, between: Callable[[], None]) -> None:
    """Write `layout.size_bytes` bytes at the beginning of `fd`, a file; its position stays.

    Blocking; `between` is called every `INODES_BETWEEN` inodes and each `WRITE_BYTES`, and
    may raise. Raises `OSError`. What was written so far is then the caller's to remove.
    """
    _Writer(layout, fd, between).write(tar_blocks)


class _Writer:
    def __init__(self, layout: Layout, fd: int, between: Callable[[], None]) -> None:
        self._layout = layout
        self._fd = fd
        self._between = between
        self._written_bytes = 0
        self._buffer = bytearray()
        # The next free block of those behind the inodes.
        self._block = layout.first_block_offset // BLOCK_BYTES

    def write(self, tar_blocks: int) -> None:
        layout = self._layout
        self._buffer += superblock(
            root_nid=layout.nids[0],
            inodes=len(layout.nodes),
            size_bytes=layout.size_bytes,
            tar_blocks=tar_blocks,
        )
        directories = iter(layout.directories)
        for number, node in enumerate(layout.nodes):
            if number % INODES_BETWEEN == 0:
                self._between()
            self._pad_to(META_OFFSET + layout.nids[number] * NID_BYTES)
            if stat.S_ISDIR(node.mode):
                self._add_directory(node, next(directories))
            else:
                self._add(node)
            if len(self._buffer) >= WRITE_BYTES:
                self._flush()
        self._pad_to(layout.first_block_offset)
        for block in self._blocks():
            self._buffer += block
            self._pad_to(-(-self._offset // BLOCK_BYTES) * BLOCK_BYTES)
            if len(self._buffer) >= WRITE_BYTES:
                self._flush()
        self._flush()

    # --- inodes -------------------------------------------------------------------------------

    def _add(self, node: Node) -> None:
        link = self._layout.links.get(id(node)) if node.names > 1 else None
        nlink = link.count if link is not None else 1
        if stat.S_ISLNK(node.mode):
            self._add_with_data(node, NO_XATTRS, len(node.target), nlink)
            if is_inline(INODE_BYTES, len(node.target)):
                self._buffer += node.target
        elif stat.S_ISREG(node.mode) and node.size_bytes:
            xattrs_size_bytes = xattrs_bytes(node.xattrs)
            self._buffer += inode(
                node,
                layout=IN_CHUNKS,
                xattrs_bytes=xattrs_size_bytes,
                size_bytes=node.size_bytes,
                where=chunk_format(node.size_bytes),
                nlink=nlink,
            )
            if xattrs_size_bytes:
                self._buffer += packed_xattrs(node.xattrs)
                self._buffer += bytes(file_head_bytes(node) - INODE_BYTES - xattrs_size_bytes)
            self._buffer += chunk(node.data_offset)
        else:
            self._buffer += inode(
                node,
                layout=IN_BLOCKS,
                xattrs_bytes=xattrs_bytes(node.xattrs),
                size_bytes=0,
                where=device_number(node.device),
                nlink=nlink,
            )
            self._buffer += packed_xattrs(node.xattrs)

    def _add_directory(self, node: Node, directory: Directory) -> None:
        self._add_with_data(node, directory.xattrs, directory.size_bytes, directory.nlink)
        if is_inline(INODE_BYTES + xattrs_bytes(directory.xattrs), directory.size_bytes):
            for piece in self._packed(node, directory):
                self._buffer += piece

    def _add_with_data(
        self, node: Node, xattrs: Mapping[bytes, bytes], size_bytes: int, nlink: int
    ) -> None:
        """The inode of what lies behind it, or in the next free blocks."""
        xattrs_size_bytes = xattrs_bytes(xattrs)
        layout, where = INLINE, 0
        if not is_inline(INODE_BYTES + xattrs_size_bytes, size_bytes):
            layout, where = IN_BLOCKS, self._block
            self._block += -(-size_bytes // BLOCK_BYTES)
        self._buffer += inode(
            node,
            layout=layout,
            xattrs_bytes=xattrs_size_bytes,
            size_bytes=size_bytes,
            where=where,
            nlink=nlink,
        )
        self._buffer += packed_xattrs(xattrs)

    # --- directories and blocks ---------------------------------------------------------------

    def _blocks(self) -> Iterator[bytes]:
        """What does not fit behind its inode, in the inodes' order; each begins a block."""
        directories = iter(self._layout.directories)
        for node in self._layout.nodes:
            if stat.S_ISDIR(node.mode):
                directory = next(directories)
                head_bytes = INODE_BYTES + xattrs_bytes(directory.xattrs)
                if not is_inline(head_bytes, directory.size_bytes):
                    yield from self._packed(node, directory)
            elif stat.S_ISLNK(node.mode) and not is_inline(INODE_BYTES, len(node.target)):
                yield node.target

    def _packed(self, node: Node, directory: Directory) -> Iterator[bytes]:
        layout = self._layout
        nids: list[int] = []
        types = bytearray()
        number = directory.first
        for name in directory.names:
            child = node.children.get(name)
            if child is None:
                own = directory.number if name == b"." else directory.parent
                nids.append(layout.nids[own])
                types.append(entry_type(stat.S_IFDIR))
                continue
            link = layout.links.get(id(child)) if child.names > 1 else None
            nids.append(layout.nids[number if link is None else link.number])
            if link is None or link.number == number:
                number += 1
            types.append(entry_type(child.mode))
        return packed_directory(directory.names, nids, bytes(types))

    # --- output -------------------------------------------------------------------------------

    @property
    def _offset(self) -> int:
        return self._written_bytes + len(self._buffer)

    def _pad_to(self, offset: int) -> None:
        self._buffer += bytes(offset - self._offset)

    def _flush(self) -> None:
        with memoryview(self._buffer) as view:
            sent_bytes = 0
            while sent_bytes < len(view):
                self._between()
                sent_bytes += os.pwrite(
                    self._fd, view[sent_bytes:], self._written_bytes + sent_bytes
                )
        self._written_bytes += len(self._buffer)
        self._buffer.clear()
