"""How the worker gives up everything before it reads a byte of anybody's.

A hostile stream may find a flaw in a decompressor and run code of its own here. What it
then has: three pipes, memory, and the processor. It can give the parent any bytes it
likes, which are hashed and compared like all others.

Nothing here imports the rest of the project: it runs in a process that has only the
standard library and one decompressor. A pid namespace is not among the means: it would
hold children alone, and there cannot be any, nor can another process be named.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource

from plugins.image_store.inflate.system_calls import CALLS, filter_program

# Linux: include/uapi/linux/{prctl,capability,seccomp,sched,mount}.h.
_PR_SET_DUMPABLE = 4
_PR_SET_SECCOMP = 22
_PR_CAPBSET_READ = 23
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_SECCOMP_MODE_FILTER = 2
_CAPABILITY_VERSION_3 = 0x20080522
_CLONE_NEWNS = 0x00020000
_CLONE_NEWCGROUP = 0x02000000
_CLONE_NEWUTS = 0x04000000
_CLONE_NEWIPC = 0x08000000
_CLONE_NEWNET = 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MS_MOVE, _MS_REC, _MS_PRIVATE = 1 << 13, 1 << 14, 1 << 18
_MNT_DETACH = 2
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

# Owns nothing: containers get ids from 65536 on, 65534 is the kernel's "nobody", and
# systemd gives none of 65520 to 65533 to anybody (systemd's UIDS-GIDS.md).
UNUSED_ID = 65521

# The interpreter, a decoder with the largest window allowed, and pieces under way.
MAX_MEMORY_BYTES = 256 * 2**20
# If the parent was killed and the stream keeps the decoder busy without output.
MAX_CPU_S = 3600

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_ulong,
    ctypes.c_char_p,
)
_libc.prctl.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)
_libc.syscall.restype = ctypes.c_long


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("instructions", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def confine() -> None:
    """Keep standard input, output and error, memory and time; no way leads back.

    Raises `OSError` for any step that this kernel refuses, and then nothing may be read.
    Where the process is not root it has nothing that only root could give up; it keeps
    its ids, its view of the files and of the network, behind a system call filter that
    reaches none of them.
    """
    give_up_rights()
    filter_system_calls()


def give_up_rights() -> None:
    """All of it but the system call filter. Raises `OSError`."""
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if os.geteuid() == 0:
        _leave_namespaces()
        _empty_root()
        _drop_bounding_set()
        _leave_ids()
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    _drop_capabilities()
    for kind, limit in (
        (resource.RLIMIT_NOFILE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_AS, MAX_MEMORY_BYTES),
        (resource.RLIMIT_CPU, MAX_CPU_S),
    ):
        resource.setrlimit(kind, (limit, limit))
    # No other process of the same id may look into this one or stop it (ptrace(2)).
    _prctl(_PR_SET_DUMPABLE, 0)


def filter_system_calls() -> None:
    """Kill this process at any system call but those of `system_calls`. Raises `OSError`."""
    instructions = filter_program(CALLS[_machine()])
    program = _Program(instructions=len(instructions) // 8, filter=instructions)
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(program))


def _leave_namespaces() -> None:
    kinds = _CLONE_NEWNS | _CLONE_NEWNET | _CLONE_NEWIPC | _CLONE_NEWUTS | _CLONE_NEWCGROUP
    _checked(_libc.unshare(kinds), "unshare")


def _empty_root() -> None:
    """The root becomes an empty, read-only file system; the old one is let go of."""
    _mount(None, b"/", None, _MS_REC | _MS_PRIVATE)
    # Any directory will do, and this one is surely there.
    here = os.fsencode(os.path.dirname(os.path.abspath(__file__)))
    flags = _MS_RDONLY | _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    _mount(b"none", here, b"tmpfs", flags, b"size=4096,nr_inodes=1,mode=0555")
    os.chdir(here)
    number = ctypes.c_long(_PIVOT_ROOT[_machine()])
    if _libc.syscall(number, b".", b".") == 0:
        _checked(_libc.umount2(b".", _MNT_DETACH), "umount2")
    elif ctypes.get_errno() == errno.EINVAL:
        # A root in an initramfs cannot be pivoted away from, but covered (pivot_root(2)).
        _mount(b".", b"/", None, _MS_MOVE)
    else:
        _checked(-1, "pivot_root")
    os.chroot(".")
    os.chdir("/")


def _drop_bounding_set() -> None:
    capability = 0
    while _libc.prctl(_PR_CAPBSET_READ, capability, 0, 0, 0) >= 0:
        _prctl(_PR_CAPBSET_DROP, capability)
        capability += 1


def _leave_ids() -> None:
    os.setgroups([])
    os.setresgid(UNUSED_ID, UNUSED_ID, UNUSED_ID)
    os.setresuid(UNUSED_ID, UNUSED_ID, UNUSED_ID)


def _drop_capabilities() -> None:
    """Permitted, effective and inheritable (capset(2)): two halves of three empty words."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    _checked(_libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")


def _machine() -> str:
    machine = os.uname().machine
    if machine not in CALLS:
        raise OSError(errno.ENOSYS, f"no system call filter is known for {machine}")
    return machine


def _mount(
    source: bytes | None, target: bytes, kind: bytes | None, flags: int, options: bytes = b""
) -> None:
    _checked(_libc.mount(source, target, kind, flags, options), "mount")


def _prctl(option: int, *arguments: int) -> None:
    words = (*arguments, 0, 0, 0, 0)[:4]
    _checked(_libc.prctl(option, *words), f"prctl {option}")


def _checked(result: int, call: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), call)
