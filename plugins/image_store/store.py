"""The store: from bytes on their way, over sealed and prepared layers, to mounted roots."""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from plugins.image_store.arrival.arrivals import Arrivals, name_of
from plugins.image_store.arrival.sealed import SealedTar
from plugins.image_store.arrival.upload import Upload
from plugins.image_store.budget import Budget
from plugins.image_store.config import StoreConfig
from plugins.image_store.layer import KeptLayer, Layer, Preparation
from plugins.image_store.mount.kernel import (
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    mount,
    refused_by_kernel,
)
from plugins.image_store.mount.memory_files import MemoryFiles
from plugins.image_store.mount.prepared import PreparedLayer
from plugins.image_store.mount.removal import remove_all
from plugins.image_store.mount.roots import Roots
from plugins.image_store.tar.tree import INODE_BYTES
from plugins.image_store.trial import first_way
from plugins.image_store.work import CLEANUP_TIMEOUT_S, check_cancelled, clean_up
from supervisor import (
    Conflict,
    IdMap,
    LayerFreed,
    LayerMounted,
    LayerSource,
    PluginContext,
    Rootfs,
    RuntimeFailed,
    StoredLayer,
    UnknownItem,
    Untrusted,
)
from supervisor.formats.digest import Digest

if TYPE_CHECKING:
    from supervisor import VerifiedLayer

# How long a layer may still be used after it was unmounted, before that is logged.
FREE_TIMEOUT_S = 2.0


