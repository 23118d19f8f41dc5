"""The seam behind which a plugin runs containers with a real OCI runtime.

What every method raises: `Refusal` subclasses only (anything else counts as
`RuntimeFailed`). All async methods are cancellable at every checkpoint unless they say
otherwise, and leave nothing behind when cancelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import msgspec

from supervisor.proofs import StartReceipt
from supervisor.seams import IdMap, Rootfs


class ContainerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a runtime must know to run one container, the same for all of its runs."""

    container_id: int
    image_id: str
    root: Rootfs
    argv: tuple[str, ...]
    environment: tuple[str, ...]  # NAME=VALUE; the program gets these and no others
    working_dir: str
    id_map: IdMap
    writable_root: bool
    no_new_privileges: bool
    log_fds: tuple[int, ...]
    socket_path: Path  # a listening Unix socket during a start, to appear as /run/acon.sock


class ExitStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Exactly one of exit code and signal is set.

    `out_of_memory`: the kernel killed something in the container for its memory limit.
    """

    exit_code: int | None = None
    signal: int | None = None
    out_of_memory: bool = False


class Invocation(msgspec.Struct, frozen=True, kw_only=True):
    """A call of an additional entry point (ACON image spec, "Additional Entry Points").

    `entry_point` is the name of a file in `/lib/acon/entrypoint.d/`; `environment`
    (NAME=VALUE) is all that the command gets. Of each output at most `capture_bytes` are
    kept. `timeout_s` after its start the whole process group is killed.
    """

    entry_point: str
    arguments: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()
    stdin: bytes = b""
    capture_bytes: int
    timeout_s: float


class InvocationResult(msgspec.Struct, frozen=True, kw_only=True):
    """How the command ended and what it wrote; `*_cut` says that it wrote more."""

    status: ExitStatus
    stdout: bytes
    stderr: bytes
    stdout_cut: bool
    stderr_cut: bool


class LogSink(Protocol):
    """Where a runtime puts what came through the descriptors in `log_fds`."""

    def write(self, fd: int, chunk: bytes) -> None:
        """Keep (some of) it, with the time. Never blocks, never raises, bounded in memory."""


@runtime_checkable
class RunningContainer(Protocol):
    """One run of a container. `destroy` must be called, also after it exited."""

    @property
    def pid(self) -> int:
        """Of its first process, in the supervisor's pid namespace."""

    async def wait(self) -> ExitStatus:
        """Until the first process has ended. May be called more than once."""

    async def signal(self, signum: int, *, whole_group: bool) -> None:
        """Send a signal to pid 1 of the container or to its whole process group."""

    async def invoke(self, invocation: Invocation) -> InvocationResult:
        """Run an additional entry point inside; returns when the command ends.

        Raises `UnknownItem` if there is no such entry point, `Busy` when too many are under
        way, `Conflict` if the container has ended, `DeadlineExceeded` after `timeout_s`;
        then, and when cancelled, the command's process group is gone.
        """

    async def destroy(self) -> None:
        """Kill what is left, remove cgroup and runtime state. Idempotent, bounded, never raises."""


@runtime_checkable
class PreparedContainer(Protocol):
    """What a container keeps over all of its runs: `/tmp`, `/run` and what was written there."""

    async def start(self, receipt: StartReceipt, log: LogSink) -> RunningContainer:
        """Start what `receipt` says was measured; returns once the program runs.

        The next start may follow when the run before is destroyed. Raises `RuntimeFailed`
        with the runtime's words. When it raises or is cancelled nothing of this run is left.
        """

    async def close(self) -> None:
        """Free it; all runs are destroyed by then. Idempotent, never raises, shielded inside."""


@runtime_checkable
class ContainerRuntime(Protocol):
    """Runs containers with a real OCI runtime."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for the status: what a killed predecessor had left and was ended, which
        limits this machine cannot keep. Known once the plugin's lifespan has started."""

    async def prepare(self, spec: ContainerSpec) -> PreparedContainer:
        """Make what lasts over the runs; `close` must follow. Raises `RuntimeFailed`."""

    async def memory_bytes(self, container_ids: Sequence[int]) -> dict[int, int]:
        """Memory that running containers use now; those unknown are left out."""
