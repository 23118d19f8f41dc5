"""A user namespace that only says how owners are mapped (mount_setattr(2), MOUNT_ATTR_IDMAP).

Python cannot unshare one thread safely, so a child is born into it: a program of a few
instructions, since any other takes ten times as long to load (0.4 ms against 3 ms for
`unshare --user cat`). It says that the namespace is there by a byte on its standard output,
and ends when its standard input does, so also when its parent is killed.
"""

from __future__ import annotations

import errno
import os
import platform
import select
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

from plugins.image_store.mount.kernel import detached_mount
from supervisor import DeadlineExceeded, RuntimeFailed
from supervisor.formats.elf import ELF_MACHINES, elf_file, instructions

MAKE_TIMEOUT_S = 5
BUSY_PAUSE_S = 0.001
# The kernel takes one write of less than a page, and 340 lines at most (user_namespaces(7)).
MAX_MAP_BYTES = 4095
MAX_MAP_LINES = 340

# unshare(2) with CLONE_NEWUSER, write(2), read(2), exit_group(2).
X86_64 = """
bf 00 00 00 10          mov   edi, 0x10000000
b8 10 01 00 00          mov   eax, 272
0f 05                   syscall
85 c0                   test  eax, eax
75 1b                   jne   exit
50                      push  rax
bf 01 00 00 00          mov   edi, 1
48 89 e6                mov   rsi, rsp
ba 01 00 00 00          mov   edx, 1
b8 01 00 00 00          mov   eax, 1
0f 05                   syscall
31 ff                   xor   edi, edi
31 c0                   xor   eax, eax
0f 05                   syscall
                        exit:
89 c7                   mov   edi, eax
b8 e7 00 00 00          mov   eax, 231
0f 05                   syscall
"""
AARCH64 = """
00 00 a2 52             mov   w0, #0x10000000
28 0c 80 d2             mov   x8, #97
01 00 00 d4             svc   #0
20 01 00 35             cbnz  w0, exit
20 00 80 d2             mov   x0, #1
e1 03 00 91             mov   x1, sp
22 00 80 d2             mov   x2, #1
08 08 80 d2             mov   x8, #64
01 00 00 d4             svc   #0
00 00 80 d2             mov   x0, #0
e8 07 80 d2             mov   x8, #63
01 00 00 d4             svc   #0
                        exit:
c8 0b 80 d2             mov   x8, #94
01 00 00 d4             svc   #0
"""
LISTINGS = {"x86_64": X86_64, "aarch64": AARCH64}


def map_text(pairs: Iterable[tuple[int, int]], *, item: str) -> bytes:
    """`uid_map` lines for pairs (in the layer, as shown). Neighbours share a line."""
    runs: list[tuple[int, int, int]] = []
    for inside, outside in sorted(pairs):
        if runs:
            first_inside, first_outside, count = runs[-1]
            if (inside, outside) == (first_inside + count, first_outside + count):
                runs[-1] = (first_inside, first_outside, count + 1)
                continue
        runs.append((inside, outside, 1))
    text = b"".join(b"%d %d %d\n" % run for run in runs)
    if len(runs) > MAX_MAP_LINES or len(text) > MAX_MAP_BYTES:
        raise RuntimeFailed(
            item,
            "the container has too many separate user ids for the kernel",
            expected=f"at most {MAX_MAP_LINES} runs and {MAX_MAP_BYTES} bytes",
            actual=f"{len(runs)} runs, {len(text)} bytes",
        )
    return text


@contextmanager
def user_namespace(pairs: Iterable[tuple[int, int]], *, item: str) -> Iterator[int]:
    """A descriptor of a namespace with this mapping, for users and groups alike.

    Blocking, bounded: for a thread. The child that made it has ended when the body runs;
    the descriptor is closed afterwards. Raises `RuntimeFailed`, `DeadlineExceeded`.
    """
    text = map_text(pairs, item=item)
    program = _program(item)
    try:
        namespace_fd = _made(program, text, item)
    except OSError as error:
        raise RuntimeFailed(item, "no user namespace can be made here", actual=error) from error
    try:
        yield namespace_fd
    finally:
        os.close(namespace_fd)


def _program(item: str) -> bytes:
    machine = platform.machine()
    if machine not in LISTINGS:
        raise RuntimeFailed(
            item,
            "no program makes user namespaces on this machine",
            expected=", ".join(LISTINGS),
            actual=machine,
        )
    return elf_file(ELF_MACHINES[machine], instructions(LISTINGS[machine]))


def _made(program: bytes, text: bytes, item: str) -> int:
    # Whatever is not closed by the child's actions is closed by its execve(2).
    input_end, hold = os.pipe2(os.O_CLOEXEC)
    told, output_end = os.pipe2(os.O_CLOEXEC)
    try:
        try:
            pid = _spawned(program, input_end, output_end)
        finally:
            os.close(input_end)
            os.close(output_end)
        try:
            _hear(told, item)
            return _mapped(pid, text)
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    finally:
        os.close(hold)
        os.close(told)


def _spawned(program: bytes, input_fd: int, output_fd: int) -> int:
    """Not from a memory file: vm.memfd_noexec may forbid that."""
    folder = detached_mount(b"tmpfs", ((b"mode", b"0700"), (b"size", b"64k")), executable=True)
    try:
        writing = os.open("program", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o700, dir_fd=folder)
        try:
            os.write(writing, program)
        finally:
            # Whatever is open for writing cannot be executed.
            os.close(writing)
        reading = os.open("program", os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
    finally:
        os.close(folder)
    actions = [(os.POSIX_SPAWN_DUP2, input_fd, 0), (os.POSIX_SPAWN_DUP2, output_fd, 1)]
    latest = time.monotonic() + MAKE_TIMEOUT_S
    try:
        while True:
            try:
                return os.posix_spawn(
                    f"/proc/self/fd/{reading}", ["user-namespace"], {}, file_actions=actions
                )
            except OSError as error:
                # A child that another thread just made has our descriptor for writing too,
                # until its own execve(2).
                if error.errno != errno.ETXTBSY or time.monotonic() > latest:
                    raise
            time.sleep(BUSY_PAUSE_S)
    finally:
        os.close(reading)


def _hear(told_fd: int, item: str) -> None:
    # Not select(2): there are more descriptors than it can count to.
    waiting = select.poll()
    waiting.register(told_fd, select.POLLIN)
    if not waiting.poll(MAKE_TIMEOUT_S * 1000):
        raise DeadlineExceeded(
            item, "no user namespace was made in time", expected=f"{MAKE_TIMEOUT_S} s"
        )
    if not os.read(told_fd, 1):
        raise RuntimeFailed(item, "no user namespace can be made here (unshare(2) failed)")


def _mapped(pid: int, text: bytes) -> int:
    for name in ("uid_map", "gid_map"):
        map_fd = os.open(f"/proc/{pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(map_fd, text)
        finally:
            os.close(map_fd)
    return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
