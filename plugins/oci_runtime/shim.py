"""The shim of one start: handed to an OCI runtime, and heard until the program runs.

What the program behind it does: `shim_program`. It is given to the runtime as an open
descriptor, so it needs no place in the container's root, and nobody in the container can
have changed it: its bytes are sealed. The other end of its status descriptor stays here.
That is a socket: the kernel then says whose message it is, so the pid is known from a
source that no file and no other process can forge.
"""

from __future__ import annotations

import errno
import os
import platform
import resource
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

import trio

from plugins.oci_runtime import kernel
from plugins.oci_runtime.shim_program import FIRST_FREE_FD, shim_program
from supervisor import RuntimeFailed

# The kernel's own default: programs that use select(2) break above it, and those that close
# every descriptor that there could be take their time. Whoever wants more may take it.
OPEN_FILES = 1024
# From the runtime's end to the program's beginning: a few system calls.
SHIM_TIMEOUT_S = 5
_STATUS = struct.Struct("=i")
# SCM_CREDENTIALS, unix(7): pid, uid, gid. `socket` has no name for it.
_SCM_CREDENTIALS = 2
_CREDENTIALS = struct.Struct("=iII")
# Linux 6.16; `socket` has no name for it.
_SO_PASSRIGHTS = 83


class ShimFailed(Exception):
    """The shim could not do its work, for the reason `errno`."""

    def __init__(self, number: int) -> None:
        super().__init__(f"{errno.errorcode.get(number, number)}: {os.strerror(number)}")
        self.errno = number


class ExecFailed(ShimFailed):
    """execve(2) of the container's program."""


class ChdirFailed(ShimFailed):
    """chdir(2) to the program's working directory."""


def first_fd_above(log_fds: Iterable[int]) -> int:
    """Where the shim's own descriptors begin for a program that keeps these."""
    return max((FIRST_FREE_FD - 1, *log_fds)) + 1


def shim_argv(first_fd: int) -> tuple[str, ...]:
    """What a runtime has to run to run the shim that it holds open."""
    return (f"/proc/self/fd/{first_fd}",)


class ShimPipe:
    """One shim. `argv` is what the runtime has to run; `fds` are what it must hand down:
    number in the container -> our descriptor, good until the block of `open_shim` ends.
    """

    def __init__(
        self, argv: tuple[str, ...], fds: dict[int, int], status: socket.socket, ours: socket.socket
    ) -> None:
        self.argv = argv
        self.fds = fds
        self._status = status
        self._ours = ours
        self._pid: int | None = None

    async def started(self, *, timeout_s: float) -> int:
        """Until the program runs; returns its process's pid, as our pid namespace has it.

        To be called once the runtime has ended, whose copy of the descriptors would keep the
        news from us. Raises `ShimFailed`, or `RuntimeFailed` if the shim never ran or tells
        nothing in time. The process exists (or is to be reaped) also when this raises:
        `reached` tells it.
        """
        self._status.close()
        with trio.move_on_after(timeout_s):
            while True:
                await trio.lowlevel.wait_readable(self._ours)
                message = self._receive()
                if not message:
                    break
                if len(message) != _STATUS.size:
                    raise RuntimeFailed("the shim", "must speak in four bytes", actual=message)
                number = _STATUS.unpack(message)[0]
                if number > 0:
                    raise ExecFailed(number)
                if number < 0:
                    raise ChdirFailed(-number)
            if self._pid is None:
                raise RuntimeFailed("the container's program", "was never reached by the runtime")
            return self._pid
        raise RuntimeFailed(
            "the container's program", "must begin in time", expected=f"{timeout_s} s"
        )

    async def reached(self, *, timeout_s: float) -> int | None:
        """For the clean-up of a start: the pid of the shim's process, None if there is none.

        It may be on its way still when the runtime is done. After `timeout_s`: None.
        """
        with suppress(ShimFailed, RuntimeFailed):
            await self.started(timeout_s=timeout_s)
        return self.first_process()

    def first_process(self) -> int | None:
        """The pid of the shim's process if it has run by now."""
        # What it says of itself does not matter any more, only that it was there.
        with suppress(BlockingIOError):
            while self._receive():
                pass
        return self._pid

    def _receive(self) -> bytes:
        """The next message; empty at the end. Raises `BlockingIOError`."""
        message, control, _, _ = self._ours.recvmsg(
            _STATUS.size, socket.CMSG_SPACE(_CREDENTIALS.size)
        )
        for level, kind, value in control:
            if (level, kind) == (socket.SOL_SOCKET, _SCM_CREDENTIALS):
                self._pid = self._pid or _CREDENTIALS.unpack(value)[0]
        return message


@contextmanager
def open_shim(
    program_argv: Sequence[str],
    environment: Sequence[str],
    *,
    working_dir: str,
    first_fd: int,
    kept_fds: frozenset[int],
) -> Iterator[ShimPipe]:
    """A shim for `program_argv` (its path first) with exactly `environment` (NAME=VALUE).

    The runtime has to hand down 0 to `first_fd` + 1, all in use: the shim is `first_fd` and
    speaks through the next. The program keeps 0, 1, 2 and `kept_fds` (3 to MAX_KEPT_FD,
    below `first_fd`). All descriptors close with the block. Raises `OSError`, and
    `RuntimeFailed` for words that no program can be given.
    """
    try:
        program = shim_program(
            platform.machine(),
            argv=program_argv,
            environment=environment,
            working_dir=working_dir,
            open_files=_open_files(),
            kept_fds=kept_fds,
            status_fd=first_fd + 1,
        )
    except ValueError as error:
        raise RuntimeFailed(
            "the container's program", "must have words that a program can be given", actual=error
        ) from error
    ours, status = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, status:
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        # Descriptors that we are sent the kernel would close in our thread, however long
        # that takes. Kernels before 6.16 cannot refuse them.
        with suppress(OSError):
            ours.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
        program_fd = kernel.executable_in_memory("acon-shim", program)
        try:
            yield ShimPipe(
                shim_argv(first_fd),
                {first_fd: program_fd, first_fd + 1: status.fileno()},
                status,
                ours,
            )
        finally:
            os.close(program_fd)


def _open_files() -> tuple[int, int]:
    """Soft and hard limit: the supervisor has raised the soft one for itself alone."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(OPEN_FILES, hard), hard
