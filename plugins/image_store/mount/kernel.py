"""The few Linux calls that Python has no name for, typed.

Numbers and structures: include/uapi/linux/{mount,openat2,inotify}.h; the call numbers from 424
on are the same on every architecture. All raise `OSError`; descriptors belong to the
caller and are close-on-exec.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator, Sequence
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
_libc.inotify_init1.argtypes = (ctypes.c_int,)
_libc.inotify_add_watch.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32)

_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429
_SYS_FSOPEN = 430
_SYS_FSCONFIG = 431
_SYS_FSMOUNT = 432
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
_FSOPEN_CLOEXEC = 1
_FSCONFIG_SET_FLAG = 0
_FSCONFIG_SET_STRING = 1
_FSCONFIG_CMD_CREATE = 6
_FSMOUNT_CLOEXEC = 1
_MOUNT_ATTR_RDONLY = 0x1
_MOUNT_ATTR_NOSUID = 0x2
_MOUNT_ATTR_NODEV = 0x4
_MOUNT_ATTR_NOEXEC = 0x8
_MOUNT_ATTR_IDMAP = 0x00100000

_RESOLVE_NO_XDEV = 0x01
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_NO_SYMLINKS = 0x04
_RESOLVE_BENEATH = 0x08


_IN_DELETE_SELF = 0x400
_IN_IGNORED = 0x8000
# inotify(7), struct inotify_event without its name: watch, mask, cookie, length of the name.
_NOTICE = struct.Struct("=iIII")
_MAX_NOTICES_BYTES = 64 * 1024

# Mounts on one another at one place.
_MAX_STACKED = 100

# What one read(2) of a file system context's messages brings at most.
_MAX_WORDS_BYTES = 1024
_MAX_WORDS = 16


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


def unmount_held(mount_fd: int) -> None:
    """umount2(2), lazily, of the mount that `mount_fd` refers to, and of all mounted over it.

    Nothing happens if it is not attached. The descriptor stays open. Raises `OSError`.
    """
    path = b"/proc/self/fd/%d" % mount_fd
    for _ in range(_MAX_STACKED):
        # The uppermost is found by this name, whatever the descriptor refers to.
        if _libc.umount2(path, MNT_DETACH):
            number = ctypes.get_errno()
            if number == errno.EINVAL:  # what the descriptor refers to is not attached any more
                return
            raise OSError(number, os.strerror(number), os.fsdecode(path))
    raise OSError(errno.EBUSY, "others go on mounting over it", os.fsdecode(path))


def idmapped_clone(source: bytes, target: bytes, user_namespace_fd: int) -> None:
    """Mount `source` again at `target`, read-only, with owners as the user namespace maps them.

    open_tree(2), mount_setattr(2), move_mount(2); on tmpfs from Linux 6.3 on.
    """
    mount_fd = cloned_at(source)
    try:
        attributes = _MountAttr(
            attr_set=_MOUNT_ATTR_IDMAP | _MOUNT_ATTR_RDONLY,
            propagation=MS_PRIVATE,
            userns_fd=user_namespace_fd,
        )
        _set_attributes(mount_fd, attributes, source)
        attach(mount_fd, target)
    finally:
        os.close(mount_fd)


def cloned_at(path: bytes) -> int:
    """open_tree(2): a detached clone of the mount that `path` shows, from there down.

    It ends with the descriptor unless it was attached. Mounts below are not cloned.
    """
    return _open_tree(AT_FDCWD, path, 0)


def cloned(mount_fd: int) -> int:
    """open_tree(2): a detached clone of a mount that is attached in this namespace (5.2)."""
    return _open_tree(mount_fd, b"", AT_EMPTY_PATH)


def _open_tree(directory_fd: int, path: bytes, flags: int) -> int:
    result: int = _libc.syscall(
        ctypes.c_long(_SYS_OPEN_TREE),
        ctypes.c_int(directory_fd),
        ctypes.c_char_p(path),
        ctypes.c_uint(_OPEN_TREE_CLONE | os.O_CLOEXEC | flags),
    )
    return _checked(result, path)


def make_private(mount_fd: int) -> None:
    """mount_setattr(2): cut a mount off from other namespaces, from Linux 5.12 on."""
    _set_attributes(mount_fd, _MountAttr(propagation=MS_PRIVATE), b"")


def _set_attributes(mount_fd: int, attributes: _MountAttr, path: bytes) -> None:
    result: int = _libc.syscall(
        ctypes.c_long(_SYS_MOUNT_SETATTR),
        ctypes.c_int(mount_fd),
        ctypes.c_char_p(b""),
        ctypes.c_uint(AT_EMPTY_PATH),
        ctypes.byref(attributes),
        ctypes.c_size_t(ctypes.sizeof(attributes)),
    )
    _checked(result, path)


def attach(mount_fd: int, target: bytes) -> None:
    """move_mount(2): put a detached mount at `target`. The descriptor stays the caller's."""
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