class Store:
    """Implements `supervisor.LayerStore`; usable while the body of `opened` runs.

    Everything lies on one private tmpfs at `runtime_dir/store`, so that whatever a killed
    predecessor left is found by looking there.
    """

    def __init__(self, config: StoreConfig, context: PluginContext) -> None:
        self.budget = Budget(config.budget_bytes)
        self._config = config
        self._context = context
        self._directory = context.runtime_dir / "store"
        self._keys = itertools.count(1)
        self._layers: dict[int, Layer] = {}
        self._arrivals = Arrivals(config, self.budget, context.report)
        self._roots = Roots(self._directory / "roots", self.budget, config, context.log)
        self._memory_files = MemoryFiles()
        self._preparation: Preparation | None = None
        self._is_open = False
        self._long_work = trio.CapacityLimiter(config.parallel_layers)

    # --- life ---------------------------------------------------------------------------------

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Clean up after a predecessor, make the store's tmpfs; free all of it at the end.

        Raises `RuntimeFailed` if layers cannot be mounted here as the settings want it.
        """
        try:
            await self._arrivals.open()
            await trio.to_thread.run_sync(self._make_directory)
            await self._find_way()
            self._is_open = True
            yield
        finally:
            self._is_open = False
            await self._close()

    def _make_directory(self) -> None:
        with refused_by_kernel(str(self._directory), "the store's directory could not be made"):
            remove_all(self._directory)
            self._directory.mkdir(mode=0o700)
            size_bytes = self._config.budget_bytes
            mount(
                b"acon-layers",
                os.fsencode(self._directory),
                filesystem=b"tmpfs",
                flags=MS_NOSUID | MS_NODEV | MS_NOEXEC,
                options=b"mode=0700,size=%d,nr_inodes=%d" % (size_bytes, size_bytes // INODE_BYTES),
            )
            (self._directory / "layers").mkdir(mode=0o700)
            (self._directory / "roots").mkdir(mode=0o700)

    async def _find_way(self) -> None:
        way = await first_way(
            self._config,
            self._directory / "trial",
            storage=self._arrivals.storage,
            log=self._context.log,
        )
        self._roots.open(idmaps=way.id_shift == "idmap")
        self._preparation = Preparation(
            how=way.mount,
            budget=self.budget,
            memory_files=self._memory_files,
            max_entries=self._config.max_entries,
        )

    async def _close(self) -> None:
        await self._arrivals.close()
        await self._roots.close()
        for layer in tuple(self._layers.values()):
            await self._free(layer)
        await clean_up("store", lambda: remove_all(self._directory), log=self._context.log)
        self._memory_files.close()

    # --- bytes in -----------------------------------------------------------------------------

    async def upload(self, expected: Digest, *, size_bytes: int | None) -> Upload:
        """See `LayerStore`. Raises `Untrusted` beyond the limit, `Busy` beyond the budget."""
        self._require_open()
        return await self._arrivals.upload(
            expected, size_bytes=size_bytes, keep=lambda tar: self._keep(expected, tar, "upload")
        )

    async def fetch(self, expected: Digest, source: LayerSource) -> StoredLayer:
        """See `LayerStore`. Raises `Denied` or `UnknownItem` for places it may not read."""
        self._require_open()
        tar = await self._arrivals.fetch(expected, source)
        if not self._is_open:
            tar.close()
            self._require_open()
        return self._keep(expected, tar, name_of(source))

    def _keep(self, expected: Digest, tar: SealedTar, source: str) -> KeptLayer:
        key = next(self._keys)
        kept = KeptLayer(
            expected=expected,
            computed=tar.computed,
            size_bytes=tar.size_bytes,
            source=source,
            key=key,
        )
        self._layers[key] = Layer(kept, tar, self._directory / "layers" / str(key))
        return kept

    # --- bytes out ----------------------------------------------------------------------------

    async def prepare(self, layer: VerifiedLayer) -> None:
        """See `LayerStore`. `Busy` or a cancelled call leaves the sealed bytes as they were."""
        preparation = self._require_open()
        own = self._find(layer.stored)
        async with own.lock:
            if own.prepared is not None:
                return
            if own.is_unwanted:
                raise _unknown(layer.stored)
            try:
                prepared = await trio.to_thread.run_sync(
                    lambda: own.prepare(preparation, between=check_cancelled),
                    limiter=self._long_work,
                )
                if own.is_unwanted:  # since the work began
                    raise _unknown(layer.stored)
            except Untrusted:
                own.is_unwanted = True
                raise
            finally:
                if own.is_unwanted:
                    await self._free_locked(own)
        self._context.report(
            LayerMounted(
                digest=str(own.kept.expected), how=prepared.how, memory_bytes=prepared.memory_bytes
            )
        )

    async def discard(self, stored: StoredLayer) -> None:
        """See `LayerStore`. A layer that is mounted goes when its last root is closed."""
        layer = self._layers.get(stored.key) if isinstance(stored, KeptLayer) else None
        if layer is not None:
            layer.is_unwanted = True
            await self._free(layer)
            await self._free_rest()

    async def _free(self, layer: Layer) -> None:
        with trio.move_on_after(CLEANUP_TIMEOUT_S, shield=True):
            async with layer.lock:
                await self._free_locked(layer)

    async def _free_rest(self) -> None:
        """What somebody still used when it was to be freed: it may be free by now."""
        with trio.move_on_after(CLEANUP_TIMEOUT_S, shield=True):
            for layer in tuple(self._layers.values()):
                if layer.is_unwanted and not layer.lock.locked():
                    async with layer.lock:
                        await self._free_locked(layer, timeout_s=0)

    async def _free_locked(self, layer: Layer, *, timeout_s: float = FREE_TIMEOUT_S) -> None:
        if layer.users or layer.kept.key not in self._layers:
            return
        layer.is_unwanted = True
        # What somebody still uses stays known, and on the account, for `_free_rest`.
        if await clean_up(
            layer.label, lambda: layer.free(timeout_s=timeout_s), log=self._context.log
        ):
            del self._layers[layer.kept.key]
            self._context.report(
                LayerFreed(digest=str(layer.kept.expected), size_bytes=layer.kept.size_bytes)
            )

    # --- roots --------------------------------------------------------------------------------

    async def mount(
        self,
        layers: tuple[VerifiedLayer, ...],
        *,
        container_id: int,
        id_map: IdMap,
        writable: bool,
    ) -> Rootfs:
        """See `LayerStore`. Raises `Conflict` for a container that has a root already."""
        self._require_open()
        used = tuple(self._find(layer.stored) for layer in layers)
        prepared = tuple(_mountable(layer) for layer in used)

        async def ended() -> None:
            for layer in used:
                layer.users -= 1
                if layer.is_unwanted:
                    await self._free(layer)
            await self._free_rest()

        root = self._roots.claim(
            prepared, container_id=container_id, writable=writable, ended=ended
        )
        for layer in used:
            layer.users += 1
        await self._roots.mount(root, prepared, id_map=id_map, writable=writable)
        return root

    # --- helpers ------------------------------------------------------------------------------

    def _find(self, stored: StoredLayer) -> Layer:
        layer = self._layers.get(stored.key) if isinstance(stored, KeptLayer) else None
        if layer is None or layer.is_unwanted:
            raise _unknown(stored)
        return layer

    def _require_open(self) -> Preparation:
        if not self._is_open or self._preparation is None:
            raise RuntimeFailed("image_store", "the store is not open")
        return self._preparation


def _mountable(layer: Layer) -> PreparedLayer:
    if layer.prepared is None:
        raise Conflict(layer.label, "must be prepared before it can be mounted")
    return layer.prepared


def _unknown(stored: StoredLayer) -> UnknownItem:
    return UnknownItem(f"layer {stored.expected}", "is not kept by this store")
