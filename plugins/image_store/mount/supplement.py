"""The small layer on top of a container's own: what its layers lack or only imply.

A read-only root needs mount points that images often lack (/proc, /dev, ...). And a
layer whose tar has `tmp/x` but no `tmp/` says nothing about /tmp, though overlayfs
would show its invented directory instead of the lower layer's 1777 one. Both are
mended by directories in a layer above all others: overlayfs merges them with what
lies below and shows their metadata.
"""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Callable, Sequence

from plugins.image_store.mount.unpack import joined, open_directory
from plugins.image_store.tar.node import Node
from plugins.image_store.tar.tree import INODE_BYTES, XATTR_BYTES, Tree
from supervisor import Untrusted

# What the OCI runtime mounts on (OCI runtime spec, config-linux.md, "Default Filesystems"),
# and /shared, which containers have in common.
MOUNT_POINTS = {
    b"dev": 0o755,
    b"proc": 0o555,
    b"run": 0o755,
    b"shared": 0o755,
    b"sys": 0o555,
    b"tmp": 0o1777,
}


# What one `Hints`, its table and its name take of this process's memory, at most.
HINT_BYTES = 1024


@dataclasses.dataclass(slots=True, eq=False)
class Hints:
    """Of one layer's directories, those that are implied or opaque, and the way to them."""

    implied: bool
    opaque: bool
    children: dict[bytes, Hints] = dataclasses.field(default_factory=dict)


def hints_of(tree: Tree) -> Hints:
    """What must be remembered of a tree once it is unpacked."""
    root = Hints(tree.root.implied, tree.root.opaque)
    found: list[tuple[Hints, bytes, Hints]] = []
    waiting = [(tree.root, root)]
    while waiting:
        node, hints = waiting.pop()
        for name, child in node.children.items():
            if child.is_directory:
                child_hints = Hints(child.implied, child.opaque)
                found.append((hints, name, child_hints))
                waiting.append((child, child_hints))
    # Children come after their parents in the list, so each is complete when it is judged.
    for parent, name, hints in reversed(found):
        if hints.implied or hints.opaque or hints.children:
            parent.children[name] = hints
    return root


def hints_bytes(hints: Hints) -> int:
    """What they take for as long as the layer is kept, from above; none for the root alone."""
    count = 0
    waiting = [hints]
    while waiting:
        children = waiting.pop().children
        count += len(children)
        waiting.extend(children.values())
    return count * HINT_BYTES


@dataclasses.dataclass(frozen=True, slots=True)
class LayerView:
    """One layer's unpacked tree. `root_fd` is borrowed."""

    root_fd: int
    hints: Hints


# The layers that have one directory, highest first, each with its hints where there are any.
_Merged = list[tuple[LayerView, Hints | None]]


def supplement(
    layers: Sequence[LayerView], *, item: str, max_entries: int, between: Callable[[], None]
) -> Tree:
    """The tree to lay on top of `layers` (highest first), and what it takes on tmpfs. Blocking.

    The root and mount points are not counted: every supplement has these.
    Raises `Untrusted` when it would have more than `max_entries` directories, `OSError`
    when a layer cannot be read.
    """
    merged: _Merged = []
    for layer in layers:
        merged.append((layer, layer.hints))
        if layer.hints.opaque:
            break
    root = _seen(merged, b"")
    count = len(MOUNT_POINTS) + 1
    memory_bytes = 0
    waiting: list[tuple[bytes, bytes, _Merged, Node]] = [(b"", b"", merged, root)]
    while waiting:
        parent_path, own_name, merged, node = waiting.pop()
        path = joined(parent_path, own_name)
        names = {name for _, hints in merged if hints is not None for name in hints.children}
        for name in sorted(names):
            between()
            below = _below(merged, joined(path, name), name)
            if not below:
                continue
            count += 1
            if count > max_entries:
                raise Untrusted(
                    item,
                    "the layers imply too many directories (max_entries)",
                    expected=f"at most {max_entries}",
                )
            child = node.children[name] = _seen(below, joined(path, name))
            memory_bytes += INODE_BYTES + len(name)
            for key, value in child.xattrs.items():
                memory_bytes += len(key) + len(value) + XATTR_BYTES
            waiting.append((path, name, below, child))
        if node is root:
            _add_mount_points(root, merged)
    return Tree(root, memory_bytes)


def _add_mount_points(root: Node, merged: _Merged) -> None:
    for name, mode in MOUNT_POINTS.items():
        if name not in root.children and not _is_visible(merged, name):
            root.children[name] = Node(stat.S_IFDIR | mode)


def _status(layer: LayerView, path: bytes) -> os.stat_result | None:
    # Every parent was found to be a directory in this layer, so no link is followed.
    try:
        return os.stat(path, dir_fd=layer.root_fd, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _below(merged: _Merged, path: bytes, name: bytes) -> _Merged:
    """The layers that make up the directory `path`; none if it is not to be seen as one."""
    found: _Merged = []
    for layer, hints in merged:
        status = _status(layer, path)
        if status is None:
            continue
        if not stat.S_ISDIR(status.st_mode):
            break
        own = hints.children.get(name) if hints is not None else None
        found.append((layer, own))
        if own is not None and own.opaque:
            break
    return found


def _is_visible(merged: _Merged, path: bytes) -> bool:
    for layer, _ in merged:
        status = _status(layer, path)
        if status is not None:
            return not (stat.S_ISCHR(status.st_mode) and status.st_rdev == 0)
    return False


def _seen(merged: _Merged, path: bytes) -> Node:
    """A directory as the highest layer that really describes it has it."""
    if not merged:
        return Node(stat.S_IFDIR | 0o755)
    source = next(
        (layer for layer, hints in merged if hints is None or not hints.implied), merged[0][0]
    )
    fd = open_directory(source.root_fd, path)
    try:
        status = os.fstat(fd)
        xattrs = {
            os.fsencode(name): os.getxattr(fd, name)
            for name in os.listxattr(fd)
            if name.startswith("user.")
        }
    finally:
        os.close(fd)
    return Node(
        status.st_mode,
        uid=status.st_uid,
        gid=status.st_gid,
        mtime_ns=status.st_mtime_ns,
        xattrs=xattrs,
    )
