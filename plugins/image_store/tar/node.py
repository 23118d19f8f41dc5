"""One file of a layer, as its tar describes it."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from types import MappingProxyType
from typing import cast

NO_DEVICE = (0, 0)
# Shared by all nodes that have none, since a layer may have hundreds of thousands. What is
# written into them by mistake raises TypeError.
NO_XATTRS: Mapping[bytes, bytes] = MappingProxyType({})
_NO_CHILDREN = cast("dict[bytes, Node]", MappingProxyType({}))


class Node:
    """A file. Several names may lead to one node (hard links); directories have one.

    `mode` has the type bits (stat.S_IFMT) and twelve bits more. A regular file's bytes are
    `size_bytes` at `data_offset` of the tar, a multiple of 512; `target` is a symbolic
    link's text, `device` a device's major and minor number. Times are nanoseconds since
    1970. `children` are a directory's entries by name, and can be added to. `names`: how
    many names lead here, never too few. `implied`: a directory that no entry describes, only
    names below it. `opaque`: nothing of lower layers shows through.
    """

    __slots__ = (
        "children",
        "data_offset",
        "device",
        "gid",
        "implied",
        "mode",
        "mtime_ns",
        "names",
        "opaque",
        "size_bytes",
        "target",
        "uid",
        "xattrs",
    )

    def __init__(
        self,
        mode: int,
        uid: int = 0,
        gid: int = 0,
        mtime_ns: int = 0,
        size_bytes: int = 0,
        data_offset: int = 0,
        target: bytes = b"",
        device: tuple[int, int] = NO_DEVICE,
        xattrs: Mapping[bytes, bytes] = NO_XATTRS,
        *,
        implied: bool = False,
    ) -> None:
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self.mtime_ns = mtime_ns
        self.size_bytes = size_bytes
        self.data_offset = data_offset
        self.target = target
        self.device = device
        self.xattrs = xattrs
        self.children: dict[bytes, Node] = {} if stat.S_ISDIR(mode) else _NO_CHILDREN
        self.names = 1
        self.implied = implied
        self.opaque = False

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_whiteout(self) -> bool:
        """A character device 0/0: overlayfs hides what lower layers have of this name."""
        return stat.S_ISCHR(self.mode) and self.device == NO_DEVICE


def implied_directory() -> Node:
    return Node(stat.S_IFDIR | 0o755, implied=True)


def whiteout() -> Node:
    return Node(stat.S_IFCHR)
