"""One container's life, in one task: its root, its scratch, and run after run until the end.

A run has a socket and a process; the root and the scratch outlast it:

    root mounted, scratch prepared
      -> run: socket, start, wait for the end, destroy, socket gone
      -> kept for a restart, invisible, or restarted at once  -> the next run
      -> freed

A start that was measured may be repeated without being measured again: the log says what
may run, the status what runs (design, "Measurement").
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import structlog
import trio

from supervisor.background import background
from supervisor.container import Container
from supervisor.container_seams import (
    ContainerRuntime,
    ContainerSpec,
    ExitStatus,
    PreparedContainer,
    RunningContainer,
)
from supervisor.container_socket import container_socket
from supervisor.errors import Conflict, DeadlineExceeded, Refusal, RuntimeFailed
from supervisor.events import ContainerExited, ContainerStarted
from supervisor.instances import Instance
from supervisor.kept_containers import KeptContainers
from supervisor.measurement import Measurement
from supervisor.plugin_host import PluginHost
from supervisor.restart import Restart
from supervisor.seam_guard import require_type, seam, undo
from supervisor.seams import LayerStore, Rootfs

SIGKILL = 9

log = structlog.stdlib.get_logger("supervisor.containers")
ServeSocket = Callable[[trio.SocketListener, Container], Awaitable[None]]


class Surroundings(NamedTuple):
    """What every container's task works with, the same for all of them."""

    store: LayerStore
    runtime: ContainerRuntime
    measurement: Measurement
    host: PluginHost
    kept: KeptContainers
    socket_dir: Path
    serve_socket: ServeSocket
    start_timeout_s: float


