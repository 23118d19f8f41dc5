"""The few system calls that Python does not wrap: mount, umount2, and the subreaper setting.

Facts: mount(2), umount(2), prctl(2), `include/uapi/linux/mount.h`.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MS_NOSUID = 2
MS_NODEV = 4
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8
PR_SET_CHILD_SUBREAPER = 36
PR_GET_CHILD_SUBREAPER = 37

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_ulong,
    ctypes.c_char_p,
)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)


def _fail(what: str | Path) -> None:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number), str(what))


def _mount(source: str, target: Path, filesystem: str | None, flags: int, data: str | None) -> None:
    if _libc.mount(
        os.fsencode(source),
        os.fsencode(target),
        None if filesystem is None else filesystem.encode(),
        flags,
        None if data is None else data.encode(),
    ):
        _fail(target)


def mount_tmpfs(target: Path, *, mode: int, size_mib: int) -> None:
    """Mount an empty tmpfs, private, without set-user-ID programs and devices. Raises `OSError`."""
    data = f"mode={mode:o},size={size_mib}m"
    _mount("acond", target, "tmpfs", MS_NOSUID | MS_NODEV, data)
    # Otherwise, below a shared mount (systemd's "/"), all that is mounted inside would
    # appear in every other mount namespace of the machine too.
    _mount("none", target, None, MS_PRIVATE, None)


def bind(source: Path, target: Path) -> None:
    """Make `source` (a tree or one file) visible at `target` as well. Raises `OSError`."""
    _mount(str(source), target, None, MS_BIND | MS_REC, None)


def unmount(target: Path) -> bool:
    """Detach the topmost mount at `target` with all below it; False if nothing was mounted."""
    if _libc.umount2(os.fsencode(target), MNT_DETACH | UMOUNT_NOFOLLOW) == 0:
        return True
    if ctypes.get_errno() not in (errno.EINVAL, errno.ENOENT, errno.ENOTDIR):
        _fail(target)
    return False


@contextmanager
def child_subreaper() -> Iterator[None]:
    """Adopt orphaned descendants, so that a container's first process becomes our child.

    Only a parent learns an exit status: the OCI runtime that made the process is gone
    by then. The former setting comes back at the end. Raises `OSError`.
    """
    before = ctypes.c_int()
    if _libc.prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0):
        _fail("PR_GET_CHILD_SUBREAPER")
    _set_subreaper(1)
    try:
        yield
    finally:
        _set_subreaper(before.value)


def _set_subreaper(value: int) -> None:
    if _libc.prctl(PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(value), 0, 0, 0):
        _fail("PR_SET_CHILD_SUBREAPER")
