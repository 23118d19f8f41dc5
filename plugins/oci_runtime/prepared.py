"""A container between its first start and its last end: from a measured specification to a
running program, or to nothing at all."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import structlog
import trio

from plugins.oci_runtime.cgroups import ControlGroups
from plugins.oci_runtime.container import Container
from plugins.oci_runtime.gateway import Gateway
from plugins.oci_runtime.invocation import Invocations
from plugins.oci_runtime.output import Output, open_streams
from plugins.oci_runtime.pace import Pace
from plugins.oci_runtime.runtime import OciCommand
from plugins.oci_runtime.scratch import Scratch
from plugins.oci_runtime.shim import (
    SHIM_TIMEOUT_S,
    ChdirFailed,
    ShimFailed,
    ShimPipe,
    first_fd_above,
    open_shim,
)
from plugins.oci_runtime.spawn import Child
from supervisor import Conflict, ContainerSpec, LogSink, Refusal, RuntimeFailed, StartReceipt

DESTROY_TIMEOUT_S = 10
# Of which so much is left for removing by hand what the runtime did not.
FORCE_TIMEOUT_S = 4


class Workshop:
    """What the containers of one supervisor have in common.

    `output_pace` and `exchange_pace` bound the reading of logs and of invoked commands.
    `nursery` owns the tasks that read their output: none, none is read. `command` may be
    replaced until the first container that lasts.
    """

    def __init__(
        self,
        command: OciCommand,
        *,
        gateway: Gateway,
        groups: ControlGroups,
        output_pace: Pace,
        exchange_pace: Pace,
        parallel_starts: int,
        start_timeout_s: float,
        max_invocations: int,
        log: structlog.stdlib.BoundLogger,
    ) -> None:
        self.command = command
        self.gateway = gateway
        self.groups = groups
        self.output_pace = output_pace
        self.exchange_pace = exchange_pace
        self.start_timeout_s = start_timeout_s
        self.max_invocations = max_invocations
        self.log = log
        self.nursery: trio.Nursery | None = None
        # A runtime's start is work for the processor: many at once only share it out.
        self.starting = trio.CapacityLimiter(parallel_starts)


class Prepared:
    """Implements `supervisor.PreparedContainer`. Owns `scratch` and `bundle`, not the root.

    One run at a time: `Container.destroy` of one before the next `start`.
    """

    def __init__(
        self,
        spec: ContainerSpec,
        workshop: Workshop,
        *,
        scratch: Scratch,
        bundle: Path,
        ended: Callable[[], object],
    ) -> None:
        """`ended` is called once, when everything is freed."""
        self._spec = spec
        self._workshop = workshop
        self._scratch = scratch
        self._bundle = bundle
        self._ended = ended
        self._oci_id = str(spec.container_id)
        self._log_file = bundle / "log"
        self._busy = False
        self._run: Container | None = None
        self._closed = False
        self._closing = trio.Lock()

    async def start(self, receipt: StartReceipt, log: LogSink) -> Container:
        """Start exactly what was measured; returns once the program runs.

        Raises `RuntimeFailed` with the runtime's words, with the errno's name if the program
        cannot be executed or its working directory cannot be gone to, or if `receipt` speaks
        of another start; `PolicyDenied` for log
        descriptors that no program can be given; `Conflict` while it runs. When it raises or
        is cancelled nothing of this run is left.
        """
        _require_measured(self._spec, receipt)
        return await self.launch(log)

    async def launch(self, log: LogSink) -> Container:
        """`start` without its receipt: for the probe, whose program is our own."""
        if self._busy or self._closed:
            raise Conflict(f"container {self._oci_id}", "runs already, or is kept no more")
        self._busy = True
        try:
            async with self._workshop.starting:
                container = await self._launch(log)
        except BaseException as error:
            with trio.move_on_after(DESTROY_TIMEOUT_S, shield=True) as scope:
                await self._remove_or_log()
            if scope.cancelled_caught:
                self._workshop.log.error(
                    "remains", container_id=self._oci_id, error="no end in time"
                )
            if isinstance(error, OSError):
                raise RuntimeFailed(
                    f"container {self._oci_id}", "must be startable", actual=error
                ) from error
            raise
        self._run = container
        return container

    async def close(self) -> None:
        """End a run that is left, free scratch space and bundle. Idempotent, never raises."""
        with trio.CancelScope(shield=True):
            async with self._closing:
                if self._closed:
                    return
                self._closed = True
                if self._run is not None:
                    await self._run.destroy()
                with trio.move_on_after(DESTROY_TIMEOUT_S):
                    await trio.to_thread.run_sync(self._free)
                self._ended()

    async def _launch(self, log: LogSink) -> Container:
        spec, workshop = self._spec, self._workshop
        output = Output(log, workshop.output_pace)
        first_fd = first_fd_above(spec.log_fds)
        with (
            open_streams(spec.log_fds, owner=spec.id_map.root) as streams,
            open_shim(
                spec.argv,
                spec.environment,
                working_dir=spec.working_dir,
                first_fd=first_fd,
                kept_fds=frozenset(fd for fd in spec.log_fds if fd > 2),
            ) as shim,
        ):
            # What fills gaps between the descriptors does not matter: the shim closes it.
            filler = dict.fromkeys(range(3, first_fd), shim.fds[first_fd])
            try:
                pid = await self._run_shim(shim, {**filler, **streams.fds, **shim.fds})
                first_process = Child(pid)
            except BaseException:
                await _end_first_process(shim)
                raise
            if workshop.nursery is not None:
                output.start(workshop.nursery, streams)
        return Container(
            self._oci_id,
            first_process,
            output=output,
            invocations=Invocations(
                workshop.command,
                self._oci_id,
                first_pid=first_process.pid,
                bundle=self._bundle,
                max_at_once=workshop.max_invocations,
                pace=workshop.exchange_pace,
            ),
            out_of_memory=lambda: workshop.groups.out_of_memory(self._oci_id),
            clean_up=self._destroy,
        )

    async def _run_shim(self, shim: ShimPipe, fds: Mapping[int, int]) -> int:
        """The pid of the program, which runs. When this raises it may be there all the same."""
        workshop, spec = self._workshop, self._spec
        await trio.to_thread.run_sync(
            workshop.gateway.admit,
            *(spec.container_id, spec.root, self._scratch, spec.socket_path),
        )
        await workshop.command.run_detached(
            self._oci_id,
            self._bundle,
            log_file=self._log_file,
            fds=fds,
            timeout_s=workshop.start_timeout_s,
        )
        try:
            pid = await shim.started(timeout_s=SHIM_TIMEOUT_S)
        except ShimFailed as error:
            raise _refusal(spec, error) from error
        # The container has mounts of its own now; nobody needs ours any more.
        await trio.to_thread.run_sync(
            workshop.gateway.dismiss, spec.container_id, spec.root, self._scratch
        )
        await trio.lowlevel.checkpoint_if_cancelled()
        return pid

    async def _destroy(self, container: Container) -> None:
        workshop = self._workshop
        with trio.move_on_after(DESTROY_TIMEOUT_S, shield=True) as scope:
            with trio.move_on_after(DESTROY_TIMEOUT_S - FORCE_TIMEOUT_S):
                try:
                    await container.kill()
                    await container.invocations.end()
                    await container.output.finish()
                    await workshop.command.delete(self._oci_id, self._log_file)
                except (Refusal, OSError) as error:
                    workshop.log.warning(
                        "the runtime did not delete", container_id=self._oci_id, error=str(error)
                    )
            await self._remove_or_log()
        if scope.cancelled_caught:
            workshop.log.error("remains", container_id=self._oci_id, error="no end in time")
        container.close()

    async def _remove_or_log(self) -> None:
        """By hand whatever of a run the runtime has not removed."""
        try:
            await self._workshop.groups.end(self._oci_id)
            await trio.to_thread.run_sync(self._remove_run)
        except OSError as error:
            self._workshop.log.error("remains", container_id=self._oci_id, error=str(error))
        finally:
            self._run = None
            self._busy = False

    def _remove_run(self) -> None:
        spec = self._spec
        self._workshop.gateway.dismiss(spec.container_id, spec.root, self._scratch)
        state = self._workshop.command.state_dir / self._oci_id
        if os.path.lexists(state):
            shutil.rmtree(state)
        # The next run's words are not to be taken from this one's.
        self._log_file.unlink(missing_ok=True)

    def _free(self) -> None:
        try:
            self._workshop.gateway.forget(self._spec.container_id)
        except OSError as error:
            self._workshop.log.error("remains", container_id=self._oci_id, error=str(error))
        self._scratch.close()
        shutil.rmtree(self._bundle, ignore_errors=True)


async def _end_first_process(shim: ShimPipe) -> None:
    """Kill and reap what the runtime had started by the time that it was interrupted.

    It may be on its way to the shim still.
    """
    # Not our child: the runtime still was its parent, and has reaped it.
    with trio.move_on_after(FORCE_TIMEOUT_S, shield=True), suppress(OSError):
        pid = await shim.reached(timeout_s=SHIM_TIMEOUT_S)
        if pid is None:
            return
        child = Child(pid)
        try:
            child.send_signal(signal.SIGKILL)
            await child.wait()
        finally:
            child.close()


def _refusal(spec: ContainerSpec, failed: ShimFailed) -> RuntimeFailed:
    if isinstance(failed, ChdirFailed):
        rule, expected = "its working directory must be there", spec.working_dir
    else:
        rule, expected = "its program must be executable", spec.argv[0]
    item = f"container {spec.container_id}"
    return RuntimeFailed(item, rule, expected=expected, actual=failed)


def _require_measured(spec: ContainerSpec, receipt: StartReceipt) -> None:
    """The receipt is proof of this start and of no other. Raises `RuntimeFailed`."""
    if not isinstance(receipt, StartReceipt):
        raise RuntimeFailed(
            f"container {spec.container_id}",
            "starts only with the receipt of its measurement",
            actual=type(receipt).__name__,
        )
    for name, wanted, measured in (
        ("image_id", spec.image_id, receipt.event.image_id),
        ("argv", spec.argv, receipt.event.argv),
        ("environment", spec.environment, receipt.event.environment),
    ):
        if wanted != measured:
            raise RuntimeFailed(
                f"container {spec.container_id}",
                f"{name} must be what was measured",
                expected=measured,
                actual=wanted,
            )
