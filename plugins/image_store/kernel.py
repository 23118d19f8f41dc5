"""The few Linux calls that Python has no name for, typed.

Numbers and structures: include/uapi/linux/{mount,openat2}.h; the call numbers from 424
on are the same on every architecture. All raise `OSError`; descriptors belong to the
caller and are close-on-exec.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

from supervisor import RuntimeFailed

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_ulong,
    ctypes.c_char_p,
)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
_libc.syscall.restype = ctypes.c_long

_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429
_SYS_OPENAT2 = 437
_SYS_MOUNT_SETATTR = 442

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_PRIVATE = 1 << 18
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

_OPEN_TREE_CLONE = 1
_MOVE_MOUNT_F_EMPTY_PATH = 4
_MOUNT_ATTR_RDONLY = 0x1
_MOUNT_ATTR_IDMAP = 0x00100000

_RESOLVE_NO_XDEV = 0x01
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_NO_SYMLINKS = 0x04
_RESOLVE_BENEATH = 0x08


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


class _MountAttr(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def _checked(result: int, path: bytes) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), os.fsdecode(path))
    return result


@contextmanager
def refused_by_kernel(item: str, rule: str) -> Iterator[None]:
    """Turn what the kernel refuses into a `RuntimeFailed` that says what was wanted."""
    try:
        yield
    except OSError as error:
        raise RuntimeFailed(item, rule, actual=error) from error


def open_beneath(directory_fd: int, path: bytes, flags: int, *, cross_mounts: bool = False) -> int:
    """openat2(2): open `path` under a directory, through no symlink and never outside it."""
    resolve = _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS
    if not cross_mounts:
        resolve |= _RESOLVE_NO_XDEV
    how = _OpenHow(flags=flags | os.O_CLOEXEC, mode=0, resolve=resolve)
    result: int = _libc.syscall(
        ctypes.c_long(_SYS_OPENAT2),
        ctypes.c_int(directory_fd),
        ctypes.c_char_p(path),
        ctypes.byref(how),
        ctypes.c_size_t(ctypes.sizeof(how)),
    )
    return _checked(result, path)


def mount(
    source: bytes, target: bytes, *, filesystem: bytes, flags: int, options: bytes = b""
) -> None:
    """mount(2) of a new file system, cut off from other namespaces (MS_PRIVATE)."""
    _checked(_libc.mount(source, target, filesystem, flags, options), target)
    _checked(_libc.mount(None, target, None, MS_PRIVATE, None), target)


def unmount(target: bytes, *, lazily: bool = False) -> None:
    """umount2(2). `lazily` takes it out of the tree at once, whoever still uses it."""
    flags = UMOUNT_NOFOLLOW | (MNT_DETACH if lazily else 0)
    _checked(_libc.umount2(target, flags), target)


def idmapped_clone(source: bytes, target: bytes, user_namespace_fd: int) -> None:
    """Mount `source` again at `target`, read-only, with owners as the user namespace maps them.

    open_tree(2), mount_setattr(2), move_mount(2); on tmpfs from Linux 6.3 on.
    """
    mount_fd = _checked(
        _libc.syscall(
            ctypes.c_long(_SYS_OPEN_TREE),
            ctypes.c_int(AT_FDCWD),
            ctypes.c_char_p(source),
            ctypes.c_uint(_OPEN_TREE_CLONE | os.O_CLOEXEC),
        ),
        source,
    )
    try:
        attributes = _MountAttr(
            attr_set=_MOUNT_ATTR_IDMAP | _MOUNT_ATTR_RDONLY,
            attr_clr=0,
            propagation=MS_PRIVATE,
            userns_fd=user_namespace_fd,
        )
        _checked(
            _libc.syscall(
                ctypes.c_long(_SYS_MOUNT_SETATTR),
                ctypes.c_int(mount_fd),
                ctypes.c_char_p(b""),
                ctypes.c_uint(AT_EMPTY_PATH),
                ctypes.byref(attributes),
                ctypes.c_size_t(ctypes.sizeof(attributes)),
            ),
            source,
        )
        _checked(
            _libc.syscall(
                ctypes.c_long(_SYS_MOVE_MOUNT),
                ctypes.c_int(mount_fd),
                ctypes.c_char_p(b""),
                ctypes.c_int(AT_FDCWD),
                ctypes.c_char_p(target),
                ctypes.c_uint(_MOVE_MOUNT_F_EMPTY_PATH),
            ),
            target,
        )
    finally:
        os.close(mount_fd)


def mounts_under(directory: bytes) -> list[bytes]:
    """Mount points at or below `directory`, in an order that can be unmounted from its end.

    proc(5), mountinfo: deeper ones later; of those on one another, the upper one later.
    """
    with open("/proc/self/mountinfo", "rb") as table:
        points = [_unescaped(line.split(b" ")[4]) for line in table]
    below = directory.rstrip(b"/") + b"/"
    inside = [point for point in points if point == directory or point.startswith(below)]
    return sorted(inside, key=lambda point: point.count(b"/"))


def _unescaped(field: bytes) -> bytes:
    for escape, character in ((b"\\040", b" "), (b"\\011", b"\t"), (b"\\012", b"\n")):
        field = field.replace(escape, character)
    return field.replace(b"\\134", b"\\")
