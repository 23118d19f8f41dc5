"""Additional entry points: commands that run beside a container's program, for a stranger.

ACON image spec 1.0, "Additional Entry Points". Such a command is confined exactly as the
program is: its `process` is the container's own, out of the bundle's `config.json`, but for
what is run, and the runtime gives it the container's namespaces, control groups and seccomp
filter. It leads a session, hence a process group, of its own. Its parent is us (the runtime
is gone by the time that it runs, and we are the subreaper), so its end is ours to take
notice of; what it leaves behind inside becomes the child of the container's first process.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import msgspec
import trio

from plugins.oci_runtime.exchange import Exchange, open_exchange
from plugins.oci_runtime.pace import Pace
from plugins.oci_runtime.runtime import OciCommand
from plugins.oci_runtime.shim import SHIM_TIMEOUT_S, ExecFailed, ShimFailed, open_shim
from plugins.oci_runtime.shim_program import FIRST_FREE_FD
from plugins.oci_runtime.spawn import Child
from plugins.oci_runtime.strays import Strays
from supervisor import (
    Busy,
    Conflict,
    DeadlineExceeded,
    ExitStatus,
    Invocation,
    InvocationResult,
    RuntimeFailed,
    UnknownItem,
)

ENTRY_POINTS = "/lib/acon/entrypoint.d"
START_TIMEOUT_S = 10
KILLED_S = 3
REMOVED_S = 3
# What execve(2) says of a path that does not lead to a program.
NO_SUCH_PROGRAM = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ENOEXEC, errno.ELOOP)


class _IdMapping(msgspec.Struct, frozen=True):
    containerID: int
    hostID: int


class _Linux(msgspec.Struct, frozen=True):
    uidMappings: tuple[_IdMapping, ...]


class _Config(msgspec.Struct, frozen=True):
    """What is read of `config.json`."""

    process: dict[str, object]
    linux: _Linux

    @property
    def root(self) -> int:
        return next(one.hostID for one in self.linux.uidMappings if one.containerID == 0)


class Invocations:
    """All commands in one run of a container. `end` must be called when the run ends."""

    def __init__(
        self,
        command: OciCommand,
        oci_id: str,
        *,
        first_pid: int,
        bundle: Path,
        max_at_once: int,
        pace: Pace,
    ) -> None:
        """`first_pid` is the container's first process, as we see it; `bundle` the folder with
        `config.json`: files of ours come and go in it."""
        self._command = command
        self._oci_id = oci_id
        self._bundle = bundle
        self._max_at_once = max_at_once
        self._pace = pace
        self._numbers = itertools.count(1)
        self._scopes: set[trio.CancelScope] = set()
        self._strays = Strays(first_pid)
        self._over = False
        self._enders = trio.lowlevel.ParkingLot()

    async def run(self, invocation: Invocation) -> InvocationResult:
        """From a name to how the command ended.

        Raises what `RunningContainer.invoke` says; `Conflict` here means that `end` was
        called. When it raises or is cancelled, the command's process group is gone.
        """
        if self._over:
            raise self._ended()
        if len(self._scopes) >= self._max_at_once:
            raise Busy(
                f"container {self._oci_id}",
                "may have only so many invocations under way",
                expected=self._max_at_once,
            )
        scope = trio.CancelScope()
        self._scopes.add(scope)
        try:
            with scope:
                return await self._run(invocation)
            raise self._ended()
        except OSError as error:
            raise RuntimeFailed(
                f"entry point {invocation.entry_point}", "must be preparable", actual=error
            ) from error
        finally:
            self._scopes.discard(scope)
            self._enders.unpark_all()

    async def end(self) -> None:
        """Refuse further ones, and end those under way. Idempotent; bounded by what each takes."""
        self._over = True
        for scope in self._scopes:
            scope.cancel()
        while self._scopes:
            await self._enders.park()

    async def _run(self, invocation: Invocation) -> InvocationResult:
        config = await trio.to_thread.run_sync(self._read_config)
        with open_exchange(
            invocation.stdin,
            capture_bytes=invocation.capture_bytes,
            owner=config.root,
            pace=self._pace,
        ) as exchange:
            async with self._strays.start():
                child = await self._start(invocation, config, exchange)
                self._strays.owned.add(child.pid)
            try:
                exchange.close_theirs()
                code = await _converse(child, exchange, timeout_s=invocation.timeout_s)
            finally:
                await _end(child)
                self._strays.owned.discard(child.pid)
            if code is None:
                raise DeadlineExceeded(
                    f"entry point {invocation.entry_point}",
                    "must end in time",
                    expected=f"{invocation.timeout_s:g} s",
                )
            return InvocationResult(
                status=ExitStatus(exit_code=code) if code >= 0 else ExitStatus(signal=-code),
                stdout=bytes(exchange.stdout),
                stderr=bytes(exchange.stderr),
                stdout_cut=exchange.stdout.cut,
                stderr_cut=exchange.stderr.cut,
            )

    async def _start(self, invocation: Invocation, config: _Config, exchange: Exchange) -> Child:
        """The command, running; the caller ends it. Nothing is left when this raises."""
        folder = self._bundle / f"invocation-{next(self._numbers)}"
        path = f"{ENTRY_POINTS}/{invocation.entry_point}"
        with open_shim(
            (path, *invocation.arguments),
            invocation.environment,
            working_dir="/",
            first_fd=FIRST_FREE_FD,
            kept_fds=frozenset(),
        ) as shim:
            try:
                process = {**config.process, "args": list(shim.argv)}
                await trio.to_thread.run_sync(_write_process, folder, process)
                await self._command.exec_detached(
                    self._oci_id,
                    folder,
                    fds={**exchange.theirs, **shim.fds},
                    timeout_s=START_TIMEOUT_S,
                )
                return Child(await shim.started(timeout_s=SHIM_TIMEOUT_S))
            except BaseException as error:
                # Who has not come to the shim has not told us its pid; the runtime has.
                with trio.move_on_after(KILLED_S, shield=True), suppress(OSError, ValueError):
                    pid_text = await trio.to_thread.run_sync((folder / "pid").read_text)
                    await _end(Child(int(pid_text)))
                if isinstance(error, ShimFailed):
                    raise _refusal(path, error) from error
                raise
            finally:
                with trio.move_on_after(REMOVED_S, shield=True):
                    await trio.to_thread.run_sync(_remove, folder)

    def _read_config(self) -> _Config:
        raw = (self._bundle / "config.json").read_bytes()
        return msgspec.json.decode(raw, type=_Config)

    def _ended(self) -> Conflict:
        return Conflict(f"container {self._oci_id}", "has ended already")


async def _converse(child: Child, exchange: Exchange, *, timeout_s: float) -> int | None:
    """Until the command has ended; its exit code, or -signal; None: it did not end in time."""
    code = None
    lost = None
    with trio.move_on_after(timeout_s):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(exchange.run)
            try:
                code = await child.wait()
            except ChildProcessError as error:
                lost = error
            nursery.cancel_scope.cancel()
    if lost is not None:
        raise lost
    if code is not None:
        await exchange.drain()
    return code


async def _end(child: Child) -> None:
    """Kill the command with its process group unless it has ended, and reap it. Bounded."""
    with trio.move_on_after(KILLED_S, shield=True), suppress(OSError):
        if not child.ended:
            # It leads its session, so it cannot leave its group; and while it is not reaped
            # nobody else can have a group of this number.
            os.killpg(child.pid, signal.SIGKILL)
            await child.wait()
    child.close()


def _refusal(path: str, failed: ShimFailed) -> UnknownItem | RuntimeFailed:
    if isinstance(failed, ExecFailed) and failed.errno in NO_SUCH_PROGRAM:
        return UnknownItem(f"entry point {path}", "must be a program there", actual=failed)
    return RuntimeFailed(f"entry point {path}", "must be executable", actual=failed)


def _write_process(folder: Path, process: dict[str, object]) -> None:
    folder.mkdir(mode=0o700)
    (folder / "process.json").write_bytes(msgspec.json.encode(process))


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
