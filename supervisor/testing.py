"""What a plugin author needs to test a plugin without hardware, mounts or processes.

`Owner` signs manifests as an image owner would; `in_memory_plugin` is a whole software
machine (register, quotes, layer store, runtime) that keeps everything in memory;
`running` runs a real supervisor around it and the plugin under test.

    async with running([in_memory_plugin(tmp_path), plugin(MyPlugin, tmp_path)], tmp_path) as s:
        await s.admit([Owner("me").sign(manifest(name="app:1"))])

Nothing here proves anything to a relying party: the quotes are signed by nobody.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import msgspec
import structlog
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from supervisor.config import Config, parse_config
from supervisor.context import PluginContext
from supervisor.errors import RuntimeFailed
from supervisor.formats import canonical_json
from supervisor.formats.digest import Digest, digest_of
from supervisor.formats.event_log import ZERO_REGISTER, extend
from supervisor.formats.log_events import Component
from supervisor.formats.quote import QuoteAuth, build_header, pack_quote
from supervisor.formats.signature import sign_manifest, signer_id_of
from supervisor.formats.td_body import build_td10_body
from supervisor.hookspecs import hookimpl
from supervisor.measurement import RunBlocking
from supervisor.operations import ManifestUpload
from supervisor.plugin_contract import check_plugin_class
from supervisor.plugin_host import LoadedPlugin, PluginHost
from supervisor.proofs import StartReceipt, StoredLayer, VerifiedLayer
from supervisor.seams import (
    ContainerSpec,
    ExitStatus,
    IdMap,
    LayerUpload,
    OciBlob,
    Rootfs,
    RunningContainer,
)
from supervisor.service import Supervisor, run_supervisor

CERTIFICATE_DAYS = 365
T = TypeVar("T")


class Owner:
    """Somebody who signs manifests, with a P-384 key and a self-signed certificate."""

    def __init__(self, name: str) -> None:
        self.key = ec.generate_private_key(ec.SECP384R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        begin = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(begin + datetime.timedelta(days=CERTIFICATE_DAYS))
            .sign(self.key, hashes.SHA384())
        )
        self.certificate_der = certificate.public_bytes(serialization.Encoding.DER)
        self.signer = signer_id_of(self.certificate_der)

    def sign(self, manifest_bytes: bytes) -> ManifestUpload:
        """The signed image, ready for `admit`."""
        return ManifestUpload(
            manifest=manifest_bytes,
            signature=sign_manifest(manifest_bytes, self.key, self.certificate_der),
            certificate_der=self.certificate_der,
        )


def manifest(
    *, name: str, layers: Sequence[str] | None = None, accepts: Sequence[str] = (), **fields: object
) -> bytes:
    """Canonical bytes of an executable image's manifest; `fields` are added as they are."""
    return canonical_json.encode_go(
        {
            "aconSpecVersion": [1, 0],
            "layers": [str(digest_of("sha384", name.encode()))] if layers is None else list(layers),
            "aliases": {"self": {".": [name]}},
            "entrypoint": ["/bin/true"],
            "policy": {"accepts": list(accepts), "rejectUnaccepted": bool(accepts)},
            **fields,
        }
    )


# --- a machine in memory ---------------------------------------------------------------------


class MemoryRegisters:
    """`seams.Registers`. `fail_before` or `fail_after` make the next extension fail."""

    def __init__(self) -> None:
        self.value = ZERO_REGISTER
        self.extensions = 0
        self.fail_before = False
        self.fail_after = False

    def read(self) -> bytes:
        return self.value

    def extend(self, digest_sha384: bytes) -> None:
        if self.fail_before:
            raise RuntimeFailed("memory register", "failed before it was extended")
        self.value = extend(self.value, digest_sha384)
        self.extensions += 1
        if self.fail_after:
            raise RuntimeFailed("memory register", "failed after it was extended")


