"""A whole machine in memory: register, quotes, layer store, and the runtime beside it."""

from __future__ import annotations

import errno
import hashlib
import itertools
from pathlib import Path

import msgspec
import trio

from supervisor.context import PluginContext
from supervisor.errors import RuntimeFailed, UnknownItem
from supervisor.formats.digest import Digest
from supervisor.formats.event_log import ZERO_REGISTER, extend
from supervisor.formats.quote import QuoteAuth, build_header, pack_quote
from supervisor.formats.td_body import build_td10_body
from supervisor.formats.td_report import TdReport, pack_td_report
from supervisor.hookspecs import hookimpl
from supervisor.proofs import StoredLayer, VerifiedLayer
from supervisor.seams import IdMap, LayerSource, LayerUpload, Rootfs
from supervisor.testing.memory_runtime import MemoryRuntime

# SEPT_VE_DISABLE alone, x87 and SSE alone: what any real TD has.
TD_ATTRIBUTES = (1 << 28).to_bytes(8, "little")
XFAM = (3).to_bytes(8, "little")
MR_TD = hashlib.sha384(b"in memory").digest()


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
            mr_td=MR_TD,
            rtmrs=self._rtmrs(),
            report_data=report_data,
            td_attributes=TD_ATTRIBUTES,
            xfam=XFAM,
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
        await trio.sleep(self.delay_s)
        return pack_td_report(
            TdReport(
                version=0,
                cpu_svn=bytes(16),
                report_data=report_data,
                mac=bytes(32),
                valid=bytes(8),
                tee_tcb_svn=bytes(16),
                mr_seam=bytes(48),
                mr_signer_seam=bytes(48),
                seam_attributes=bytes(8),
                tee_tcb_svn2=bytes(16),
                td_attributes=TD_ATTRIBUTES,
                xfam=XFAM,
                mr_td=MR_TD,
                mr_config_id=bytes(48),
                mr_owner=bytes(48),
                mr_owner_config=bytes(48),
                rtmrs=self._rtmrs(),
                servtd_hash=bytes(48),
            )
        )

    def _rtmrs(self) -> tuple[bytes, bytes, bytes, bytes]:
        return (ZERO_REGISTER, ZERO_REGISTER, ZERO_REGISTER, self._registers.value)

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


class MemoryStored(StoredLayer, frozen=True, kw_only=True):
    """One keeping of a layer: brought in again it is another one."""

    key: int


class MemoryRootfs:
    """`seams.Rootfs`. `attached_at` is where it can be seen, if it can."""

    def __init__(self, store: MemoryLayers, container_id: int, keys: tuple[int, ...]) -> None:
        self._store = store
        self._container_id = container_id
        self.attached_at: Path | None = None
        store.mounted[container_id] = keys

    def attach(self, target: Path) -> None:
        if self._container_id not in self._store.mounted or self.attached_at is not None:
            raise OSError(errno.EINVAL, "closed, or attached elsewhere", str(target))
        self.attached_at = target

    def detach(self) -> None:
        self.attached_at = None

    async def close(self) -> None:
        self.detach()
        self._store.mounted.pop(self._container_id, None)
        self._store.free_unwanted()


class MemoryLayers:
    """`seams.LayerStore`. `blobs` maps blob digests of `LayerSource` sources to tar bytes.

    `delay_s` is what each fetch takes; `fetches` counts those begun, `fetching` those under
    way. `mounted` maps containers to what they mount: kept, if discarded, until they end.
    """

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.delay_s = 0.0
        self.fetches = 0
        self.fetching = 0
        self.open_uploads = 0
        self.mounted: dict[int, tuple[int, ...]] = {}
        self._held: dict[int, MemoryStored] = {}
        self._unwanted: set[int] = set()
        self._keys = itertools.count(1)

    @property
    def held_bytes(self) -> int:
        """Of all layers that were not freed."""
        return sum(stored.size_bytes for stored in self._held.values())

    def keep(self, expected: Digest, data: bytes, source: str) -> StoredLayer:
        stored = MemoryStored(
            expected=expected,
            computed={
                name: hashlib.new(name, data).hexdigest() for name in ("sha384", expected.algorithm)
            },
            size_bytes=len(data),
            source=source,
            key=next(self._keys),
        )
        self._held[stored.key] = stored
        return stored

    async def upload(self, expected: Digest, *, size_bytes: int | None) -> LayerUpload:
        await trio.lowlevel.checkpoint()
        return MemoryUpload(self, expected)

    async def fetch(self, expected: Digest, source: LayerSource) -> StoredLayer:
        self.fetches += 1
        self.fetching += 1
        try:
            await trio.sleep(self.delay_s)
        finally:
            self.fetching -= 1
        name = str(source.blob_digest)
        if name not in self.blobs:
            raise RuntimeFailed(name, "no such blob")
        return self.keep(expected, self.blobs[name], "memory")

    async def prepare(self, layer: VerifiedLayer) -> None:
        await trio.lowlevel.checkpoint()

    async def discard(self, stored: StoredLayer) -> None:
        if isinstance(stored, MemoryStored):
            self._unwanted.add(stored.key)
            self.free_unwanted()

    def free_unwanted(self) -> None:
        """What was discarded and is mounted nowhere."""
        used = {key for keys in self.mounted.values() for key in keys}
        for key in self._unwanted - used:
            self._held.pop(key, None)
        self._unwanted &= used

    async def mount(
        self,
        layers: tuple[VerifiedLayer, ...],
        *,
        container_id: int,
        id_map: IdMap,
        writable: bool,
    ) -> Rootfs:
        keys = tuple(layer.stored.key for layer in layers if isinstance(layer.stored, MemoryStored))
        for layer, key in zip(layers, keys, strict=True):
            if key not in self._held or key in self._unwanted:
                raise UnknownItem(f"layer {layer.digest}", "is not kept by this store")
        rootfs = MemoryRootfs(self, container_id, keys)
        try:
            await trio.lowlevel.checkpoint()
        except trio.Cancelled:
            await rootfs.close()
            raise
        return rootfs


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
