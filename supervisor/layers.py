"""From named digests to verified layers: nothing parses a layer before it is verified."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager

import trio

from supervisor.config import LayersConfig
from supervisor.errors import Conflict, DigestMismatch, Refusal, RuntimeFailed, UnknownItem
from supervisor.events import LayerFetched, LayerVerified, LoadRefused
from supervisor.formats.digest import Digest
from supervisor.layer_uses import LayerUses
from supervisor.plugin_host import PluginHost
from supervisor.proofs import StoredLayer, VerifiedLayer
from supervisor.seam_guard import deadline, require_type, seam, undo
from supervisor.seams import LayerSource, LayerStore, LayerUpload
from supervisor.shared_transfers import SharedTransfers


class Layers:
    """The verified layers of this boot, and those on their way.

    Only layers that an admitted image names are let in, so that strangers cannot fill the
    TD's memory with bytes that nothing could ever mount; and of one image no more than
    `layers.max_image_bytes`.
    """

    def __init__(
        self,
        store: LayerStore,
        host: PluginHost,
        config: LayersConfig,
        *,
        uses: LayerUses,
        transfers: SharedTransfers,
    ) -> None:
        self._timeout_s = config.timeout_s
        self._store = store
        self._host = host
        self._uses = uses
        self._transfers = transfers
        self._verified: dict[Digest, VerifiedLayer] = {}
        # Set when the delivery that keeps others out has ended.
        self._coming: dict[Digest, trio.Event] = {}
        # Of what is verified or about to be: two layers of one image cannot both get in last.
        self._held_bytes: dict[Digest, int] = {}
        self._starts: Counter[VerifiedLayer] = Counter()
        self._superseded: set[VerifiedLayer] = set()

    def has(self, digest: Digest) -> bool:
        """Whether it is verified and can be mounted."""
        return digest in self._verified

    # --- bytes in -----------------------------------------------------------------------------

    async def begin_upload(self, expected: Digest, *, size_bytes: int | None) -> LayerUpload:
        """Raises `UnknownItem` for a layer that nobody named, `Untrusted` for one too many
        bytes in one image, `Conflict` if it is here or being fetched."""
        with self._told():
            self._require_named(expected)
            if expected in self._verified:
                raise Conflict(str(expected), "is already here, verified")
            self._require_room(expected, size_bytes)
            if self._transfers.is_running(expected):
                raise Conflict(str(expected), "is being fetched for somebody else")
            with self._bounded(expected), seam(str(expected), "the layer store's upload"):
                return await self._store.upload(expected, size_bytes=size_bytes)

    async def finish_upload(self, expected: Digest, upload: LayerUpload) -> None:
        """Verify uploaded bytes; frees them when they are wrong or when cancelled."""
        try:
            with self._told(), self._bounded(expected), self._arrival(expected):
                if expected in self._verified:
                    raise Conflict(str(expected), "was delivered twice; the first is kept")
                with seam(str(expected), "the layer store's finish"):
                    stored = await upload.finish()
                await self._accept(expected, stored)
        finally:
            # After a successful finish this is a no-op by contract.
            await undo(str(expected), "the layer store's abort", upload.abort)

    async def fetch(self, expected: Digest, source: LayerSource) -> None:
        """Bring a layer in; returns at once if it is here.

        Fetches of one layer share one transfer, from the first one's source and within the
        first one's time. It goes on until the last caller is cancelled, and then leaves
        nothing behind. One that finds an upload of the layer being verified waits for it.
        """
        with self._told():
            self._require_named(expected)
            if expected in self._verified:
                return
            self._require_room(expected, source.tar_size_bytes)
        await self._transfers.join(expected, lambda: self._transfer(expected, source))

    async def _transfer(self, expected: Digest, source: LayerSource) -> None:
        with self._told(), self._bounded(expected):
            while (uploaded := self._coming.get(expected)) is not None:
                await uploaded.wait()
            if expected in self._verified:
                return
            with self._arrival(expected):
                with seam(str(expected), "the layer store's fetch"):
                    stored = await self._store.fetch(expected, source)
                await self._accept(expected, stored)

    @contextmanager
    def _arrival(self, expected: Digest) -> Iterator[None]:
        if expected in self._coming:
            raise Conflict(str(expected), "is being delivered by somebody else")
        self._coming[expected] = done = trio.Event()
        try:
            yield
        finally:
            del self._coming[expected]
            done.set()

    async def _accept(self, expected: Digest, stored: StoredLayer) -> None:
        require_type(stored, StoredLayer, item=str(expected))
        try:
            layer = await self._verify(expected, stored)
        except BaseException:
            self._held_bytes.pop(expected, None)
            await self._discard(stored)
            raise
        self._verified[expected] = layer
        self._host.emit(LayerVerified(digest=str(expected), size_bytes=stored.size_bytes))

    async def _verify(self, expected: Digest, stored: StoredLayer) -> VerifiedLayer:
        if stored.expected != expected:
            raise RuntimeFailed(
                str(expected), "the store answered for another layer", actual=stored.expected
            )
        computed = stored.computed.get(expected.algorithm)
        if computed != expected.hex:
            raise DigestMismatch(
                str(expected),
                "the layer's bytes must have the digest that was asked for",
                expected=expected.hex,
                actual=computed,
            )
        self._uses.require_room(expected, stored.size_bytes, self._held_bytes)
        self._held_bytes[expected] = stored.size_bytes
        event = LayerFetched(
            expected=str(expected),
            computed=tuple(sorted(stored.computed.items())),
            size_bytes=stored.size_bytes,
            source=stored.source,
        )
        self._host.emit(event)
        await self._host.judge("verify_layer", event, item=str(expected))
        layer: VerifiedLayer = VerifiedLayer._create(stored)
        with seam(str(expected), "the layer store's prepare"):
            await self._store.prepare(layer)
        return layer

    # --- bytes out ----------------------------------------------------------------------------

    def require(self, digests: Iterable[Digest], *, item: str) -> tuple[VerifiedLayer, ...]:
        """The layers of image `item`, in order. Raises `Conflict` that lists all that are
        missing, `Untrusted` when together they are larger than an image may be."""
        wanted = tuple(digests)
        missing = [str(digest) for digest in wanted if digest not in self._verified]
        if missing:
            raise Conflict(
                item,
                "cannot start before its layers are here",
                actual="missing " + ", ".join(missing),
            )
        found = tuple(self._verified[digest] for digest in wanted)
        self._uses.require_bounded(item, ((layer.digest, layer.size_bytes) for layer in found))
        return found

    @asynccontextmanager
    async def starting(self, layers: tuple[VerifiedLayer, ...]) -> AsyncIterator[None]:
        """Keep layers from being freed until they are mounted, whatever supersedes them.

        No checkpoint before the body. What was superseded meanwhile is freed at its end; the
        store keeps what is mounted until the last root of it is closed.
        """
        self._starts.update(layers)
        try:
            yield
        finally:
            self._starts.subtract(layers)
            self._starts += Counter()  # forgets the zeros
            await self._discard_superseded()

    async def free_superseded(self) -> None:
        """Free what no executable image needs any more although one did before.

        To be called whenever images were admitted. What is freed is missing again at once,
        before the first checkpoint, and may be brought in again by who asks for it by name.
        """
        for digest in self._uses.superseded() & self._verified.keys():
            self._superseded.add(self._verified.pop(digest))
            del self._held_bytes[digest]
        await self._discard_superseded()

    async def _discard_superseded(self) -> None:
        free = {layer for layer in self._superseded if not self._starts[layer]}
        self._superseded -= free
        for layer in free:
            await self._discard(layer.stored)

    async def _discard(self, stored: StoredLayer) -> None:
        item = str(stored.expected)
        await undo(item, "the layer store's discard", lambda: self._store.discard(stored))

    # --- around each of them ------------------------------------------------------------------

    def _require_named(self, expected: Digest) -> None:
        if not self._uses.is_named(expected):
            raise UnknownItem(str(expected), "no admitted image names this layer")

    def _require_room(self, expected: Digest, tar_size_bytes: int | None) -> None:
        # As a client announces it; what is stored is judged again.
        if tar_size_bytes is not None:
            self._uses.require_room(expected, tar_size_bytes, self._held_bytes)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Observers hear of every refusal."""
        try:
            yield
        except Refusal as error:
            self._host.emit(LoadRefused(item=error.item, rule=error.rule, message=str(error)))
            raise

    @contextmanager
    def _bounded(self, expected: Digest) -> Iterator[None]:
        with deadline(str(expected), "must be here in time (layers.timeout_s)", self._timeout_s):
            yield
