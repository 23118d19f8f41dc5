"""The few system calls that Python does not wrap: mounts, programs in memory, the subreaper.

Facts: mount(2), umount(2), prctl(2), memfd_create(2), `include/uapi/linux/{mount,memfd}.h`;
fsopen(2), fsconfig(2), fsmount(2), open_tree(2), move_mount(2) are there from Linux 5.2 on,
under these numbers on every architecture. All raise `OSError`.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
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

_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429
_SYS_FSOPEN = 430
_SYS_FSCONFIG = 431
_SYS_FSMOUNT = 432
_AT_FDCWD = -100
_OPEN_TREE_CLONE = 1
_MOVE_MOUNT_F_EMPTY_PATH = 4
_FSOPEN_CLOEXEC = 1
_FSCONFIG_SET_STRING = 1
_FSCONFIG_CMD_CREATE = 6
_FSMOUNT_CLOEXEC = 1
_MOUNT_ATTR_NOSUID = 2
_MOUNT_ATTR_NODEV = 4
# Python 3.11 has no name for it; kernels before 6.3 do not know it, and need it not.
_MFD_EXEC = 0x10
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE

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


def _fail(what: str | Path) -> None:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number), str(what))


def _checked(result: int, what: str | Path) -> int:
    if result < 0:
        _fail(what)
    return result


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
    """Mount an empty tmpfs, private, without set-user-ID programs and devices. Raises `OSError`.

    `size_mib` bounds the contents, and the number of files to one for each KiB.
    """
    data = f"mode={mode:o},size={size_mib}m,nr_inodes={size_mib * 1024}"
    _mount("acond", target, "tmpfs", MS_NOSUID | MS_NODEV, data)
    # Otherwise, below a shared mount (systemd's "/"), all that is mounted inside would
    # appear in every other mount namespace of the machine too.
    _mount("none", target, None, MS_PRIVATE, None)


def bind(source: Path, target: Path) -> None:
    """Make `source` (a tree or one file) visible at `target` as well. Raises `OSError`."""
    _mount(str(source), target, None, MS_BIND | MS_REC, None)


def detached_tmpfs(*, mode: int, size_mib: int) -> int:
    """An empty tmpfs that lies nowhere, without set-user-ID programs and devices.

    The descriptor can be given to `dir_fd` arguments; once it is closed, what lies nowhere
    is freed. `size_mib` bounds the contents, and the number of files to one for each KiB.
    """
    context = _checked(_libc.syscall(_SYS_FSOPEN, b"tmpfs", _FSOPEN_CLOEXEC), "tmpfs")
    try:
        options = {
            b"source": b"acond",
            b"mode": b"%o" % mode,
            b"size": b"%dm" % size_mib,
            b"nr_inodes": b"%d" % (size_mib * 1024),
        }
        for key, value in options.items():
            _configure(context, _FSCONFIG_SET_STRING, key, value)
        _configure(context, _FSCONFIG_CMD_CREATE, None, None)
        attributes = _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV
        return _checked(_libc.syscall(_SYS_FSMOUNT, context, _FSMOUNT_CLOEXEC, attributes), "tmpfs")
    finally:
        os.close(context)


def _configure(context: int, command: int, key: bytes | None, value: bytes | None) -> None:
    _checked(_libc.syscall(_SYS_FSCONFIG, context, command, key, value, 0), "tmpfs")


def attach(mount_fd: int, target: Path) -> None:
    """Put a mount that lies nowhere at `target`. The descriptor stays the caller's."""
    _checked(
        _libc.syscall(
            _SYS_MOVE_MOUNT,
            *(mount_fd, b"", _AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH),
        ),
        target,
    )


def detached_copy(target: Path) -> int:
    """The mount at `target` (without what lies on it) once more, lying nowhere."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC
    return _checked(_libc.syscall(_SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(target), flags), target)


def executable_in_memory(name: str, program: bytes) -> int:
    """A descriptor of a program that nobody can change any more, to be run through /proc."""
    try:
        fd = _new_memory_file(name)
    except PermissionError:
        # vm.memfd_noexec=2: this machine wants programs to lie in file systems.
        return _executable_in_tmpfs(program)
    try:
        os.write(fd, program)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _new_memory_file(name: str) -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create(name, flags | _MFD_EXEC)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.memfd_create(name, flags)


def _executable_in_tmpfs(program: bytes) -> int:
    """Likewise, in a file system that lies nowhere and lives as long as this file is open."""
    size_mib = len(program) // 2**20 + 1
    folder = detached_tmpfs(mode=0o755, size_mib=size_mib)
    try:
        writing = os.open(
            "program", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, mode=0o500, dir_fd=folder
        )
        try:
            os.write(writing, program)
            # Not by open's argument: the supervisor's umask would cut it.
            os.fchmod(writing, 0o555)
        finally:
            # Whatever is open for writing cannot be executed.
            os.close(writing)
        return os.open("program", os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
    finally:
        os.close(folder)


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
