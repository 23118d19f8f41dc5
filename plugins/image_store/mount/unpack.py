"""Write a `Tree` out under a directory that nobody else can reach.

All that could be hostile was refused when the tree was built. What remains is done so
that it could not leave the directory even then: every directory is opened with
openat2(RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS), every file is made with O_EXCL and
O_NOFOLLOW beside it, and a layer's bytes are copied inside the kernel.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

from plugins.image_store.mount.kernel import open_beneath
from plugins.image_store.tar.node import Node
from plugins.image_store.tar.overlay import overlay_xattrs
from plugins.image_store.tar.tree import Tree

COPY_BYTES = 8 << 20


def write_tree(tree: Tree, root_fd: int, *, tar_fd: int, between: Callable[[], None]) -> None:
    """Fill the empty directory `root_fd` with `tree`; file contents come from `tar_fd`.

    Blocking; `between` is called before each file and each `COPY_BYTES` of one, and may
    raise. Raises `OSError`. What was written so far is then the caller's to remove.
    """
    _Writer(root_fd, tar_fd, between).write(tree)


class _Writer:
    def __init__(self, root_fd: int, tar_fd: int, between: Callable[[], None]) -> None:
        self._root_fd = root_fd
        self._tar_fd = tar_fd
        self._between = between
        self._first_names: dict[int, tuple[bytes, bytes]] = {}

    def write(self, tree: Tree) -> None:
        # (path of parent, name, directory, whether its children were made). The paths are
        # shared, so that many deep directories do not each hold their whole path.
        waiting: list[tuple[bytes, bytes, Node, bool]] = [(b"", b"", tree.root, False)]
        while waiting:
            parent, name, node, is_filled = waiting.pop()
            path = joined(parent, name)
            directory_fd = open_directory(self._root_fd, path)
            try:
                if is_filled:
                    # Last, since every child that was made changed the directory's times.
                    self._finish_directory(directory_fd, node)
                    continue
                waiting.append((parent, name, node, True))
                for child_name, child in node.children.items():
                    self._between()
                    if child.is_directory:
                        os.mkdir(child_name, 0o700, dir_fd=directory_fd)
                        waiting.append((path, child_name, child, False))
                    else:
                        self._make(directory_fd, path, child_name, child)
            finally:
                os.close(directory_fd)

    def _make(self, directory_fd: int, directory: bytes, name: bytes, node: Node) -> None:
        if node.names > 1:
            first = self._first_names.setdefault(id(node), (directory, name))
            if first != (directory, name):
                self._link(first, directory_fd, name)
                return
        if stat.S_ISREG(node.mode):
            self._make_file(directory_fd, name, node)
        elif stat.S_ISLNK(node.mode):
            os.symlink(node.target, name, dir_fd=directory_fd)
            os.chown(name, node.uid, node.gid, dir_fd=directory_fd, follow_symlinks=False)
            set_mtime(name, node.mtime_ns, directory_fd)
        else:
            os.mknod(name, node.mode & ~0o7777, os.makedev(*node.device), dir_fd=directory_fd)
            os.chown(name, node.uid, node.gid, dir_fd=directory_fd, follow_symlinks=False)
            os.chmod(name, node.mode & 0o7777, dir_fd=directory_fd)
            set_mtime(name, node.mtime_ns, directory_fd)

    def _link(self, first: tuple[bytes, bytes], directory_fd: int, name: bytes) -> None:
        first_fd = open_directory(self._root_fd, first[0])
        try:
            os.link(
                first[1],
                name,
                src_dir_fd=first_fd,
                dst_dir_fd=directory_fd,
                follow_symlinks=False,
            )
        finally:
            os.close(first_fd)

    def _make_file(self, directory_fd: int, name: bytes, node: Node) -> None:
        fd = create_file(directory_fd, name)
        try:
            copy_bytes(self._tar_fd, node.data_offset, fd, node.size_bytes, self._between)
            self._describe(fd, node)
        finally:
            os.close(fd)

    def _finish_directory(self, fd: int, node: Node) -> None:
        for attribute, value in overlay_xattrs(node).items():
            os.setxattr(fd, attribute, value)
        self._describe(fd, node)

    @staticmethod
    def _describe(fd: int, node: Node) -> None:
        # This order: a new owner takes set-user-ID bits and capabilities away.
        os.fchown(fd, node.uid, node.gid)
        os.fchmod(fd, node.mode & 0o7777)
        for attribute, value in node.xattrs.items():
            os.setxattr(fd, attribute, value)
        os.utime(fd, ns=(node.mtime_ns, node.mtime_ns))


def joined(parent: bytes, name: bytes) -> bytes:
    return parent + b"/" + name if parent else name


def open_directory(root_fd: int, path: bytes) -> int:
    """A readable descriptor of a directory below `root_fd`; b"" is that directory itself."""
    return open_beneath(root_fd, path or b".", os.O_RDONLY | os.O_DIRECTORY)


def create_file(directory_fd: int, name: bytes) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(name, flags, 0o600, dir_fd=directory_fd)


def set_mtime(name: bytes, mtime_ns: int, directory_fd: int) -> None:
    os.utime(name, ns=(mtime_ns, mtime_ns), dir_fd=directory_fd, follow_symlinks=False)


def copy_bytes(
    source_fd: int, offset: int, target_fd: int, size_bytes: int, between: Callable[[], None]
) -> None:
    """Copy exactly `size_bytes`, inside the kernel. Raises `OSError` if there are fewer."""
    end = offset + size_bytes
    while offset < end:
        between()
        copied_bytes = os.sendfile(target_fd, source_fd, offset, min(end - offset, COPY_BYTES))
        if copied_bytes == 0:
            raise OSError(f"{end - offset} bytes are missing at offset {offset}")
        offset += copied_bytes