class ContainerLife:
    """Brings `container` to life and clears it away; holds `instance` and frees it.

    `started` is called when the first run runs, in one step with what is shown of it.
    """

    def __init__(
        self,
        container: Container,
        instance: Instance,
        around: Surroundings,
        started: Callable[[], None],
    ) -> None:
        self._container = container
        self._instance = instance
        self._around = around
        self._started = started
        self._id = container.container_id
        self._has_started = False
        self._socket_path = around.socket_dir / f"{self._id}.sock"

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        """Until it is freed; started when its program runs.

        A first start that fails raises, and nothing is left. What fails later ends this
        container only. Cancelled: the run is killed, everything is freed, bounded.
        """
        failure: Exception | None = None
        try:
            await self._live(task_status)
        except Exception as error:
            if not self._has_started:
                raise
            failure = error
            tell = log.warning if isinstance(error, Refusal) else log.error
            tell("container given up", container_id=self._id, error=repr(error))
        finally:
            self._clear(failure)

    def _clear(self, failure: Exception | None) -> None:
        container = self._container
        self._around.kept.remove(container)
        self._instance.free()
        restart, container.restart = container.restart, None
        container.is_freed()
        if restart is not None:
            restart.finish(self._refusal(failure))

    def _refusal(self, failure: Exception | None) -> Refusal:
        """Why the restart that was under way came to nothing."""
        if failure is None:
            return Conflict(self._container.item, "was ended while it was restarted")
        if isinstance(failure, Refusal):
            return failure
        return RuntimeFailed(self._container.item, "its restart failed", actual=repr(failure))

    # --- what lasts over the runs -------------------------------------------------------------

    async def _live(self, task_status: trio.TaskStatus[None]) -> None:
        container = self._container
        with seam(container.image_id, "the layer store's mount"):
            rootfs = await self._around.store.mount(
                container.start.layers,
                container_id=self._id,
                id_map=container.id_map,
                writable=container.manifest.writable_fs,
            )
        require_type(rootfs, Rootfs, item=container.image_id)
        try:
            with seam(container.image_id, "the runtime's prepare"):
                prepared = await self._around.runtime.prepare(self._spec(rootfs))
            require_type(prepared, PreparedContainer, item=container.image_id)
            try:
                await self._run_and_run_again(prepared, task_status)
            finally:
                await undo(container.image_id, "the scratch's close", prepared.close)
        finally:
            await undo(container.image_id, "the root's close", rootfs.close)

    def _spec(self, rootfs: Rootfs) -> ContainerSpec:
        container = self._container
        manifest = container.manifest
        return ContainerSpec(
            container_id=self._id,
            image_id=container.image_id,
            root=rootfs,
            argv=manifest.entrypoint,
            environment=container.start.receipt.event.environment,
            working_dir=manifest.working_dir,
            id_map=container.id_map,
            writable_root=manifest.writable_fs,
            no_new_privileges=not manifest.uids,
            log_fds=manifest.log_fds,
            socket_path=self._socket_path,
        )

    async def _run_and_run_again(
        self, prepared: PreparedContainer, task_status: trio.TaskStatus[None]
    ) -> None:
        def first_runs() -> None:
            self._has_started = True
            self._started()
            task_status.started()

        await self._run_once(prepared, None, first_runs)
        while (restart := await self._next_restart()) is not None:
            self._around.measurement.require_running()
            self._container.starts_again()
            restart.scope.deadline = trio.current_time() + self._around.start_timeout_s
            await self._run_once(prepared, restart, partial(self._runs_again, restart))

    def _runs_again(self, restart: Restart) -> None:
        self._container.restart = None
        restart.finish()

    async def _next_restart(self) -> Restart | None:
        """After a run: the restart that comes next, or none, and then nothing is kept."""
        container = self._container
        if container.restart is None:
            self._instance.free()
            if container.has_files:
                with trio.move_on_at(container.ended_at + self._around.kept.keep_s):
                    await container.wanted.wait()
        # No checkpoint from here on: who asks for a restart is served, or finds nothing kept.
        restart = container.restart
        if restart is None or restart.instance is None:
            self._around.kept.give_up(container)
            return None
        self._around.kept.remove(container)
        if restart.instance is not self._instance:
            self._instance.free()
            self._instance = restart.instance
        restart.require_wanted()
        return restart

    # --- one run ------------------------------------------------------------------------------

    async def _run_once(
        self, prepared: PreparedContainer, restart: Restart | None, begun: Callable[[], None]
    ) -> None:
        try:
            with container_socket(self._socket_path) as listener:
                # Served before the program runs: it may ask in its first instruction.
                async with background(lambda: self._serve(listener)):
                    running = await self._start(prepared, restart)
                    try:
                        if restart is not None:
                            restart.require_wanted()
                        self._show_start(running)
                        begun()
                        self._end(await self._wait(running))
                    finally:
                        await undo(self._container.image_id, "the run's destroy", running.destroy)
                        self._was_killed()
        finally:
            self._container.log.end_run()

    async def _start(
        self, prepared: PreparedContainer, restart: Restart | None
    ) -> RunningContainer:
        container = self._container
        # A first start is bounded and cancelled by who waits for it.
        scope = trio.CancelScope() if restart is None else restart.scope
        with scope:
            with seam(container.image_id, "the runtime's start"):
                running = await prepared.start(container.start.receipt, container.log)
            require_type(running, RunningContainer, item=container.image_id)
            return running
        if restart is not None:
            restart.require_wanted()
        raise DeadlineExceeded(
            container.item, "must start in time", expected=f"{self._around.start_timeout_s:g} s"
        )

    async def _wait(self, running: RunningContainer) -> ExitStatus:
        with seam(self._container.image_id, "the runtime's wait"):
            status = await running.wait()
        require_type(status, ExitStatus, item=self._container.image_id)
        return status

    def _show_start(self, running: RunningContainer) -> None:
        self._container.runs(running)
        self._around.host.emit(
            ContainerStarted(
                container_id=self._id,
                image_id=self._container.image_id,
                pid=running.pid,
                restarts=self._container.restarts,
            )
        )

    def _end(self, status: ExitStatus) -> None:
        """In one step: it is shown, and whether there will be another run is open or not."""
        self._show_end(status)
        restart = self._container.restart
        if restart is None:
            self._instance.end()
            self._around.kept.add(self._container)
        else:
            restart.accept(self._instance)

    def _was_killed(self) -> None:
        """A run whose end was not awaited has ended now: it was destroyed."""
        if self._container.running is not None:
            self._container.give_up_files()
            self._show_end(ExitStatus(signal=SIGKILL))

    def _show_end(self, status: ExitStatus) -> None:
        self._container.ends(status)
        self._around.host.emit(
            ContainerExited(
                container_id=self._id,
                image_id=self._container.image_id,
                exit_code=status.exit_code,
                signal=status.signal,
                out_of_memory=status.out_of_memory,
            )
        )

    async def _serve(self, listener: trio.SocketListener) -> None:
        try:
            await self._around.serve_socket(listener, self._container)
        except* Exception as error:  # also beside a Cancelled, which goes on
            log.error("container socket failed", container_id=self._id, error=repr(error))
