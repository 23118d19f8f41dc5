"""The worker process, seen from the daemon: compressed bytes go in, plain ones come out."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import trio

from plugins.image_store.inflate import worker
from plugins.image_store.inflate.confinement import MAX_MEMORY_BYTES
from plugins.image_store.inflate.damage import RULES
from plugins.image_store.mount.kernel import refused_by_kernel
from supervisor import Refusal, RuntimeFailed, Untrusted

Compression = Literal["gzip", "zstd"]

# What the kernel grants everybody (pipe(7), pipe-max-size): fewer turns for each megabyte.
PIPE_BYTES = 1 << 20
REAP_TIMEOUT_S = 10
MAX_WORDS = 400
# The worker is killed by these for what the stream made it do, and by others if at all by
# somebody's hand or for want of memory.
CRASHES = frozenset({signal.SIGSYS, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGABRT})

# Isolated (-I) and without site-packages (-S), both for speed and so that nothing but
# this folder and one library is imported. The empty stand-ins keep `plugins.image_store`
# from importing the whole plugin.
START = """\
import sys, types
compression, folder, libraries = sys.argv[1:]
for name in ("plugins", "plugins.image_store"):
    package = sys.modules[name] = types.ModuleType(name)
    package.__path__ = [folder]
sys.path.append(libraries)
from plugins.image_store.inflate.worker import main
main(compression)
"""


class Inflater:
    """One worker, and our ends of its pipes.

    `feed`, `end_input` and `take` block and belong into threads, one for what goes in and
    one for what comes out. They only return once the worker goes on or ends: whoever uses
    them runs `watch` in the same nursery, so that a cancelled nursery ends them.
    """

    def __init__(
        self, process: trio.Process, item: str, stdin_fd: int, stdout_fd: int, stderr_fd: int
    ) -> None:
        self._process = process
        self._item = item
        self._stdin_fd: int | None = stdin_fd
        self._stdout_fd = stdout_fd
        self._stderr_fd = stderr_fd

    @property
    def pid(self) -> int:
        return self._process.pid

    def feed(self, data: bytes) -> bool:
        """Give it compressed bytes. False if it takes no more; `refusal` will say why."""
        if self._stdin_fd is None:
            raise RuntimeError("the worker's input has ended already")
        try:
            written_bytes = 0
            while written_bytes < len(data):
                written_bytes += os.write(self._stdin_fd, memoryview(data)[written_bytes:])
        except BrokenPipeError:
            return False
        return True

    def end_input(self) -> None:
        """There are no more compressed bytes. Idempotent."""
        if self._stdin_fd is not None:
            os.close(self._stdin_fd)
            self._stdin_fd = None

    def take(self, buffer: memoryview) -> int:
        """Fill the front of `buffer` with plain bytes; how many, 0 at the end."""
        return os.readv(self._stdout_fd, [buffer])

    async def watch(self) -> None:
        """Wait until the worker has ended. When cancelled: kill it and wait, bounded."""
        try:
            await self._process.wait()
        finally:
            await self.kill()

    async def kill(self) -> None:
        """Idempotent, shielded; does not wait longer than `REAP_TIMEOUT_S`."""
        if self._process.returncode is None:
            self._process.kill()
            with trio.move_on_after(REAP_TIMEOUT_S, shield=True):
                await self._process.wait()

    def refusal(self) -> Refusal | None:
        """Once it has ended, and once: why its output must not be used, or None."""
        status = self._process.returncode
        if status == 0:
            return None
        rule, _, detail = self._words().partition("\t")
        if status == worker.DAMAGED and rule in RULES:
            return Untrusted(self._item, rule, actual=detail)
        if status == worker.OUT_OF_MEMORY:
            return Untrusted(
                self._item,
                "must be decompressible in bounded memory",
                expected=f"at most {MAX_MEMORY_BYTES} bytes",
            )
        if status == worker.UNCONFINED:
            return RuntimeFailed(
                self._item,
                "the decompressor could not give up all its rights, so it read nothing",
                actual=f"{rule}: {detail}",
            )
        if status is not None and -status in CRASHES:
            return Untrusted(self._item, "must not break its decompressor", actual=_ending(status))
        return RuntimeFailed(
            self._item, "the decompressor must come to its end", actual=_ending(status)
        )

    def _words(self) -> str:
        """What it said, as far as it is printable: it may be in a stranger's hands."""
        with contextlib.suppress(BlockingIOError):
            said = os.read(self._stderr_fd, MAX_WORDS).decode("ascii", "replace")
            return "".join(letter for letter in said if letter.isprintable() or letter == "\t")
        return ""

    def _close(self) -> None:
        self.end_input()
        os.close(self._stdout_fd)
        os.close(self._stderr_fd)


@asynccontextmanager
async def inflating(compression: Compression, *, item: str) -> AsyncIterator[Inflater]:
    """Start a worker that decompresses one stream; at exit it is gone, in every case.

    `item` names the stream in refusals. Raises `RuntimeFailed` if it cannot be started.
    """
    with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
        with refused_by_kernel(item, "the decompressor could not be started"):
            their_stdin, stdin = _pipe(theirs, ours)
            stdout, their_stdout = _pipe(ours, theirs)
            stderr, their_stderr = _pipe(ours, theirs)
            for fd in (stdin, stdout):
                # Without the right to it a pipe stays as it is, only slower.
                with contextlib.suppress(PermissionError):
                    fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
            os.set_blocking(stderr, False)
            process = await trio.lowlevel.open_process(
                _command(compression),
                stdin=their_stdin,
                stdout=their_stdout,
                stderr=their_stderr,
                env={},
                cwd="/",
                # Ctrl-C at the daemon's terminal is the daemon's to handle.
                start_new_session=True,
            )
        inflater = Inflater(process, item, stdin, stdout, stderr)
        ours.pop_all()
        try:
            theirs.close()
            yield inflater
        finally:
            try:
                await inflater.kill()
            finally:
                inflater._close()


def _ending(status: int | None) -> str:
    if status is None:
        return "it does not end"
    if status >= 0:
        return f"status {status}"
    # Real-time signals have no names but the first and the last.
    return signal.Signals(-status).name if -status < signal.SIGRTMIN else f"signal {-status}"


def _pipe(reader: contextlib.ExitStack, writer: contextlib.ExitStack) -> tuple[int, int]:
    """Read end and write end, each closed by its stack."""
    ends = os.pipe()
    for stack, fd in zip((reader, writer), ends, strict=True):
        stack.callback(os.close, fd)
    return ends


def _command(compression: Compression) -> list[str]:
    library = importlib.util.find_spec(worker.LIBRARIES[compression])
    if library is None or library.origin is None:
        raise FileNotFoundError(f"{worker.LIBRARIES[compression]} is not installed")
    folder = str(Path(worker.__file__).parent.parent)
    libraries = str(Path(library.origin).parent.parent)
    return [sys.executable, "-I", "-S", "-c", START, compression, folder, libraries]
