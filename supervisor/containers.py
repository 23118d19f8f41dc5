"""From an admitted image to a running container, and to its end.

The start is decided, judged and measured first; only the receipt of that measurement
can start a process. One task owns each container from its mount to its clean-up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import structlog
import trio

from supervisor.admission import Admission, AdmittedImage
from supervisor.background import background
from supervisor.config import ContainersConfig
from supervisor.container import Container, MeasuredStart
from supervisor.container_socket import container_socket
from supervisor.errors import (
    Busy,
    Conflict,
    DeadlineExceeded,
    PolicyDenied,
    Refusal,
    UnknownItem,
)
from supervisor.events import ContainerExited, ContainerStarted, ContainerStarting
from supervisor.formats.delegation import resolve_layers
from supervisor.formats.environment import resolve_environment
from supervisor.formats.log_events import start_container_event
from supervisor.id_ranges import IdRanges
from supervisor.layers import Layers
from supervisor.measurement import Measurement
from supervisor.operations import ContainerView
from supervisor.plugin_host import PluginHost
from supervisor.seam_guard import require_type, seam, undo
from supervisor.seams import (
    ContainerRuntime,
    ContainerSpec,
    ExitStatus,
    LayerStore,
    Rootfs,
    RunningContainer,
)

# Each round lost means that a vendor's newer image was admitted meanwhile.
START_ROUNDS = 8
SIGTERM = 15
# user_namespaces(7): a map has at most 340 lines, and one of them is for id 0.
MAX_UIDS = 339
SIGKILL = 9

log = structlog.stdlib.get_logger("supervisor.containers")
ServeSocket = Callable[[trio.SocketListener, "Container"], Awaitable[None]]


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
        self._store = store
        self._runtime = runtime
        self._config = config
        self._socket_dir = socket_dir
        self._serve_socket = serve_socket
        self._ids = IdRanges(config.first_id)
        self._containers: dict[int, Container] = {}
        self._last_id = 0
        self._instances: Counter[str] = Counter()
        self._nursery: trio.Nursery | None = None

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        """Own the containers' tasks until cancelled; then every container is killed."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    async def start(self, image_id: str, requested: Sequence[str]) -> Container:
        """Judge, measure and start; returns once the process runs.

        Raises `UnknownItem`, `Conflict`, `PolicyDenied`, `DelegationUnresolved`, `Denied`,
        `MeasurementHalted`, `RuntimeFailed` or `DeadlineExceeded`. When it raises or is
        cancelled no container is left, though its start may have been measured.
        """
        image = self._admission.require(image_id)
        with self._instance_of(image) as pass_on:
            start = await self._measure(image, requested)
            async with self._layers.starting(start.layers):
                if self._nursery is None:
                    raise Conflict(image_id, "the supervisor is shutting down")
                self._last_id += 1
                uids = image.signed.manifest.uids
                container = Container(self._last_id, start, self._ids.draw(uids))
                pass_on()
                with trio.move_on_after(self._config.start_timeout_s):
                    await self._nursery.start(self._run_one, container)
                    return container
        raise DeadlineExceeded(
            image_id, "must start in time", expected=f"{self._config.start_timeout_s} s"
        )

    @contextmanager
    def _instance_of(self, image: AdmittedImage) -> Iterator[Callable[[], None]]:
        """Reserve an instance; given back at exit, unless `pass_on` left that to its task."""
        limit = image.signed.manifest.max_instances
        if limit and self._instances[image.image_id] >= limit:
            raise Conflict(
                image.image_id,
                "has as many containers as its manifest's maxInstances allows",
                expected=f"at most {limit}",
                actual=self._instances[image.image_id] + 1,
            )
        if self._instances.total() >= self._config.max_running:
            raise Busy(
                image.image_id,
                "too many containers run (containers.max_running)",
                expected=f"at most {self._config.max_running}",
            )
        passed_on = False

        def pass_on() -> None:
            nonlocal passed_on
            passed_on = True

        self._instances[image.image_id] += 1
        try:
            yield pass_on
        finally:
            if not passed_on:
                self._instances[image.image_id] -= 1

    async def _measure(self, image: AdmittedImage, requested: Sequence[str]) -> MeasuredStart:
        manifest = image.signed.manifest
        if not manifest.is_executable:
            raise PolicyDenied(image.image_id, "has no entry point: it only lends layers")
        if not manifest.layers:
            raise PolicyDenied(image.image_id, "has an entry point but no layer to run it from")
        if len(manifest.uids) > MAX_UIDS:
            raise PolicyDenied(
                image.image_id,
                "asks for more ids than a user namespace maps one by one",
                expected=f"at most {MAX_UIDS}",
                actual=len(manifest.uids),
            )
        environment = resolve_environment(manifest.env, requested)
        for _ in range(START_ROUNDS):
            resolved = resolve_layers(manifest.layers, self._admission.statements)
            self._layers.require((layer.digest for layer in resolved), item=image.image_id)
            event = ContainerStarting(
                image_id=image.image_id,
                layers=resolved,
                argv=manifest.entrypoint,
                environment=environment,
            )
            await self._host.judge("judge_start", event, item=image.image_id)
            async with self._measurement.writing() as writer:
                # The verifier resolves at this place in the log: what was judged must
                # still be what the log so far resolves to.
                if resolve_layers(manifest.layers, self._admission.statements) != resolved:
                    continue
                # Looked up here, so that what is mounted is what is here when it is recorded.
                layers = self._layers.require(
                    (layer.digest for layer in resolved), item=image.image_id
                )
                receipt = await writer.record_container(
                    start_container_event(
                        event.image_id, event.layers, event.argv, event.environment
                    )
                )
            return MeasuredStart(image=image, layers=layers, receipt=receipt)
        raise Busy(image.image_id, "its delegated layers keep changing")

    # --- one container's life ---------------------------------------------------------------

    async def _run_one(self, container: Container, task_status: trio.TaskStatus[None]) -> None:
        started = False

        def confirm() -> None:
            nonlocal started
            started = True
            self._containers[container.container_id] = container
            container.listed.set()
            self._forget_old()
            task_status.started()

        try:
            await self._live(container, confirm)
        except Exception as error:
            if not started:
                raise
            # Its own failure ends this container only.
            log.error("container failed", container_id=container.container_id, error=repr(error))
        finally:
            if container.exit is None:
                container.exit = ExitStatus(signal=SIGKILL)  # its clean-up ended it
            container.ended.set()
            self._instances[container.image_id] -= 1
            if started:
                self._exited(container)

    async def _live(self, container: Container, confirm: Callable[[], None]) -> None:
        manifest = container.start.image.signed.manifest
        with seam(container.image_id, "the layer store's mount"):
            rootfs = await self._store.mount(
                container.start.layers,
                container_id=container.container_id,
                id_map=container.id_map,
                writable=manifest.writable_fs,
            )
        require_type(rootfs, Rootfs, item=container.image_id)
        try:
            socket_path = self._socket_dir / f"{container.container_id}.sock"
            with container_socket(socket_path) as listener:
                spec = ContainerSpec(
                    container_id=container.container_id,
                    image_id=container.image_id,
                    root=rootfs.path,
                    argv=manifest.entrypoint,
                    environment=container.start.receipt.event.environment,
                    working_dir=manifest.working_dir,
                    id_map=container.id_map,
                    writable_root=manifest.writable_fs,
                    no_new_privileges=not manifest.uids,
                    log_fds=manifest.log_fds,
                    socket_path=socket_path,
                )
                # Served before the program runs: it may ask in its first instruction.
                async with background(lambda: self._serve(listener, container)):
                    await self._run_process(container, spec, confirm)
        finally:
            await undo(container.image_id, "the root's close", rootfs.close)

    async def _run_process(
        self, container: Container, spec: ContainerSpec, confirm: Callable[[], None]
    ) -> None:
        with seam(spec.image_id, "the runtime's start"):
            running = await self._runtime.start(spec, container.start.receipt)
        require_type(running, RunningContainer, item=spec.image_id)
        try:
            container.running = running
            confirm()
            self._host.emit(
                ContainerStarted(
                    container_id=spec.container_id, image_id=spec.image_id, pid=running.pid
                )
            )
            container.exit = await running.wait()
        finally:
            await undo(spec.image_id, "the container's destroy", running.destroy)

    async def _serve(self, listener: trio.SocketListener, container: Container) -> None:
        try:
            await self._serve_socket(listener, container)
        except* Exception as error:  # also beside a Cancelled, which goes on
            log.error(
                "container socket failed", container_id=container.container_id, error=repr(error)
            )

    def _exited(self, container: Container) -> None:
        status = container.exit or ExitStatus(signal=SIGKILL)
        self._host.emit(
            ContainerExited(
                container_id=container.container_id,
                image_id=container.image_id,
                exit_code=status.exit_code,
                signal=status.signal,
            )
        )

    def _forget_old(self) -> None:
        ended = [key for key, value in self._containers.items() if value.ended.is_set()]
        for key in ended[: max(0, len(ended) - self._config.max_remembered)]:
            del self._containers[key]

    # --- what operators may do to it --------------------------------------------------------

    async def signal(self, container_id: int, signum: int) -> None:
        """Send a signal that the manifest lists.

        Raises `UnknownItem`, `PolicyDenied` or `Conflict`.
        """
        container = self.require(container_id)
        allowed = container.start.image.signed.manifest.signals
        if signum == 0 or signum not in allowed:
            raise PolicyDenied(
                f"container {container_id}",
                "its manifest does not list this signal",
                expected=", ".join(str(number) for number in allowed if number) or "none",
                actual=signum,
            )
        if container.running is None or container.state != "running":
            raise Conflict(f"container {container_id}", "does not run", actual=container.state)
        with seam(f"container {container_id}", "the runtime's signal"):
            await container.running.signal(abs(signum), whole_group=signum < 0)

    async def stop_all(self) -> None:
        """Ask every container to end, and wait for at most `stop_timeout_s`.

        What has not ended then is killed when `run` is cancelled.
        """
        alive = [one for one in self._containers.values() if not one.ended.is_set()]
        with trio.move_on_after(self._config.stop_timeout_s):
            async with trio.open_nursery() as nursery:
                for container in alive:
                    nursery.start_soon(self._stop, container)

    async def _stop(self, container: Container) -> None:
        signals = container.start.image.signed.manifest.signals
        first = signals[0] if signals and signals[0] else SIGTERM
        if container.running is not None:
            try:
                with seam(container.image_id, "the runtime's signal"):
                    await container.running.signal(abs(first), whole_group=first < 0)
            except Refusal as error:
                log.warning("stop failed", container_id=container.container_id, error=str(error))
        await container.ended.wait()

    def require(self, container_id: int) -> Container:
        """Raises `UnknownItem`."""
        container = self._containers.get(container_id)
        if container is None:
            raise UnknownItem(f"container {container_id}", "no such container")
        return container

    def views(self) -> tuple[ContainerView, ...]:
        """In the order of starting."""
        return tuple(container.view() for container in self._containers.values())


def missing_layers(image: AdmittedImage, admission: Admission, layers: Layers) -> tuple[str, ...]:
    """What still keeps an image from starting: digests that are not here, and delegated
    references that nothing resolves yet."""
    missing = []
    for reference in image.signed.manifest.layers:
        try:
            resolved = admission.resolver.layer(reference)
        except Refusal:
            missing.append(str(reference))
            continue
        if not layers.has(resolved.digest):
            missing.append(str(resolved.digest))
    return tuple(dict.fromkeys(missing))
