"""How layers come in: uploaded, or fetched from where their blobs lie."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager

import trio

from plugins.image_store.arrival.file_blob import open_file_blob
from plugins.image_store.arrival.incoming import IncomingBlob
from plugins.image_store.arrival.media_types import compression_of
from plugins.image_store.arrival.progress import Progress
from plugins.image_store.arrival.sealed import SealedTar, SealedWriter
from plugins.image_store.arrival.storage import storage_for
from plugins.image_store.arrival.transfer import transfer
from plugins.image_store.arrival.upload import ANNOUNCED_RULE, Upload
from plugins.image_store.budget import Budget
from plugins.image_store.config import StoreConfig
from plugins.image_store.inflate.process import Compression
from plugins.image_store.registry.source import open_registry_blob
from plugins.image_store.work import CLEANUP_TIMEOUT_S
from supervisor import Busy, Event, FileBlob, LayerSource, Refusal, StoredLayer, Untrusted
from supervisor.formats.digest import Digest

# Uploads are hashed a megabyte at a time; so many of these steps run at once.
UPLOAD_WORKERS = 8
LIMIT_RULE = "a layer has a bounded size (max_layer_bytes)"


class Arrivals:
    """Takes in layers within the store's budget; what they end as is the caller's."""

    def __init__(
        self, config: StoreConfig, budget: Budget, report: Callable[[Event], None]
    ) -> None:
        self._config = config
        self._budget = budget
        self._report = report
        self.storage = storage_for(config.storage_dir)
        self._uploads: set[Upload] = set()
        self._upload_work = trio.CapacityLimiter(UPLOAD_WORKERS)
        self._fetches = trio.CapacityLimiter(config.parallel_layers)

    async def open(self) -> None:
        """Before all else. Raises `ConfigError` if layers cannot lie in `storage_dir`."""
        await trio.to_thread.run_sync(self.storage.open)

    async def close(self) -> None:
        """End all uploads; whoever cancels fetches does so before."""
        for upload in tuple(self._uploads):
            await upload.abort()
        self.storage.close()

    async def upload(
        self,
        expected: Digest,
        *,
        size_bytes: int | None,
        keep: Callable[[SealedTar], StoredLayer],
    ) -> Upload:
        """See `LayerStore.upload`. `keep` takes over what `finish` seals."""
        await trio.lowlevel.checkpoint()
        if len(self._uploads) >= self._config.max_uploads:
            raise Busy(
                str(expected),
                "too many uploads at once (max_uploads)",
                expected=f"at most {self._config.max_uploads}",
            )
        upload = Upload(
            self._writer(expected, size_bytes),
            item=str(expected),
            size_bytes=size_bytes,
            progress=Progress(str(expected), size_bytes, self._report),
            limiter=self._upload_work,
            keep=keep,
            forget=self._uploads.discard,
        )
        self._uploads.add(upload)
        return upload

    async def fetch(self, expected: Digest, source: LayerSource) -> SealedTar:
        """See `LayerStore.fetch`; the tar is the caller's to close.

        What `source` announces is judged, and reserved, before a byte moves; before that a
        layer waits for its turn (`parallel_layers`).
        """
        item = name_of(source)
        compression = compression_of(source.media_type, item=item)
        size_bytes = source.size_bytes if compression is None else source.tar_size_bytes
        self._check_limit(expected, size_bytes)
        try:
            async with self._fetches:
                tar = await self._fetched(expected, source, compression, size_bytes)
        except BaseExceptionGroup as group:
            refusal = _first_refusal(group)
            if refusal is None:
                raise
            raise refusal from refusal.__cause__
        return tar

    async def _fetched(
        self,
        expected: Digest,
        source: LayerSource,
        compression: Compression | None,
        size_bytes: int | None,
    ) -> SealedTar:
        writer = self._writer(expected, size_bytes)
        try:
            async with self._open_blob(source) as chunks:
                blob = IncomingBlob(
                    chunks,
                    item=name_of(source),
                    size_bytes=source.size_bytes,
                    blob_digest=source.blob_digest,
                    progress=Progress(str(expected), source.size_bytes, self._report),
                )
                await transfer(blob, compression, writer)
            if size_bytes is not None and writer.size_bytes != size_bytes:
                raise Untrusted(
                    str(expected),
                    ANNOUNCED_RULE,
                    expected=f"{size_bytes} bytes",
                    actual=f"{writer.size_bytes} bytes",
                )
            # Last, for nothing may come between the sealed tar and its new owner: closing a
            # connection can be cancelled.
            return await trio.to_thread.run_sync(writer.seal)
        finally:
            with trio.move_on_after(CLEANUP_TIMEOUT_S, shield=True):
                # Giving gigabytes back to the kernel takes a while.
                await trio.to_thread.run_sync(writer.close)

    def _check_limit(self, expected: Digest, size_bytes: int | None) -> None:
        limit_bytes = self._config.max_layer_bytes
        if size_bytes is not None and not 0 <= size_bytes <= limit_bytes:
            raise Untrusted(
                str(expected),
                LIMIT_RULE,
                expected=f"0 to {limit_bytes} bytes",
                actual=f"{size_bytes} bytes",
            )

    def _writer(self, expected: Digest, size_bytes: int | None) -> SealedWriter:
        """For a layer of `size_bytes`, if that is known. Raises `Untrusted`, `Busy`."""
        self._check_limit(expected, size_bytes)
        return SealedWriter(
            expected,
            self._budget.reserve(size_bytes or 0, item=str(expected)),
            limit_bytes=self._config.max_layer_bytes if size_bytes is None else size_bytes,
            limit_rule=LIMIT_RULE if size_bytes is None else ANNOUNCED_RULE,
            storage=self.storage,
        )

    def _open_blob(self, source: LayerSource) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        if isinstance(source, FileBlob):
            return open_file_blob(self._config.file_roots, source)
        return open_registry_blob(self._config, source)


def name_of(source: LayerSource) -> str:
    """What refusals call it: `FILE`, `FILE@OFFSET` or `REGISTRY/REPOSITORY@DIGEST`."""
    if isinstance(source, FileBlob):
        return f"{source.file}@{source.offset_bytes}" if source.offset_bytes else source.file
    return f"{source.registry}/{source.repository}@{source.blob_digest}"


def _first_refusal(group: BaseExceptionGroup[BaseException]) -> BaseException | None:
    """The first, if stages raised refusals at the same time and nothing else happened."""
    refusals, rest = group.split(Refusal)
    if refusals is None or rest is not None:
        return None
    error: BaseException = refusals
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
