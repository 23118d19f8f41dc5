"""A copy of an unpacked tree with owners as a container sees them.

For kernels that cannot map owners of a mounted tmpfs (before Linux 6.3): the result,
mounted plainly, looks exactly as the idmapped mount of the original would.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable

from plugins.image_store.mount.unpack import (
    copy_bytes,
    create_file,
    joined,
    open_directory,
    set_mtime,
)
from plugins.image_store.tar.xattrs import CAPABILITY

# What the kernel shows for an owner that a mapping does not name.
OVERFLOW_ID = 65534
_CAPABILITY_REVISION_MASK = 0xFF000000
_CAPABILITY_REVISION_3 = 0x03000000


def copy_shifted(
    source_fd: int, target_fd: int, outside: dict[int, int], *, between: Callable[[], None]
) -> None:
    """Fill the empty directory `target_fd`. Blocking; `between` as in `unpack.write_tree`.

    `outside` maps owners in the layer to owners of the copy; all others become 65534.
    """
    _Copier(source_fd, target_fd, outside, between).copy()


class _Copier:
    def __init__(
        self,
        source_fd: int,
        target_fd: int,
        outside: dict[int, int],
        between: Callable[[], None],
    ) -> None:
        self._source_fd = source_fd
        self._target_fd = target_fd
        self._outside = outside
        self._between = between
        self._first_names: dict[int, tuple[bytes, bytes]] = {}

    def copy(self) -> None:
        waiting: list[tuple[bytes, bytes, bool]] = [(b"", b"", False)]
        while waiting:
            parent, name, is_filled = waiting.pop()
            path = joined(parent, name)
            from_fd = open_directory(self._source_fd, path)
            try:
                into_fd = open_directory(self._target_fd, path)
                try:
                    if is_filled:
                        self._describe(from_fd, into_fd, os.fstat(from_fd))
                        continue
                    waiting.append((parent, name, True))
                    for child in map(os.fsencode, os.listdir(from_fd)):
                        self._between()
                        status = os.stat(child, dir_fd=from_fd, follow_symlinks=False)
                        if stat.S_ISDIR(status.st_mode):
                            os.mkdir(child, 0o700, dir_fd=into_fd)
                            waiting.append((path, child, False))
                        else:
                            self._copy_one(from_fd, into_fd, path, child, status)
                finally:
                    os.close(into_fd)
            finally:
                os.close(from_fd)

    def _copy_one(
        self, from_fd: int, into_fd: int, path: bytes, name: bytes, status: os.stat_result
    ) -> None:
        if status.st_nlink > 1:
            first = self._first_names.setdefault(status.st_ino, (path, name))
            if first != (path, name):
                first_fd = open_directory(self._target_fd, first[0])
                try:
                    os.link(
                        first[1],
                        name,
                        src_dir_fd=first_fd,
                        dst_dir_fd=into_fd,
                        follow_symlinks=False,
                    )
                finally:
                    os.close(first_fd)
                return
        if stat.S_ISREG(status.st_mode):
            self._copy_file(from_fd, into_fd, name, status)
            return
        if stat.S_ISLNK(status.st_mode):
            os.symlink(os.readlink(name, dir_fd=from_fd), name, dir_fd=into_fd)
        else:
            os.mknod(name, stat.S_IFMT(status.st_mode), status.st_rdev, dir_fd=into_fd)
        owner = self._shifted(status.st_uid), self._shifted(status.st_gid)
        os.chown(name, *owner, dir_fd=into_fd, follow_symlinks=False)
        if not stat.S_ISLNK(status.st_mode):
            os.chmod(name, stat.S_IMODE(status.st_mode), dir_fd=into_fd)
        set_mtime(name, status.st_mtime_ns, into_fd)

    def _copy_file(self, from_fd: int, into_fd: int, name: bytes, status: os.stat_result) -> None:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        source_fd = os.open(name, flags, dir_fd=from_fd)
        try:
            target_fd = create_file(into_fd, name)
            try:
                copy_bytes(source_fd, 0, target_fd, status.st_size, self._between)
                self._describe(source_fd, target_fd, status)
            finally:
                os.close(target_fd)
        finally:
            os.close(source_fd)

    def _describe(self, source_fd: int, target_fd: int, status: os.stat_result) -> None:
        os.fchown(target_fd, self._shifted(status.st_uid), self._shifted(status.st_gid))
        os.fchmod(target_fd, stat.S_IMODE(status.st_mode))
        for attribute in os.listxattr(source_fd):
            value = os.getxattr(source_fd, attribute)
            if os.fsencode(attribute) == CAPABILITY:
                value = capability_for(value, self._shifted(0))
            os.setxattr(target_fd, attribute, value)
        os.utime(target_fd, ns=(status.st_mtime_ns, status.st_mtime_ns))

    def _shifted(self, owner: int) -> int:
        return self._outside.get(owner, OVERFLOW_ID)


def capability_for(value: bytes, root_id: int) -> bytes:
    """A revision 2 capability as one that counts where `root_id` is root (capabilities(7))."""
    (magic,) = struct.unpack_from("<I", value)
    shifted = (magic & ~_CAPABILITY_REVISION_MASK) | _CAPABILITY_REVISION_3
    return struct.pack("<I", shifted) + value[4:20] + struct.pack("<I", root_id)
