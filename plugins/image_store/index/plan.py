"""An index that is laid out but not written: its size is known, and memory can be set aside."""

from __future__ import annotations

import stat
from collections.abc import Callable

from plugins.image_store.index.layout import Layout
from plugins.image_store.index.records import BLOCK_BYTES, MAX_FILE_BYTES
from plugins.image_store.index.writer import write_layout
from plugins.image_store.tar.tree import Tree


class IndexPlan:
    """An EROFS image with one device, the tar; made by `plan_index`. Holds on to the tree."""

    def __init__(self, layout: Layout, *, tar_blocks: int) -> None:
        self.size_bytes = layout.size_bytes
        self._layout = layout
        self._tar_blocks = tar_blocks

    def write(self, fd: int, *, between: Callable[[], None]) -> None:
        """Write `size_bytes` bytes at the beginning of the file `fd`, always the same ones.

        Blocking; `between` is called every few hundred files and may raise. Raises `OSError`.
        What was written so far is then the caller's to remove.
        """
        write_layout(self._layout, fd, tar_blocks=self._tar_blocks, between=between)


def plan_index(tree: Tree, tar_size_bytes: int) -> IndexPlan:
    """Lay out the index of a tree over the tar of `tar_size_bytes` bytes that it was read from.

    Takes time and memory in proportion to the tree. The tar may be empty, and then so is the
    tree; it need not end with a whole block, but its files' last blocks must be in it, which
    `TarReader` sees to. Raises `ValueError` for a tree that was not read from such a tar:
    the kernel would show zeros or fail where files are read.
    """
    if tar_size_bytes > MAX_FILE_BYTES:
        raise ValueError(f"a tar of {tar_size_bytes} bytes is beyond what chunks can say")
    layout = Layout(tree)
    tar_blocks = tar_size_bytes // BLOCK_BYTES
    for node in layout.nodes:
        if stat.S_ISREG(node.mode) and node.size_bytes:
            _check_inside(node.data_offset, node.size_bytes, tar_blocks)
    return IndexPlan(layout, tar_blocks=tar_blocks)


def _check_inside(data_offset: int, size_bytes: int, tar_blocks: int) -> None:
    first_block, rest_bytes = divmod(data_offset, BLOCK_BYTES)
    if rest_bytes or first_block + -(-size_bytes // BLOCK_BYTES) > tar_blocks:
        raise ValueError(f"{size_bytes} bytes at {data_offset} are no blocks of the tar")
