"""How overlayfs is told what a directory of a layer hides (Linux, filesystems/overlayfs.rst)."""

from __future__ import annotations

from plugins.image_store.tar.node import Node

# A directory of lower layers that has whiteouts must be marked as one that may be merged,
# or readdir(3) shows the whiteouts where no other layer has it.
OVERLAY_ORIGIN = b"trusted.overlay.origin"
OVERLAY_OPAQUE = b"trusted.overlay.opaque"


def overlay_xattrs(directory: Node) -> dict[bytes, bytes]:
    """The attributes that a directory needs beside its own; of a layer's tar they never come."""
    xattrs: dict[bytes, bytes] = {}
    if directory.opaque:
        xattrs[OVERLAY_OPAQUE] = b"y"
    if any(child.is_whiteout for child in directory.children.values()):
        xattrs[OVERLAY_ORIGIN] = b""
    return xattrs
