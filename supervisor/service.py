"""The running supervisor: who owns which task, what starts before what, and how it ends.

Nurseries from outside to inside: plugins' lifespans, observers, containers, transfers of
layers, servers. Start goes inwards and shutdown outwards: servers stop accepting,
transfers are cancelled, containers are asked and then killed, observers drain, lifespans
clean up in reverse order. What a killed predecessor left is ended (lifespans) before
anything is measured.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import NamedTuple, TypeVar

import structlog
import trio

from supervisor.acon_report import AconReports
from supervisor.admission import Admission
from supervisor.attestation import AttestationRoom
from supervisor.config import Config, config_digest_sha384, effective_config
from supervisor.container import Container
from supervisor.container_seams import ContainerRuntime, Invocation, InvocationResult
from supervisor.container_socket import prepare_socket_dir
from supervisor.container_voice import ContainerVoice
from supervisor.containers import Containers
from supervisor.errors import (
    ConfigError,
    FormatError,
    Refusal,
    RuntimeFailed,
)
from supervisor.events import MeasurementStopped
from supervisor.evidence import EvidenceMaker
from supervisor.formats.digest import Digest
from supervisor.formats.event_log import assemble_log
from supervisor.formats.log_events import StartEvent
from supervisor.journal import Journal
from supervisor.layer_uses import LayerUses
from supervisor.layers import Layers
from supervisor.measurement import RTMR_INDEX, Measurement, RunBlocking, in_worker_thread
from supervisor.operations import (
    AconReport,
    AdmissionResult,
    ContainerView,
    ImageView,
    LogPage,
    ManifestUpload,
)
from supervisor.ordered_tasks import container_tasks, observers, ordered_task
from supervisor.plugin_host import PluginHost
from supervisor.proven_quotes import ProvenQuotes
from supervisor.seam_guard import deadline, require_seam, require_type, seam
from supervisor.seams import (
    LayerSource,
    LayerStore,
    LayerUpload,
    QuoteSource,
    Registers,
)
from supervisor.shared_transfers import SharedTransfers
from supervisor.starting import missing_layers
from supervisor.status_maker import StatusMaker

T = TypeVar("T")
# How long a plugin may take to clean up before that is said; acond itself ends soon after.
LIFESPAN_STOP_TIMEOUT_S = 30
LIFESPAN_START_TIMEOUT_S = 60
# Whoever waited for a transfer has been told by then: what is left is to free its bytes.
TRANSFERS_STOP_TIMEOUT_S = 10

log = structlog.stdlib.get_logger("supervisor.service")


class Supervisor:
    """One boot's supervisor; implements `supervisor.operations.Operations`.

    Made by `run_supervisor` only, which owns all of its tasks.
    """

    def __init__(
        self,
        *,
        measurement: Measurement,
        admission: Admission,
        layers: Layers,
        containers: Containers,
        evidence: EvidenceMaker,
        acon_reports: AconReports,
        status_maker: StatusMaker,
    ) -> None:
        self._measurement = measurement
        self._admission = admission
        self._layers = layers
        self._containers = containers
        self._evidence = evidence
        self._acon_reports = acon_reports
        self._status_maker = status_maker

    async def admit(self, group: Sequence[ManifestUpload]) -> AdmissionResult:
        before = {image.image_id for image in self._admission.images()}
        images = await self._admission.admit(group)
        # No checkpoint between: what a vendor's image superseded can be started by nobody.
        await self._layers.free_superseded()
        missing = [missing_layers(image, self._admission, self._layers) for image in images]
        ids = tuple(image.image_id for image in images)
        return AdmissionResult(
            image_ids=ids,
            missing_layers=tuple(dict.fromkeys(layer for one in missing for layer in one)),
            already_admitted=tuple(image_id for image_id in ids if image_id in before),
        )

    async def upload_layer(self, expected: Digest, *, size_bytes: int | None) -> LayerUpload:
        return await self._layers.begin_upload(expected, size_bytes=size_bytes)

    async def finish_layer(self, expected: Digest, upload: LayerUpload) -> None:
        await self._layers.finish_upload(expected, upload)

    async def fetch_layer(self, expected: Digest, source: LayerSource) -> None:
        await self._layers.fetch(expected, source)

    def has_layer(self, digest: Digest) -> bool:
        return self._layers.has(digest)

    async def seal(self) -> None:
        await self._admission.seal()

    async def start(self, image_id: str, requested_environment: Sequence[str]) -> int:
        container = await self._containers.start(image_id, requested_environment)
        return container.container_id

    async def signal(self, container_id: int, signum: int) -> None:
        await self._containers.signal(container_id, signum)

    async def restart(self, container_id: int, *, timeout_s: float) -> None:
        await self._containers.restart(container_id, timeout_s=timeout_s)

    async def invoke(self, container_id: int, invocation: Invocation) -> InvocationResult:
        return await self._containers.invoke(container_id, invocation)

    def log_page(self, container_id: int, *, after: int, max_lines: int) -> LogPage:
        return self._containers.log_page(container_id, after=after, max_lines=max_lines)

    async def wait_for_log(self, container_id: int, *, after: int) -> None:
        await self._containers.wait_for_log(container_id, after=after)

    async def memory_bytes(self) -> dict[int, int]:
        return await self._containers.memory_bytes()

    def images(self) -> tuple[ImageView, ...]:
        return self._status_maker.images()

    def manifest(self, image_id: str) -> ManifestUpload:
        signed = self._admission.require(image_id).signed
        return ManifestUpload(
            manifest=signed.manifest_bytes,
            signature=signed.signature,
            certificate_der=signed.certificate_der,
        )

    def containers(self) -> tuple[ContainerView, ...]:
        return self._containers.views()

    def status(self) -> bytes:
        return self._status_maker.encoded()

    async def evidence(self, nonce: bytes) -> bytes:
        return await self._evidence.make(nonce)

    async def acon_report(self, requestor_nonce: bytes, *, want_quote: bool) -> AconReport:
        return await self._acon_reports.make(requestor_nonce, want_quote=want_quote)


async def run_supervisor(
    config: Config,
    host: PluginHost,
    run_blocking: RunBlocking = in_worker_thread,
    on_stopping: Callable[[], None] = lambda: None,
    *,
    task_status: trio.TaskStatus[Supervisor] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run until cancelled; then shut down in order, children first, each with a deadline.

    `on_stopping` is called when the shutdown begins, whatever began it. Started with the
    `Supervisor` once every server accepts clients. Raises `Refusal` when
    the start fails; an exception of a serving plugin ends it in order and propagates.
    """
    effective = effective_config(config, host.configs)
    async with AsyncExitStack() as stack:
        for plugin, function, _ in host.implementations("lifespan"):
            await stack.enter_async_context(
                ordered_task(plugin, function, LIFESPAN_START_TIMEOUT_S, LIFESPAN_STOP_TIMEOUT_S)
            )
        await stack.enter_async_context(observers(host))
        registers = await _registers(config, host, run_blocking)
        measurement = _open_measurement(config, host, registers, run_blocking)
        stack.callback(measurement.close)
        await _begin_measurement(measurement, host, effective)
        service = await _assemble(config, host, measurement, effective)
        await stack.enter_async_context(container_tasks(service.containers))
        await stack.enter_async_context(
            ordered_task(
                "layer transfers",
                service.transfers.run,
                LIFESPAN_START_TIMEOUT_S,
                TRANSFERS_STOP_TIMEOUT_S,
            )
        )
        supervisor = service.supervisor
        for plugin, function, _ in host.implementations("serve"):
            await stack.enter_async_context(
                ordered_task(
                    plugin,
                    functools.partial(function, supervisor),
                    LIFESPAN_START_TIMEOUT_S,
                    LIFESPAN_STOP_TIMEOUT_S,
                )
            )
        log.info(
            "ready",
            register=measurement.register.hex(),
            images=len(supervisor.images()),
            halted=measurement.halted,
        )
        # Last in, first out: whatever ends it, a cancellation or a plugin, begins here.
        stack.callback(on_stopping)
        task_status.started(supervisor)
        await trio.sleep_forever()


