"""One layer that somebody sends."""

from __future__ import annotations

from collections.abc import Callable

import trio

from plugins.image_store.arrival.progress import Progress
from plugins.image_store.arrival.sealed import SealedTar, SealedWriter
from supervisor import StoredLayer, Untrusted

# A thread is worth its hand-over from this many bytes on; held in Python memory meanwhile.
FLUSH_BYTES = 1 << 20
CLEANUP_TIMEOUT_S = 10
ANNOUNCED_RULE = "the layer must have the size that was announced"


class Upload:
    """Implements `supervisor.LayerUpload`.

    A `write` that is cancelled has taken either all of its chunk or nothing, and
    `received_bytes` says which, so that the sender can resume.
    """

    def __init__(
        self,
        writer: SealedWriter,
        *,
        item: str,
        size_bytes: int | None,
        progress: Progress,
        limiter: trio.CapacityLimiter,
        keep: Callable[[SealedTar], StoredLayer],
        forget: Callable[[Upload], None],
    ) -> None:
        self._writer = writer
        self._item = item
        self._size_bytes = size_bytes
        self._progress = progress
        self._limiter = limiter
        self._keep = keep
        self._forget = forget
        self._lock = trio.Lock()
        self._buffer = bytearray()
        self._received_bytes = 0
        self._ended = False

    @property
    def received_bytes(self) -> int:
        return self._received_bytes

    async def write(self, chunk: bytes) -> None:
        """See `LayerUpload`. `Busy` when the store has no room: what was taken stays."""
        async with self._lock:
            self._require_open()
            total_bytes = self._received_bytes + len(chunk)
            self._writer.check_room(total_bytes)
            self._buffer += chunk
            self._received_bytes = total_bytes
            if len(self._buffer) >= FLUSH_BYTES:
                await self._flush()
            if self._progress.is_due():
                self._progress.tell(total_bytes)

    async def finish(self) -> StoredLayer:
        """See `LayerUpload`. When it raises or is cancelled the bytes are freed."""
        async with self._lock:
            self._require_open()
            try:
                if self._size_bytes is not None and self._received_bytes != self._size_bytes:
                    raise Untrusted(
                        self._item,
                        ANNOUNCED_RULE,
                        expected=f"{self._size_bytes} bytes",
                        actual=f"{self._received_bytes} bytes",
                    )
                await self._flush()
                stored = self._keep(self._writer.seal())
            except BaseException:
                await self._free()
                raise
            self._end()
            return stored

    async def abort(self) -> None:
        """See `LayerUpload`."""
        with trio.move_on_after(CLEANUP_TIMEOUT_S, shield=True):
            async with self._lock:
                if not self._ended:
                    await self._free()

    async def _flush(self) -> None:
        await trio.to_thread.run_sync(self._writer.write, self._buffer, limiter=self._limiter)
        self._buffer = bytearray()

    async def _free(self) -> None:
        with trio.move_on_after(CLEANUP_TIMEOUT_S, shield=True):
            # Giving gigabytes back to the kernel takes a while, too.
            await trio.to_thread.run_sync(self._writer.close)
        self._end()

    def _end(self) -> None:
        self._ended = True
        self._buffer = bytearray()
        self._forget(self)

    def _require_open(self) -> None:
        if self._ended:
            raise RuntimeError("the upload was finished or aborted already")