class MemoryQuotes:
    """`seams.QuoteSource`: well-formed quotes that nobody signed."""

    def __init__(self, registers: MemoryRegisters) -> None:
        self._registers = registers
        self.delay_s = 0.0
        self.made = 0

    async def quote(self, report_data: bytes) -> bytes:
        await trio.sleep(self.delay_s)
        self.made += 1
        body = build_td10_body(
            tee_tcb_svn=bytes(16),
            mr_td=hashlib.sha384(b"in memory").digest(),
            rtmrs=(ZERO_REGISTER, ZERO_REGISTER, ZERO_REGISTER, self._registers.value),
            report_data=report_data,
            td_attributes=(1 << 28).to_bytes(8, "little"),
            xfam=(3).to_bytes(8, "little"),
        )
        auth = QuoteAuth(
            signature=bytes(64),
            attestation_public_key=bytes(64),
            qe_report=bytes(384),
            qe_report_signature=bytes(64),
            qe_auth_data=bytes(32),
            certificate_chain_pem=b"nobody\n",
        )
        return pack_quote(build_header(version=4), body, auth)

    async def td_report(self, report_data: bytes) -> bytes:
        return bytes(128) + report_data + bytes(832)

    async def boot_event_log(self) -> bytes | None:
        return None


class MemoryUpload:
    """`seams.LayerUpload`."""

    def __init__(self, store: MemoryLayers, expected: Digest) -> None:
        self._store = store
        self._expected = expected
        self._data = bytearray()
        self._open = True
        store.open_uploads += 1

    @property
    def received_bytes(self) -> int:
        return len(self._data)

    async def write(self, chunk: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self._data += chunk

    async def finish(self) -> StoredLayer:
        await trio.lowlevel.checkpoint()
        self._end()
        return self._store.keep(self._expected, bytes(self._data), "upload")

    async def abort(self) -> None:
        self._end()

    def _end(self) -> None:
        if self._open:
            self._open = False
            self._store.open_uploads -= 1


class MemoryRootfs:
    """`seams.Rootfs`."""

    def __init__(self, store: MemoryLayers, container_id: int) -> None:
        self._store = store
        self._container_id = container_id
        store.mounted.add(container_id)

    @property
    def path(self) -> Path:
        return Path("/memory", str(self._container_id))

    async def close(self) -> None:
        self._store.mounted.discard(self._container_id)


class MemoryLayers:
    """`seams.LayerStore`. `blobs` maps blob digests of `OciBlob` sources to tar bytes."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.held_bytes = 0
        self.open_uploads = 0
        self.mounted: set[int] = set()
        self._held: dict[Digest, int] = {}

    def keep(self, expected: Digest, data: bytes, source: str) -> StoredLayer:
        self._held[expected] = len(data)
        self.held_bytes += len(data)
        return StoredLayer(
            expected=expected,
            computed={
                name: hashlib.new(name, data).hexdigest() for name in ("sha384", expected.algorithm)
            },
            size_bytes=len(data),
            source=source,
        )

    async def upload(self, expected: Digest, *, size_bytes: int | None) -> LayerUpload:
        await trio.lowlevel.checkpoint()
        return MemoryUpload(self, expected)

    async def fetch(self, expected: Digest, source: OciBlob) -> StoredLayer:
        await trio.lowlevel.checkpoint()
        if source.blob_digest not in self.blobs:
            raise RuntimeFailed(source.blob_digest, "no such blob")
        return self.keep(expected, self.blobs[source.blob_digest], "memory")

    async def prepare(self, layer: VerifiedLayer) -> None:
        await trio.lowlevel.checkpoint()

    async def discard(self, stored: StoredLayer) -> None:
        self.held_bytes -= self._held.pop(stored.expected, 0)

    async def mount(
        self,
        layers: tuple[VerifiedLayer, ...],
        *,
        container_id: int,
        id_map: IdMap,
        writable: bool,
    ) -> Rootfs:
        await trio.lowlevel.checkpoint()
        return MemoryRootfs(self, container_id)


class MemoryProcess:
    """`seams.RunningContainer`. `end` makes it exit."""

    def __init__(self, runtime: MemoryRuntime, spec: ContainerSpec, receipt: StartReceipt) -> None:
        self._runtime = runtime
        self.spec = spec
        self.receipt = receipt
        self._ended = trio.Event()
        self._status = ExitStatus(exit_code=0)
        runtime.running[spec.container_id] = self

    @property
    def pid(self) -> int:
        return 100_000 + self.spec.container_id

    def end(self, status: ExitStatus) -> None:
        self._status = status
        self._ended.set()

    async def wait(self) -> ExitStatus:
        await self._ended.wait()
        return self._status

    async def signal(self, signum: int, *, whole_group: bool) -> None:
        await trio.lowlevel.checkpoint()
        self.end(ExitStatus(signal=signum))

    async def destroy(self) -> None:
        self._runtime.running.pop(self.spec.container_id, None)


class MemoryRuntime:
    """`seams.ContainerRuntime`; `running` holds what has not been destroyed."""

    def __init__(self) -> None:
        self.running: dict[int, MemoryProcess] = {}

    async def start(self, spec: ContainerSpec, receipt: StartReceipt) -> RunningContainer:
        await trio.lowlevel.checkpoint()
        return MemoryProcess(self, spec, receipt)


class InMemoryConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Nothing to configure."""


class InMemory:
    """A plugin that provides all hardware, storage and runtime, in memory."""

    Config = InMemoryConfig

    def __init__(self, config: InMemoryConfig, context: PluginContext) -> None:
        self.memory_registers = MemoryRegisters()
        self.quotes = MemoryQuotes(self.memory_registers)
        self.layers = MemoryLayers()
        self.runtime = MemoryRuntime()

    @hookimpl
    def registers(self, rtmr_index: int) -> MemoryRegisters:
        return self.memory_registers

    @hookimpl
    async def quote_source(self) -> MemoryQuotes:
        return self.quotes

    @hookimpl
    async def layer_store(self) -> MemoryLayers:
        return self.layers

    @hookimpl
    async def container_runtime(self) -> MemoryRuntime:
        return self.runtime


# --- a supervisor around it --------------------------------------------------------------------


def plugin(
    plugin_class: type,
    runtime_dir: Path,
    *,
    name: str | None = None,
    table: Mapping[str, object] | None = None,
) -> LoadedPlugin:
    """Make a plugin as the daemon would, without installing it; its digest is zeros.

    Raises what the daemon would: `PluginContractError`, `msgspec.ValidationError`.
    """
    known_as = name or plugin_class.__name__.lower()
    config_class = check_plugin_class(known_as, plugin_class)
    config = msgspec.convert(dict(table or {}), config_class)
    folder = runtime_dir / "plugins" / known_as
    folder.mkdir(parents=True, exist_ok=True)
    context = PluginContext(
        name=known_as,
        runtime_dir=folder,
        log=structlog.stdlib.get_logger(known_as),
        report=lambda event: None,
    )
    return LoadedPlugin(
        name=known_as,
        plugin=plugin_class(config, context),
        config=config,
        component=Component(
            name=known_as,
            version="0",
            digest_sha384="00" * 48,
            role="plugin",
            distribution="not installed",
        ),
    )


def in_memory_plugin(runtime_dir: Path) -> LoadedPlugin:
    """A machine in memory; `.plugin` is its `InMemory`."""
    return plugin(InMemory, runtime_dir, name="in_memory")


def config_for(plugins: Sequence[LoadedPlugin], runtime_dir: Path, toml: str = "") -> Config:
    """A configuration that names these plugins; `toml` adds further tables."""
    names = ", ".join(f'"{loaded.name}"' for loaded in plugins)
    text = f'runtime_dir = "{runtime_dir}"\n[plugins]\norder = [{names}]\n{toml}'
    return parse_config(text)


async def run_at_once(function: Callable[[], T], limiter: trio.CapacityLimiter) -> T:
    """A `RunBlocking` without a thread; a checkpoint before, none inside or after."""
    await trio.lowlevel.checkpoint()
    return function()


@asynccontextmanager
async def running(
    plugins: Sequence[LoadedPlugin],
    runtime_dir: Path,
    toml: str = "",
    *,
    run_blocking: RunBlocking = run_at_once,
) -> AsyncIterator[Supervisor]:
    """A real supervisor around these plugins, shut down in order at exit.

    Measuring work runs in the event loop's thread unless `run_blocking` says otherwise, so
    that `autojump_clock` does not take a working thread for idleness.
    """
    config = config_for(plugins, runtime_dir, toml)
    host = PluginHost(plugins, gate_timeout_s=config.gates.timeout_s)
    async with trio.open_nursery() as nursery:
        supervisor: Supervisor = await nursery.start(run_supervisor, config, host, run_blocking)
        try:
            yield supervisor
        finally:
            nursery.cancel_scope.cancel()