class _Service(NamedTuple):
    """What the nurseries below need to share."""

    supervisor: Supervisor
    containers: Containers
    transfers: SharedTransfers


async def _registers(
    config: Config, host: PluginHost, run_blocking: RunBlocking
) -> list[tuple[str, Registers]]:
    """Every plugin's register, asked for where it will be used: in a worker thread."""
    limiter = trio.CapacityLimiter(1)
    found = []
    for plugin, function, _ in host.implementations("registers"):
        with (
            deadline(plugin, "registers must answer", config.measurement.extend_timeout_s),
            seam(plugin, "registers"),
        ):
            ask = functools.partial(function, RTMR_INDEX)
            found.append((plugin, require_seam(await run_blocking(ask, limiter), Registers)))
    if not found:
        raise ConfigError("$.plugins.order", "no configured plugin offers a register (registers)")
    return found


def _open_measurement(
    config: Config,
    host: PluginHost,
    registers: Sequence[tuple[str, Registers]],
    run_blocking: RunBlocking,
) -> Measurement:
    return Measurement(
        registers,
        Journal.open(Path(config.runtime_dir, "journal")),
        rtmr_index=RTMR_INDEX,
        extend_timeout_s=config.measurement.extend_timeout_s,
        log_limit_bytes=config.measurement.log_limit_bytes,
        run_blocking=run_blocking,
        on_halt=lambda reason: host.emit(MeasurementStopped(reason=reason)),
    )


