"""All containers of a supervisor's life, and what its clients may have done to them.

A start is decided, judged and measured first (`starting`); only the receipt of that
measurement can start a process. One task owns each container from its mount over all of
its runs to its clean-up (`container_life`), and one nursery owns these tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import structlog
import trio

from supervisor.admission import Admission
from supervisor.config import ContainersConfig
from supervisor.container import Container
from supervisor.container_life import ContainerLife, ServeSocket, Surroundings
from supervisor.container_log import ContainerLog
from supervisor.container_seams import (
    ContainerRuntime,
    Invocation,
    InvocationResult,
    RunningContainer,
)
from supervisor.errors import (
    Conflict,
    DeadlineExceeded,
    FormatError,
    PolicyDenied,
    Refusal,
    UnknownItem,
)
from supervisor.events import ContainerInvoked, ContainerSignalled
from supervisor.formats.status import ContainerStatus
from supervisor.id_ranges import IdRanges
from supervisor.instances import Instances
from supervisor.invocation_rules import check_invocation
from supervisor.kept_containers import KeptContainers
from supervisor.layers import Layers
from supervisor.measurement import Measurement
from supervisor.operations import ContainerView, LogPage
from supervisor.plugin_host import PluginHost
from supervisor.restart import Restart
from supervisor.seam_guard import CLEANUP_TIMEOUT_S, deadline, require_type, seam
from supervisor.seams import LayerStore
from supervisor.starting import Starting

SIGTERM = 15
# What a runtime may take to pass one signal on; the next container waits for its own.
SIGNAL_TIMEOUT_S = 2
MEMORY_TIMEOUT_S = 10
MAX_RESTART_TIMEOUT_S = 86_400

log = structlog.stdlib.get_logger("supervisor.containers")


class Containers:
    """All containers of this supervisor's life. `run` owns their tasks."""

    def __init__(
        self,
        *,
        admission: Admission,
        layers: Layers,
        measurement: Measurement,
        host: PluginHost,
        store: LayerStore,
        runtime: ContainerRuntime,
        config: ContainersConfig,
        socket_dir: Path,
        serve_socket: ServeSocket,
    ) -> None:
        self._admission = admission
        self._layers = layers
        self._measurement = measurement
        self._host = host
        self._runtime = runtime
        self._config = config
        self._starting = Starting(
            admission=admission, layers=layers, measurement=measurement, host=host
        )
        self._instances = Instances(config.max_running)
        self._kept = KeptContainers(keep_s=config.keep_exited_s, max_kept=config.max_kept_exited)
        self._around = Surroundings(
            store=store,
            runtime=runtime,
            measurement=measurement,
            host=host,
            kept=self._kept,
            socket_dir=socket_dir,
            serve_socket=serve_socket,
            start_timeout_s=config.start_timeout_s,
        )
        self._ids = IdRanges(config.first_id)
        self._containers: dict[int, Container] = {}
        self._last_id = 0
        # None while nothing may start: before `run`, and from the beginning of the stop on.
        self._nursery: trio.Nursery | None = None

    # --- their tasks --------------------------------------------------------------------------

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        """Own the containers' tasks until cancelled; then every container is killed."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    async def stop_all(self) -> None:
        """Ask every container to end, the latest first, and wait for at most `stop_timeout_s`.

        Nothing is started or kept from here on. What has not ended then is killed when `run`
        is cancelled.
        """
        self._nursery = None
        self._kept.close()
        for container in self._containers.values():
            if container.restart is not None:
                self._abandon(container, container.restart, "the supervisor is shutting down")
        alive = [one for one in self._containers.values() if not one.freed.is_set()]
        with trio.move_on_after(self._config.stop_timeout_s):
            for container in reversed(alive):
                await self._ask_to_end(container)
            for container in alive:
                await container.freed.wait()

    async def _ask_to_end(self, container: Container) -> None:
        if container.running is None:
            return
        signals = container.manifest.signals
        first = signals[0] if signals and signals[0] else SIGTERM
        try:
            with deadline(container.item, "must be signalled in time", SIGNAL_TIMEOUT_S):
                await self._send(container, container.running, first)
        except Refusal as error:
            log.warning("stop failed", container_id=container.container_id, error=str(error))

    # --- start --------------------------------------------------------------------------------

    async def start(self, image_id: str, requested: Sequence[str]) -> Container:
        """Judge, measure and start; returns once the process runs.

        Raises `UnknownItem`, `Conflict`, `PolicyDenied`, `DelegationUnresolved`, `Denied`,
        `MeasurementHalted`, `RuntimeFailed` or `DeadlineExceeded`. When it raises or is
        cancelled no container is left, though its start may have been measured.
        """
        image = self._admission.require(image_id)
        instance = self._instances.reserve(image)
        try:
            start = await self._starting.measure(image, requested)
            async with self._layers.starting(start.layers):
                nursery = self._require_nursery(image_id)
                self._last_id += 1
                container = Container(
                    self._last_id,
                    start,
                    self._ids.draw(image.signed.manifest.uids),
                    ContainerLog(kept_bytes=self._config.log_kib * 1024),
                )
                life = ContainerLife(
                    container, instance, self._around, lambda: self._remember(container)
                )
                with trio.move_on_after(self._config.start_timeout_s):
                    await nursery.start(life.run)
                    return container
            raise DeadlineExceeded(
                image_id, "must start in time", expected=f"{self._config.start_timeout_s} s"
            )
        except BaseException:
            instance.free()
            raise

    def _require_nursery(self, item: str) -> trio.Nursery:
        if self._nursery is None:
            raise Conflict(item, "the supervisor is shutting down")
        return self._nursery

    def _remember(self, container: Container) -> None:
        self._containers[container.container_id] = container
        ended = [
            one
            for one in self._containers.values()
            if one.state == "exited" and one.restart is None
        ]
        ended.sort(key=lambda one: one.ended_at)
        for old in ended[: max(0, len(ended) - self._config.max_remembered)]:
            # Whoever could not find it could not ask for its restart.
            self._kept.give_up(old)
            old.log.close()
            del self._containers[old.container_id]

    # --- restart ------------------------------------------------------------------------------

    async def restart(self, container_id: int, *, timeout_s: float) -> None:
        """Run it again with the root, scratch, ids and measurement that it had.

        A running one is sent the manifest's first signal, if there is one, and then has
        `timeout_s` to end. Raises `UnknownItem`, `FormatError`, `PolicyDenied`, `Conflict`,
        `Busy`, `MeasurementHalted`; `DeadlineExceeded` if it has not ended by then: it goes on,
        and nothing will start when it ends. Once the old run is gone, a failure
        (`RuntimeFailed`, `DeadlineExceeded`) or a cancellation leaves a container that ended
        and is freed; before, it leaves everything as it is.
        """
        await trio.lowlevel.checkpoint()  # who is cancelled already asks for nothing
        container = self.require(container_id)
        restart = self._begin_restart(container, timeout_s)
        try:
            if not restart.settled.is_set():
                with trio.move_on_after(timeout_s):
                    await self._send_restart_signal(container)
                    await restart.settled.wait()
                # Not `cancelled_caught`: if it ended in the same moment it is restarted.
                if not restart.settled.is_set():
                    raise self._still_runs(container, timeout_s)
            # Its task bounds what is left: the old run's end and the new one's start.
            await restart.done.wait()
        finally:
            await self._end_restart(container, restart)
        restart.require_wanted()

    def _begin_restart(self, container: Container, timeout_s: float) -> Restart:
        """Everything that is checked first, and the request, in one step."""
        # Written so that "not a number" is refused too.
        if not 0 < timeout_s <= MAX_RESTART_TIMEOUT_S:
            raise FormatError(
                "timeout_s",
                "must be positive and bounded",
                expected=f"at most {MAX_RESTART_TIMEOUT_S} s",
                actual=timeout_s,
            )
        if container.manifest.no_restart:
            raise PolicyDenied(container.item, "its manifest forbids restarts (noRestart)")
        self._require_nursery(container.item)
        self._measurement.require_running()
        if container.restart is not None:
            raise Conflict(container.item, "is being restarted already")
        if not container.has_files:
            raise Conflict(
                container.item,
                "has ended, and what it had is not kept any more: start a new container",
                expected=f"a restart within {self._kept.keep_s:g} s (containers.keep_exited_s)",
            )
        restart = Restart()
        if container.running is None:
            restart.accept(self._instances.reserve(container.start.image))
        container.ask(restart)
        return restart

    async def _send_restart_signal(self, container: Container) -> None:
        """ACON image spec, "signals": the first one, none if there is none or it is 0."""
        signals = container.manifest.signals
        if container.running is None or not signals or not signals[0]:
            return
        try:
            await self._send(container, container.running, signals[0])
        except Conflict:
            return  # it is ending already
        self._emit_signalled(container, signals[0])

    @staticmethod
    def _still_runs(container: Container, timeout_s: float) -> DeadlineExceeded:
        signals = container.manifest.signals
        told = f"signal {signals[0]}" if signals and signals[0] else "no signal: it names none"
        return DeadlineExceeded(
            container.item,
            "did not end in time to be restarted, and goes on",
            expected=f"within {timeout_s:g} s",
            actual=f"its manifest allows {told}",
        )

    async def _end_restart(self, container: Container, restart: Restart) -> None:
        """Whoever asked goes: what is not done by then is undone."""
        self._abandon(container, restart, "the restart was given up")
        # The run that is under way is destroyed, its socket, scratch and root are closed.
        with trio.move_on_after(4 * CLEANUP_TIMEOUT_S, shield=True):
            await restart.done.wait()

    @staticmethod
    def _abandon(container: Container, restart: Restart, why: str) -> None:
        restart.abandon(Conflict(container.item, why))
        if restart.instance is None and container.restart is restart:
            container.restart = None  # the old run goes on, and its end is an end

    # --- what else is done to it --------------------------------------------------------------

    async def signal(self, container_id: int, signum: int) -> None:
        """Send a signal that the manifest lists.

        Raises `UnknownItem`, `PolicyDenied`, `Conflict` or `RuntimeFailed`.
        """
        container = self.require(container_id)
        allowed = container.manifest.signals
        if signum == 0 or signum not in allowed:
            raise PolicyDenied(
                container.item,
                "its manifest does not list this signal",
                expected=", ".join(str(number) for number in allowed if number) or "none",
                actual=signum,
            )
        await self._send(container, self._require_running(container), signum)
        self._emit_signalled(container, signum)

    async def _send(self, container: Container, running: RunningContainer, signum: int) -> None:
        with seam(container.item, "the runtime's signal"):
            await running.signal(abs(signum), whole_group=signum < 0)

    def _emit_signalled(self, container: Container, signum: int) -> None:
        self._host.emit(
            ContainerSignalled(
                container_id=container.container_id, image_id=container.image_id, signal=signum
            )
        )

    async def invoke(self, container_id: int, invocation: Invocation) -> InvocationResult:
        """Run an additional entry point in it.

        Raises `UnknownItem`, `FormatError`, `PolicyDenied`, `Conflict`, `Busy`,
        `RuntimeFailed`; `DeadlineExceeded` after `timeout_s`. Then, and when cancelled, the
        command's process group is gone.
        """
        container = self.require(container_id)
        check_invocation(invocation)
        running = self._require_running(container)
        try:
            # The runtime ends the command in time; this is for one that does not.
            limit_s = invocation.timeout_s + CLEANUP_TIMEOUT_S
            with (
                deadline(container.item, "the runtime must end an invocation in time", limit_s),
                seam(container.item, "the runtime's invoke"),
            ):
                result = await running.invoke(invocation)
            require_type(result, InvocationResult, item=container.item)
        except BaseException as error:
            # Late or cancelled: it had to be killed. What is refused otherwise never ran.
            if isinstance(error, DeadlineExceeded) or not isinstance(error, Refusal):
                self._emit_invoked(container, invocation, None)
            raise
        self._emit_invoked(container, invocation, result)
        return result

    def _emit_invoked(
        self, container: Container, invocation: Invocation, result: InvocationResult | None
    ) -> None:
        self._host.emit(
            ContainerInvoked(
                container_id=container.container_id,
                image_id=container.image_id,
                entry_point=invocation.entry_point,
                exit_code=None if result is None else result.status.exit_code,
                signal=None if result is None else result.status.signal,
            )
        )

    # --- what is shown ------------------------------------------------------------------------

    def require(self, container_id: int) -> Container:
        """Raises `UnknownItem`."""
        container = self._containers.get(container_id)
        if container is None:
            raise UnknownItem(f"container {container_id}", "no such container")
        return container

    def views(self) -> tuple[ContainerView, ...]:
        """In the order of starting."""
        return tuple(container.view() for container in self._containers.values())

    def statuses(self) -> tuple[ContainerStatus, ...]:
        """In the order of starting."""
        return tuple(container.status() for container in self._containers.values())

    def log_page(self, container_id: int, *, after: int, max_lines: int) -> LogPage:
        """Raises `UnknownItem`."""
        return self.require(container_id).log.page(after=after, max_lines=max_lines)

    async def wait_for_log(self, container_id: int, *, after: int) -> None:
        """Raises `UnknownItem`."""
        await self.require(container_id).log.wait(after=after)

    async def memory_bytes(self) -> dict[int, int]:
        """Of those that run now and that the runtime can tell. Raises `RuntimeFailed`."""
        ids = tuple(one.container_id for one in self._containers.values() if one.running)
        with (
            deadline("memory", "the runtime must tell it in time", MEMORY_TIMEOUT_S),
            seam("memory", "the runtime's memory_bytes"),
        ):
            found = await self._runtime.memory_bytes(ids)
        require_type(found, dict, item="memory")
        return {number: found[number] for number in ids if number in found}

    @staticmethod
    def _require_running(container: Container) -> RunningContainer:
        if container.running is None:
            raise Conflict(container.item, "does not run", actual=container.state)
        return container.running
