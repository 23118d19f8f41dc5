"""One blob, from where it comes from to a stored tar, with all stages at work at once.

    source -> count and hash the blob -> [worker: decompress] -> store -> hash the tar

Between the stages lie a pipe, which the kernel bounds, and a few buffers: the layer is
never in this process's memory as a whole, and the slowest stage sets the pace.
"""

from __future__ import annotations

from functools import partial
from queue import SimpleQueue

import trio

from plugins.image_store.arrival.incoming import IncomingBlob
from plugins.image_store.arrival.sealed import SealedWriter
from plugins.image_store.inflate.process import Compression, Inflater, inflating
from supervisor import Refusal, RuntimeFailed, Untrusted

# One is filled while another is hashed and a third is ready, so that neither waits.
BUFFERS = 3
BUFFER_BYTES = 1 << 20
# Feeding, storing and hashing.
THREADS = 3

Filled = tuple[bytearray, int]


async def transfer(
    blob: IncomingBlob, compression: Compression | None, writer: SealedWriter
) -> None:
    """Read `blob` to its end and give what it holds to `writer`, which stays the caller's.

    When it returns, the blob's own size and digest were right. Raises `Refusal`, or a group
    of them when several stages fail at the same time; `writer` must not be sealed then.
    Cancelled at any checkpoint it leaves no process and no thread. The caller sets the
    deadline.
    """
    limiter = trio.CapacityLimiter(THREADS)
    if compression is None:
        await _store_plain(blob, writer, limiter)
    else:
        await _store_inflated(blob, compression, writer, limiter)


async def _store_plain(
    blob: IncomingBlob, writer: SealedWriter, limiter: trio.CapacityLimiter
) -> None:
    in_thread = partial(trio.to_thread.run_sync, limiter=limiter)
    while piece := await blob.piece():
        async with trio.open_nursery() as nursery:
            for step in (blob.hash, writer.write):
                nursery.start_soon(partial(in_thread, step, piece))
    blob.compare()


async def _store_inflated(
    blob: IncomingBlob,
    compression: Compression,
    writer: SealedWriter,
    limiter: trio.CapacityLimiter,
) -> None:
    feeding = trio.CancelScope()
    is_listening = True
    refusal: Refusal | None = None

    def hash_and_feed(worker: Inflater, piece: bytes) -> None:
        nonlocal is_listening
        blob.hash(piece)
        is_listening = is_listening and worker.feed(piece)

    async def feed(worker: Inflater) -> None:
        with feeding:
            while piece := await blob.piece():
                await trio.to_thread.run_sync(hash_and_feed, worker, piece, limiter=limiter)
            # Before the worker learns of the end, and also when it has found damage already:
            # a wrong digest is told rather than what decompressing the wrong bytes led to.
            blob.compare()
            worker.end_input()

    async def watch(worker: Inflater) -> None:
        nonlocal refusal
        await worker.watch()
        refusal = worker.refusal()
        if not isinstance(refusal, Untrusted):
            # Nobody needs the rest, for which the source might let us wait.
            feeding.cancel()

    async with inflating(compression, item=blob.item) as worker:
        stages = _Stages(worker, writer, limiter)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, worker)
            nursery.start_soon(feed, worker)
            nursery.start_soon(stages.store)
            nursery.start_soon(stages.digest)
    if refusal is not None:
        raise refusal
    if not is_listening or feeding.cancelled_caught:
        raise RuntimeFailed(blob.item, "the decompressor must read all that it is given")


class _Stages:
    """Storing and hashing what a worker gives out, in a thread each. Neither outlives it."""

    def __init__(
        self, worker: Inflater, writer: SealedWriter, limiter: trio.CapacityLimiter
    ) -> None:
        self._worker = worker
        self._writer = writer
        self._limiter = limiter
        # None: the other stage is no more. Bounded by the buffers that there are.
        self._free: SimpleQueue[bytearray | None] = SimpleQueue()
        self._filled: SimpleQueue[Filled | None] = SimpleQueue()
        for _ in range(BUFFERS):
            self._free.put(bytearray(BUFFER_BYTES))

    async def store(self) -> None:
        """Until the worker's output ends. Raises as `SealedWriter.store`."""
        try:
            await trio.to_thread.run_sync(self._store, limiter=self._limiter)
        finally:
            # Here rather than in the thread: cancelled early there is none.
            self._filled.put(None)

    async def digest(self) -> None:
        """Until `store` has ended."""
        try:
            await trio.to_thread.run_sync(self._digest, limiter=self._limiter)
        finally:
            self._free.put(None)

    def _store(self) -> None:
        while (buffer := self._free.get()) is not None:
            size_bytes = self._worker.take(memoryview(buffer))
            if not size_bytes:
                return
            self._writer.store(memoryview(buffer)[:size_bytes])
            self._filled.put((buffer, size_bytes))

    def _digest(self) -> None:
        while (filled := self._filled.get()) is not None:
            buffer, size_bytes = filled
            self._writer.digest(memoryview(buffer)[:size_bytes])
            self._free.put(buffer)