async def _begin_measurement(measurement: Measurement, host: PluginHost, effective: str) -> None:
    await measurement.recover()
    if measurement.halted is not None:
        return
    start_value = measurement.start_value
    event = StartEvent(
        register_at_start=start_value.hex() if any(start_value) else None,
        components=host.components,
        config_digest_sha384=config_digest_sha384(effective),
    )
    async with measurement.writing() as writer:
        await writer.record_start(event)


async def _assemble(
    config: Config, host: PluginHost, measurement: Measurement, effective: str
) -> _Service:
    quotes = await _provided(host, "quote_source", QuoteSource)
    store = await _provided(host, "layer_store", LayerStore)
    runtime = await _provided(host, "container_runtime", ContainerRuntime)
    admission = Admission(measurement, host, config.admission)
    if measurement.halted is None:
        try:
            await admission.restore(measurement.entries())
        except Refusal as error:
            # Log and register agree, but not what may run: serve the status, and nothing else.
            measurement.halt(str(error))
    transfers = SharedTransfers()
    uses = LayerUses(admission, max_image_bytes=config.layers.max_image_bytes)
    layers = Layers(store, host, config.layers, uses=uses, transfers=transfers)
    boot_log = await _boot_log(quotes, config.evidence.quote_timeout_s)
    socket_dir = Path(config.runtime_dir, "sockets")
    prepare_socket_dir(socket_dir)
    serve = host.implementations("serve_container")
    room = AttestationRoom()

    async def serve_socket(listener: trio.SocketListener, container: Container) -> None:
        voice = ContainerVoice(container, evidence=evidence, acon_reports=acon_reports, room=room)
        try:
            if serve:
                await serve[0][1](listener, voice, trio.TASK_STATUS_IGNORED)
            else:
                await trio.sleep_forever()
        finally:
            voice.close()

    containers = Containers(
        admission=admission,
        layers=layers,
        measurement=measurement,
        host=host,
        store=store,
        runtime=runtime,
        config=config.containers,
        socket_dir=socket_dir,
        serve_socket=serve_socket,
    )
    status_maker = StatusMaker(
        measurement=measurement,
        admission=admission,
        layers=layers,
        containers=containers,
        runtime_notes=_notes(runtime),
    )

    proven_quotes = ProvenQuotes(measurement=measurement, quotes=quotes, config=config.evidence)
    acon_reports = AconReports(
        measurement=measurement, quotes=proven_quotes, status=status_maker.status
    )
    evidence = EvidenceMaker(
        measurement=measurement,
        host=host,
        quotes=proven_quotes,
        boot_log=boot_log,
        effective_config=effective,
        status=status_maker.encoded,
    )
    supervisor = Supervisor(
        measurement=measurement,
        admission=admission,
        layers=layers,
        containers=containers,
        evidence=evidence,
        acon_reports=acon_reports,
        status_maker=status_maker,
    )
    return _Service(supervisor, containers, transfers)


def _notes(runtime: ContainerRuntime) -> tuple[str, ...]:
    item = "container runtime"
    with seam(item, "its notes"):
        notes = runtime.notes
    require_type(notes, tuple, item=item)
    for note in notes:
        require_type(note, str, item=item)
    return notes


async def _boot_log(quotes: QuoteSource, timeout_s: float) -> bytes | None:
    item = "boot event log"
    with deadline(item, "must be read in time", timeout_s), seam(item, "reading it"):
        boot_log = await quotes.boot_event_log()
    if boot_log is not None:
        require_type(boot_log, bytes, item=item)
        try:
            assemble_log(boot_log, ())
        except FormatError as error:
            # Here, once: else every asker would be told that the request is malformed.
            raise RuntimeFailed(item, "cannot be parsed", actual=error) from error
    return boot_log


async def _provided(host: PluginHost, hook: str, seam_type: type[T]) -> T:
    return require_seam(await host.provide(hook), seam_type)
