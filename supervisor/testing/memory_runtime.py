"""A container runtime in memory: its programs do nothing until a test ends them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import trio

from supervisor.container_seams import (
    ContainerSpec,
    ExitStatus,
    Invocation,
    InvocationResult,
    LogSink,
    PreparedContainer,
    RunningContainer,
)
from supervisor.errors import Conflict, DeadlineExceeded, RuntimeFailed
from supervisor.proofs import StartReceipt

MEMORY_BYTES = 1_000_000


class MemoryProcess:
    """`container_seams.RunningContainer`. `end` makes it exit, `log` takes its output.

    `signals` are those that reached it, negative for its group; it ends from the first unless
    `is_deaf`. An invocation ends at once with what it was given on stdin, or, while
    `invocations_hang`, when it is late, cancelled or the container ends.
    """

    def __init__(
        self, runtime: MemoryRuntime, spec: ContainerSpec, receipt: StartReceipt, log: LogSink
    ) -> None:
        self._runtime = runtime
        self.spec = spec
        self.receipt = receipt
        self.log = log
        self.signals: list[int] = []
        self.is_deaf = False
        self.invoked: list[Invocation] = []
        self.invocations_hang = False
        self._ended = trio.Event()
        self._status = ExitStatus(exit_code=0)
        runtime.started += 1
        self._pid = 100_000 + runtime.started
        runtime.running[spec.container_id] = self

    @property
    def pid(self) -> int:
        return self._pid

    @property
    def has_ended(self) -> bool:
        return self._ended.is_set()

    def end(self, status: ExitStatus) -> None:
        """Exit; the first status stays."""
        if not self._ended.is_set():
            self._status = status
            self._ended.set()

    async def wait(self) -> ExitStatus:
        await self._ended.wait()
        return self._status

    async def signal(self, signum: int, *, whole_group: bool) -> None:
        await trio.lowlevel.checkpoint()
        self._require_running()
        self.signals.append(-signum if whole_group else signum)
        if not self.is_deaf:
            self.end(ExitStatus(signal=signum))

    async def invoke(self, invocation: Invocation) -> InvocationResult:
        await trio.lowlevel.checkpoint()
        self._require_running()
        self.invoked.append(invocation)
        if self.invocations_hang:
            with trio.move_on_after(invocation.timeout_s):
                await self._ended.wait()
                self._require_running()
            raise DeadlineExceeded(
                invocation.entry_point, "must end in time", expected=f"{invocation.timeout_s:g} s"
            )
        return InvocationResult(
            status=ExitStatus(exit_code=0),
            stdout=invocation.stdin[: invocation.capture_bytes],
            stderr=b"",
            stdout_cut=len(invocation.stdin) > invocation.capture_bytes,
            stderr_cut=False,
        )

    async def destroy(self) -> None:
        self.end(ExitStatus(signal=9))
        if self._runtime.running.get(self.spec.container_id) is self:
            del self._runtime.running[self.spec.container_id]

    def _require_running(self) -> None:
        if self.has_ended:
            raise Conflict(f"container {self.spec.container_id}", "has ended already")


class MemoryPrepared:
    """`container_seams.PreparedContainer`. `files` stands for what programs wrote: it lasts
    over the runs."""

    def __init__(self, runtime: MemoryRuntime, spec: ContainerSpec) -> None:
        self._runtime = runtime
        self.spec = spec
        self.files: dict[str, bytes] = {}
        runtime.prepared[spec.container_id] = self

    async def start(self, receipt: StartReceipt, log: LogSink) -> RunningContainer:
        return await self._runtime.start(self.spec, receipt, log)

    async def close(self) -> None:
        self._runtime.prepared.pop(self.spec.container_id, None)


class MemoryRuntime:
    """`container_seams.ContainerRuntime`; `prepared` and `running` hold what is not freed yet.

    Refuses what a real one could not do: two runs of one container at once, a run without
    its scratch, a root that cannot be seen, a socket that nobody listens on.
    """

    def __init__(self) -> None:
        self.running: dict[int, MemoryProcess] = {}
        self.prepared: dict[int, MemoryPrepared] = {}
        self.started = 0
        self.notes: tuple[str, ...] = ()

    async def prepare(self, spec: ContainerSpec) -> PreparedContainer:
        prepared = MemoryPrepared(self, spec)
        try:
            await trio.lowlevel.checkpoint()
        except trio.Cancelled:
            await prepared.close()
            raise
        return prepared

    async def start(
        self, spec: ContainerSpec, receipt: StartReceipt, log: LogSink
    ) -> RunningContainer:
        """One run, for `MemoryPrepared.start`."""
        item = f"container {spec.container_id}"
        if spec.container_id in self.running:
            raise RuntimeFailed(item, "its last run is not destroyed yet")
        if spec.container_id not in self.prepared:
            raise RuntimeFailed(item, "is not prepared")
        if not spec.socket_path.is_socket():
            raise RuntimeFailed(item, "has no socket", actual=spec.socket_path)
        spec.root.attach(Path("/memory", str(spec.container_id)))
        try:
            await trio.lowlevel.checkpoint()
        finally:
            spec.root.detach()
        return MemoryProcess(self, spec, receipt, log)

    async def memory_bytes(self, container_ids: Sequence[int]) -> dict[int, int]:
        await trio.lowlevel.checkpoint()
        return {number: MEMORY_BYTES for number in container_ids if number in self.running}
