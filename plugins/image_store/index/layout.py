"""Where everything of an index will lie, known before a byte of it is written.

First all inodes, the root's before all others, then directory after directory the children
of each in the order of their names; then the blocks of those directories and symbolic links
that do not fit behind their inodes, in the order of these. The place of what is written is
thus found by counting, and a layer of 100,000 files takes few bytes for each.
"""

from __future__ import annotations

import dataclasses
import stat
from array import array
from collections.abc import Mapping

from plugins.image_store.index.directories import directory_bytes
from plugins.image_store.index.records import (
    BLOCK_BYTES,
    CHUNK_BYTES,
    INODE_BYTES,
    META_OFFSET,
    NID_BYTES,
    aligned,
    xattrs_bytes,
)
from plugins.image_store.tar.node import Node
from plugins.image_store.tar.overlay import overlay_xattrs
from plugins.image_store.tar.tree import Tree

_SELF_AND_PARENT = (b".", b"..")


@dataclasses.dataclass(slots=True)
class Directory:
    """What a directory's inode and entries need. `first`: the number of its first child.

    `number` and `parent` count inodes too. `names` are sorted, "." and ".." among them.
    `xattrs` are the node's and overlayfs' own. `nlink`: it and each subdirectory name it.
    """

    number: int
    parent: int
    names: list[bytes]
    size_bytes: int
    xattrs: Mapping[bytes, bytes]
    nlink: int
    first: int = 0


@dataclasses.dataclass(slots=True)
class Link:
    """The inode of a file with several names, and how many there are."""

    number: int
    count: int = 1


class Layout:
    """The inodes, numbered from 0. `nids` are their places, in units of 32 bytes.

    `directories` are in the order of their inodes; `links` go by the node's id().
    """

    def __init__(self, tree: Tree) -> None:
        self.nodes: list[Node] = []
        self.nids = array("Q")
        self.directories: list[Directory] = []
        self.links: dict[int, Link] = {}
        self._inodes_end = 0
        self._blocks = 0
        self._place_directory(tree.root, parent=0)
        for directory in self.directories:  # which grows by those that lie in it
            self._place_children(directory)

    @property
    def first_block_offset(self) -> int:
        """Where inodes end and blocks begin."""
        return META_OFFSET + aligned(self._inodes_end, BLOCK_BYTES)

    @property
    def size_bytes(self) -> int:
        return self.first_block_offset + self._blocks * BLOCK_BYTES

    def _place_children(self, directory: Directory) -> None:
        directory.first = len(self.nodes)
        children = self.nodes[directory.number].children
        for name in directory.names:
            node = children.get(name)
            if node is None:  # "." or ".."
                continue
            if node.names > 1:
                link = self.links.get(id(node))
                if link is not None:
                    link.count += 1
                    continue
                self.links[id(node)] = Link(len(self.nodes))
            if stat.S_ISREG(node.mode):
                self._place(node, file_head_bytes(node) + (CHUNK_BYTES if node.size_bytes else 0))
            elif stat.S_ISDIR(node.mode):
                self._place_directory(node, parent=directory.number)
            elif stat.S_ISLNK(node.mode):
                self._place_with_data(node, INODE_BYTES, len(node.target))
            else:
                self._place(node, INODE_BYTES)

    def _place_directory(self, node: Node, *, parent: int) -> None:
        names = [*node.children, *_SELF_AND_PARENT]
        names.sort()
        own = overlay_xattrs(node)
        xattrs = {**node.xattrs, **own} if own else node.xattrs
        directory = Directory(
            number=len(self.nodes),
            parent=parent,
            names=names,
            size_bytes=directory_bytes(names),
            xattrs=xattrs,
            nlink=2 + sum(stat.S_ISDIR(child.mode) for child in node.children.values()),
        )
        self.directories.append(directory)
        self._place_with_data(node, INODE_BYTES + xattrs_bytes(xattrs), directory.size_bytes)

    def _place_with_data(self, node: Node, head_bytes: int, data_bytes: int) -> None:
        if is_inline(head_bytes, data_bytes):
            self._place(node, head_bytes, data_bytes)
        else:
            self._place(node, head_bytes)
            self._blocks += -(-data_bytes // BLOCK_BYTES)

    def _place(self, node: Node, head_bytes: int, inline_bytes: int = 0) -> None:
        start = aligned(self._inodes_end, NID_BYTES)
        in_block = (start + head_bytes) % BLOCK_BYTES
        if in_block + inline_bytes > BLOCK_BYTES:
            # Move it, so that its data begin with the block, or as soon after as they can.
            start += BLOCK_BYTES - in_block + head_bytes % NID_BYTES
        self.nids.append(start // NID_BYTES)
        self.nodes.append(node)
        self._inodes_end = start + head_bytes + inline_bytes


def is_inline(head_bytes: int, data_bytes: int) -> bool:
    """Whether data lie behind their inode: then they may not cross a block, nor fill one."""
    return 0 < data_bytes < BLOCK_BYTES and head_bytes % NID_BYTES + data_bytes <= BLOCK_BYTES


def file_head_bytes(node: Node) -> int:
    """A regular file's inode and attributes, up to the entry of its chunk."""
    if not node.xattrs:
        return INODE_BYTES
    return aligned(INODE_BYTES + xattrs_bytes(node.xattrs), CHUNK_BYTES)