def detached_mount(
    filesystem: bytes,
    options: Sequence[tuple[bytes, bytes]] = (),
    *,
    read_only: bool = False,
    executable: bool = False,
) -> int:
    """A new file system that lies nowhere: nosuid, nodev, noexec, in no other namespace.

    `executable`: not noexec, for programs of our own.

    fsopen(2), fsconfig(2), fsmount(2), from Linux 5.2 on. `options` are keys and values, in
    order. When the descriptor is closed the mount is gone, unless it was attached or files
    of it are open. What the file system says of a refusal is in the `OSError`'s text.
    """
    context_fd = _checked(
        _libc.syscall(
            ctypes.c_long(_SYS_FSOPEN), ctypes.c_char_p(filesystem), ctypes.c_uint(_FSOPEN_CLOEXEC)
        ),
        filesystem,
    )
    try:
        for key, value in options:
            _configure(context_fd, filesystem, _FSCONFIG_SET_STRING, key, value)
        if read_only:
            _configure(context_fd, filesystem, _FSCONFIG_SET_FLAG, b"ro", None)
        _configure(context_fd, filesystem, _FSCONFIG_CMD_CREATE, None, None)
        attributes = _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV
        if not executable:
            attributes |= _MOUNT_ATTR_NOEXEC
        if read_only:
            attributes |= _MOUNT_ATTR_RDONLY
        return _checked(
            _libc.syscall(
                ctypes.c_long(_SYS_FSMOUNT),
                ctypes.c_int(context_fd),
                ctypes.c_uint(_FSMOUNT_CLOEXEC),
                ctypes.c_uint(attributes),
            ),
            filesystem,
        )
    finally:
        os.close(context_fd)


def _configure(
    context_fd: int, filesystem: bytes, command: int, key: bytes | None, value: bytes | None
) -> None:
    result = _libc.syscall(
        ctypes.c_long(_SYS_FSCONFIG),
        ctypes.c_int(context_fd),
        ctypes.c_uint(command),
        ctypes.c_char_p(key),
        ctypes.c_char_p(value),
        ctypes.c_int(0),
    )
    if result < 0:
        number = ctypes.get_errno()
        reason = ": ".join((os.strerror(number), *_words(context_fd)))
        raise OSError(number, reason, os.fsdecode(filesystem))


def _words(context_fd: int) -> list[str]:
    """What the file system wrote into its context, one message at a read."""
    words: list[str] = []
    while len(words) < _MAX_WORDS:
        try:
            words.append(os.read(context_fd, _MAX_WORDS_BYTES).decode("utf-8", "replace").strip())
        except OSError:  # ENODATA: that was all
            break
    return words


def new_notices() -> int:
    """inotify_init1(2): a descriptor for `notice_end` and `ended`; reading never blocks."""
    return _checked(_libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK), b"inotify")


def notice_end(notices_fd: int, fd: int) -> int:
    """inotify_add_watch(2): have it noted when the file system that `fd` lies on is gone.

    The watch's number, never used again (inotify(7), "Bugs"). It keeps nothing alive.
    """
    path = b"/proc/self/fd/%d" % fd
    return _checked(_libc.inotify_add_watch(notices_fd, path, _IN_DELETE_SELF), path)


def ended(notices_fd: int) -> list[int]:
    """The numbers of watches whose file systems have gone since the last call."""
    numbers: list[int] = []
    while True:
        try:
            found = os.read(notices_fd, _MAX_NOTICES_BYTES)
        except BlockingIOError:
            return numbers
        offset = 0
        while offset < len(found):
            number, mask, _, name_bytes = _NOTICE.unpack_from(found, offset)
            offset += _NOTICE.size + name_bytes
            if mask & _IN_IGNORED:
                numbers.append(number)


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
