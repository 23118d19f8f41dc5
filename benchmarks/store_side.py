"""Our side of a comparison: the image store's `Store`, used directly, without a daemon around."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec
import structlog
import trio

from benchmarks.cores import used_seconds
from benchmarks.figures import stopwatch
from benchmarks.layer_inputs import Layer
from plugins.image_store.config import StoreConfig
from plugins.image_store.store import Store
from supervisor import (
    Event,
    IdMap,
    LayerMounted,
    LayerSource,
    PluginContext,
    Rootfs,
    StoredLayer,
    VerifiedLayer,
)
from supervisor.formats.digest import Digest

# One container's ids, as a start would give them.
ID_MAP = IdMap(pairs=((0, 100_000), *((number, 100_000 + number) for number in range(1, 100))))
_TIMEOUT_S = 600

T = TypeVar("T")
Wanted = tuple[Digest, LayerSource]


class OpenStore:
    """A store that is open. `events` is what it reported, but for progress."""

    def __init__(self, store: Store, events: list[Event], place: Path) -> None:
        self.store = store
        self.events = events
        self._place = place
        self._containers = 0

    async def load(self, wanted: Wanted) -> VerifiedLayer:
        """From its source to ready for containers: fetched, verified, indexed, mounted."""
        layer = await self.fetch(wanted)
        await self.store.prepare(layer)
        return layer

    async def fetch(self, wanted: Wanted) -> VerifiedLayer:
        expected, source = wanted
        return verified(await self.store.fetch(expected, source))

    async def mount(self, layers: Sequence[VerifiedLayer]) -> Rootfs:
        """A new container's root, read-only."""
        self._containers += 1
        return await self.store.mount(
            tuple(layers), container_id=self._containers, id_map=ID_MAP, writable=False
        )

    def look(self, root: Rootfs, work: Callable[[Path], T]) -> T:
        """What `work` finds in the folder where `root` is shown to it meanwhile. Blocks."""
        root.attach(self._place)
        try:
            return work(self._place)
        finally:
            root.detach()

    def mounted_bytes(self, layer: VerifiedLayer) -> int:
        """What the layer's tar and index (or its tree) take, as the store last reported it."""
        return next(
            event.memory_bytes
            for event in reversed(self.events)
            if isinstance(event, LayerMounted) and event.digest == str(layer.digest)
        )


def verified(stored: StoredLayer) -> VerifiedLayer:
    """As `supervisor.layers` says it after the comparison that is repeated here."""
    if stored.computed.get(stored.expected.algorithm) != stored.expected.hex:
        raise RuntimeError(f"{stored.expected} has another digest")
    layer: VerifiedLayer = VerifiedLayer._create(stored)
    return layer


@asynccontextmanager
async def open_store(
    runtime_dir: Path, *, file_roots: Sequence[Path] = (), **settings: object
) -> AsyncIterator[OpenStore]:
    """A store in RAM below `runtime_dir`, with room for the benchmarks' layers."""
    events: list[Event] = []

    def report(event: Event) -> None:
        if isinstance(event, LayerMounted):
            events.append(event)

    await trio.Path(runtime_dir).mkdir(mode=0o711, parents=True)
    config = msgspec.convert(
        {
            "file_roots": [str(root.resolve()) for root in file_roots],
            "registries": {"*": {}},
            "budget_bytes": 16 << 30,
            "max_layer_bytes": 4 << 30,
            **settings,
        },
        StoreConfig,
    )
    log = structlog.stdlib.get_logger("image_store")
    context = PluginContext(name="image_store", runtime_dir=runtime_dir, log=log, report=report)
    store = Store(config, context)
    place = runtime_dir / "shown"
    await trio.Path(place).mkdir()
    async with store.opened():
        yield OpenStore(store, events, place)


class StoreSide:
    """An image's layers from their sources to a mounted root.

    `parts`: seconds, round by round, until a layer had arrived verified, until it was indexed
    and mounted (of several layers the sums), and until a container's root over all was
    mounted. `used_s`: processor time of this process and those that it started.
    """

    def __init__(
        self, opened: OpenStore, wanted: Sequence[Wanted], *, name: str = "image store"
    ) -> None:
        self.name = name
        self.parts: dict[str, list[float]] = {"arriving": [], "indexing": [], "root": []}
        self.used_s: list[float] = []
        self._opened = opened
        self._wanted = wanted
        self._layers: dict[int, VerifiedLayer] = {}
        self._root: Rootfs | None = None

    async def prepare(self) -> None:
        for samples in self.parts.values():
            samples.append(0.0)
        await trio.lowlevel.checkpoint()

    async def work(self) -> None:
        used_s = used_seconds()
        with trio.fail_after(_TIMEOUT_S):
            async with trio.open_nursery() as nursery:
                for number in range(len(self._wanted)):
                    nursery.start_soon(self._load, number)
            ordered = [self._layers[number] for number in range(len(self._wanted))]
            with self._part("root"):
                self._root = await self._opened.mount(ordered)
        self.used_s.append(used_seconds() - used_s)

    async def _load(self, number: int) -> None:
        with self._part("arriving"):
            layer = self._layers[number] = await self._opened.fetch(self._wanted[number])
        with self._part("indexing"):
            await self._opened.store.prepare(layer)

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        with stopwatch() as watch:
            yield
        self.parts[name][-1] += watch.seconds

    async def tidy(self) -> None:
        if self._root is not None:
            await self._root.close()
            self._root = None
        for layer in self._layers.values():
            await self._opened.store.discard(layer.stored)
        self._layers.clear()


def from_files(layers: Sequence[Layer]) -> list[Wanted]:
    return [(layer.digest, layer.source) for layer in layers]
