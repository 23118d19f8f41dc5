"""The store: from bytes on their way, over sealed and unpacked layers, to mounted roots."""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from plugins.image_store.budget import Budget
from plugins.image_store.config import StoreConfig
from plugins.image_store.kernel import (
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    mount,
    refused_by_kernel,
)
from plugins.image_store.layer import KeptLayer, Layer
from plugins.image_store.oci_layout import open_blob
from plugins.image_store.progress import Progress
from plugins.image_store.removal import remove_all
from plugins.image_store.rootfs import UnpackedLayer
from plugins.image_store.roots import Roots
from plugins.image_store.sealed import SealedTar, SealedWriter
from plugins.image_store.tree import INODE_BYTES
from plugins.image_store.upload import Upload
from plugins.image_store.work import CLEANUP_TIMEOUT_S, check_cancelled, clean_up
from supervisor import (
    Busy,
    Conflict,
    IdMap,
    LayerFreed,
    OciBlob,
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

# Uploads are hashed a megabyte at a time; so many of these steps run at once.
UPLOAD_WORKERS = 8
LIMIT_RULE = "a layer has a bounded size (max_layer_bytes)"
ANNOUNCED_RULE = "the layer must have the size that was announced"


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
        self._uploads: set[Upload] = set()
        self._roots = Roots(self._directory / "roots", self.budget, config, context.log)
        self._is_open = False
        self._long_work = trio.CapacityLimiter(config.parallel_layers)
        self._short_work = trio.CapacityLimiter(UPLOAD_WORKERS)

    # --- life ---------------------------------------------------------------------------------

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Clean up after a predecessor, make the store's tmpfs; free all of it at the end."""
        try:
            await trio.to_thread.run_sync(self._make_directory)
            await self._roots.open()
            self._is_open = True
            yield
        finally:
            self._is_open = False
            await self._close()

    def _make_directory(self) -> None:
        with refused_by_kernel(str(self._directory), "the store's directory could not be made"):
            remove_all(self._directory)
            # Containers reach their roots through it; layers stay behind 0700.
            self._context.runtime_dir.chmod(0o711)
            self._directory.mkdir(mode=0o700)
            size_bytes = self._config.budget_bytes
            mount(
                b"acon-layers",
                os.fsencode(self._directory),
                filesystem=b"tmpfs",
                flags=MS_NOSUID | MS_NODEV | MS_NOEXEC,
                options=b"mode=0711,size=%d,nr_inodes=%d" % (size_bytes, size_bytes // INODE_BYTES),
            )
            (self._directory / "layers").mkdir(mode=0o700)

    async def _close(self) -> None:
        for upload in tuple(self._uploads):
            await upload.abort()
        await self._roots.close()
        for layer in tuple(self._layers.values()):
            await self._free(layer)
        await clean_up("store", lambda: remove_all(self._directory), log=self._context.log)

    # --- bytes in -----------------------------------------------------------------------------

    async def upload(self, expected: Digest, *, size_bytes: int | None) -> Upload:
        """See `LayerStore`. Raises `Untrusted` beyond the limit, `Busy` beyond the budget."""
        await trio.lowlevel.checkpoint()
        self._require_open()
        if len(self._uploads) >= self._config.max_uploads:
            raise Busy(
                str(expected),
                "too many uploads at once (max_uploads)",
                expected=f"at most {self._config.max_uploads}",
            )
        limit_bytes = self._config.max_layer_bytes
        _check_size(expected, size_bytes or 0, limit_bytes)
        reservation = self.budget.reserve(size_bytes or 0, item=str(expected))
        writer = SealedWriter(
            expected,
            reservation,
            limit_bytes=limit_bytes if size_bytes is None else size_bytes,
            limit_rule=LIMIT_RULE if size_bytes is None else ANNOUNCED_RULE,
        )
        upload = Upload(
            writer,
            item=str(expected),
            size_bytes=size_bytes,
            progress=Progress(str(expected), size_bytes, self._context.report),
            limiter=self._short_work,
            keep=lambda tar: self._keep(expected, tar, "upload"),
            forget=self._uploads.discard,
        )
        self._uploads.add(upload)
        return upload

    async def fetch(self, expected: Digest, source: OciBlob) -> StoredLayer:
        """See `LayerStore`. Raises `Denied` or `UnknownItem` for places it may not read."""
        self._require_open()
        progress = Progress(str(expected), source.size_bytes, self._context.report)
        tar = await trio.to_thread.run_sync(
            self._fetched, expected, source, progress, limiter=self._long_work
        )
        if not self._is_open:
            tar.close()
            self._require_open()
        return self._keep(expected, tar, f"oci:{source.directory}@{source.blob_digest}")

    def _fetched(self, expected: Digest, source: OciBlob, progress: Progress) -> SealedTar:
        limit_bytes = self._config.max_layer_bytes
        with refused_by_kernel(source.blob_digest, "the blob could not be read"):
            blob = open_blob(self._config.oci_roots, source)
            try:
                plain_bytes = 0 if blob.is_gzip else source.size_bytes
                _check_size(expected, plain_bytes, limit_bytes)
                writer = SealedWriter(
                    expected,
                    self.budget.reserve(plain_bytes, item=str(expected)),
                    limit_bytes=limit_bytes,
                    limit_rule=LIMIT_RULE,
                )
                try:
                    for piece in blob.pieces(check_cancelled):
                        check_cancelled()
                        writer.write(piece)
                        if progress.is_due():
                            trio.from_thread.run_sync(progress.tell, blob.read_bytes)
                    return writer.seal()
                finally:
                    writer.close()
            finally:
                blob.close()

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
        self._require_open()
        own = self._find(layer.stored)
        async with own.lock:
            if own.unpacked is not None:
                return
            if own.is_unwanted:
                raise _unknown(layer.stored)
            try:
                own.unpacked = await trio.to_thread.run_sync(
                    self._unpacked, own, limiter=self._long_work
                )
                await clean_up(own.label, own.free_tar, log=self._context.log)
                if own.is_unwanted:  # since the work began
                    raise _unknown(layer.stored)
            except Untrusted:
                own.is_unwanted = True
                raise
            finally:
                if own.is_unwanted:
                    await self._free_locked(own)

    def _unpacked(self, layer: Layer) -> UnpackedLayer:
        tree = layer.read(max_entries=self._config.max_entries, between=check_cancelled)
        return layer.unpack(tree, self.budget, between=check_cancelled)

    async def discard(self, stored: StoredLayer) -> None:
        """See `LayerStore`. A layer that is mounted goes when its last root is closed."""
        layer = self._layers.get(stored.key) if isinstance(stored, KeptLayer) else None
        if layer is not None:
            layer.is_unwanted = True
            await self._free(layer)

    async def _free(self, layer: Layer) -> None:
        with trio.move_on_after(CLEANUP_TIMEOUT_S, shield=True):
            async with layer.lock:
                await self._free_locked(layer)

    async def _free_locked(self, layer: Layer) -> None:
        if layer.users or layer.kept.key not in self._layers:
            return
        del self._layers[layer.kept.key]
        if await clean_up(layer.label, layer.free, log=self._context.log):
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
        unpacked = tuple(_mountable(layer) for layer in used)

        async def ended() -> None:
            for layer in used:
                layer.users -= 1
                if layer.is_unwanted:
                    await self._free(layer)

        root = self._roots.claim(
            unpacked, container_id=container_id, writable=writable, ended=ended
        )
        for layer in used:
            layer.users += 1
        await self._roots.mount(root, unpacked, id_map=id_map, writable=writable)
        return root

    # --- helpers ------------------------------------------------------------------------------

    def _find(self, stored: StoredLayer) -> Layer:
        layer = self._layers.get(stored.key) if isinstance(stored, KeptLayer) else None
        if layer is None or layer.is_unwanted:
            raise _unknown(stored)
        return layer

    def _require_open(self) -> None:
        if not self._is_open:
            raise RuntimeFailed("image_store", "the store is not open")


def _mountable(layer: Layer) -> UnpackedLayer:
    if layer.unpacked is None:
        raise Conflict(layer.label, "must be prepared before it can be mounted")
    return layer.unpacked


def _unknown(stored: StoredLayer) -> UnknownItem:
    return UnknownItem(f"layer {stored.expected}", "is not kept by this store")


def _check_size(expected: Digest, size_bytes: int, limit_bytes: int) -> None:
    if not 0 <= size_bytes <= limit_bytes:
        raise Untrusted(
            str(expected),
            LIMIT_RULE,
            expected=f"0 to {limit_bytes} bytes",
            actual=f"{size_bytes} bytes",
        )
