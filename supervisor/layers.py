"""From named digests to verified layers: nothing parses a layer before it is verified."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import trio

from supervisor.config import LayersConfig
from supervisor.errors import Conflict, DigestMismatch, Refusal, RuntimeFailed, UnknownItem
from supervisor.events import LayerFetched, LayerVerified, LoadRefused
from supervisor.formats.digest import Digest
from supervisor.plugin_host import PluginHost
from supervisor.proofs import StoredLayer, VerifiedLayer
from supervisor.seam_guard import deadline, require_type, seam, undo
from supervisor.seams import LayerStore, LayerUpload, OciBlob


class Layers:
    """The verified layers of this boot, and those on their way.

    Only layers that an admitted image names are let in (`named`), so that strangers
    cannot fill the TD's memory with bytes that nothing could ever mount.
    """

    def __init__(
        self,
        store: LayerStore,
        host: PluginHost,
        config: LayersConfig,
        named: Callable[[], frozenset[Digest]],
    ) -> None:
        self._timeout_s = config.timeout_s
        self._store = store
        self._host = host
        self._named = named
        self._verified: dict[Digest, VerifiedLayer] = {}
        self._coming: dict[Digest, trio.Event] = {}

    def has(self, digest: Digest) -> bool:
        """Whether it is verified and can be mounted."""
        return digest in self._verified

    def require(self, digests: Iterable[Digest], *, item: str) -> tuple[VerifiedLayer, ...]:
        """The layers, in order. Raises `Conflict` that lists all that are missing."""
        wanted = tuple(digests)
        missing = [str(digest) for digest in wanted if digest not in self._verified]
        if missing:
            raise Conflict(
                item,
                "cannot start before its layers are here",
                actual="missing " + ", ".join(missing),
            )
        return tuple(self._verified[digest] for digest in wanted)

    async def begin_upload(self, expected: Digest, *, size_bytes: int | None) -> LayerUpload:
        """Raises `UnknownItem` for a layer that nobody named, `Conflict` if it is here."""
        with self._told():
            self._require_named(expected)
            if expected in self._verified:
                raise Conflict(str(expected), "is already here, verified")
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

    async def fetch(self, expected: Digest, source: OciBlob) -> None:
        """Bring a layer in. Two fetches of one layer share one transfer.

        When the first caller is cancelled, the second one fetches itself.
        """
        with self._told(), self._bounded(expected):
            self._require_named(expected)
            while expected not in self._verified:
                coming = self._coming.get(expected)
                if coming is not None:
                    await coming.wait()
                    continue
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
        except BaseException:
            await undo(
                str(expected), "the layer store's discard", lambda: self._store.discard(stored)
            )
            raise
        self._verified[expected] = layer
        self._host.emit(LayerVerified(digest=str(expected), size_bytes=stored.size_bytes))

    def _require_named(self, expected: Digest) -> None:
        if expected not in self._named():
            raise UnknownItem(str(expected), "no admitted image names this layer")

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
