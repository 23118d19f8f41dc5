"""Brings the layers of admitted images into the TD, several at once.

The daemon fetches a layer itself where its configuration lets it, which is quickest; else the
bytes are read here, checked, and sent. One that fails leaves the others alone.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import msgspec

from acon.arguments import RegistryAccess
from acon.client import Client
from acon.errors import UsageError
from acon.images.image import local_blob
from acon.load_report import How, LoadReport
from acon.loading import WantedLayer
from acon.local_layer import LocalLayer, check_blob, check_layer
from acon.parallel import in_parallel
from supervisor.errors import Denied, UnknownItem
from supervisor.formats.digest import Digest
from supervisor.formats.errors import Refusal
from supervisor.seams import FileBlob, LayerSource


class Way(msgspec.Struct, frozen=True, kw_only=True):
    """How layers go: `parallel` at once, those in files or all of them read and sent from here
    although the daemon might fetch them."""

    access: RegistryAccess
    parallel: int
    upload_files: bool = False
    upload_all: bool = False

    def uploads(self, source: LayerSource) -> bool:
        return self.upload_all or (self.upload_files and isinstance(source, FileBlob))


class Transfers:
    """The layers that one load has to bring: first `check`, once admitted `bring`."""

    def __init__(
        self, client: Client, layers: Sequence[WantedLayer], way: Way, report: LoadReport
    ) -> None:
        self._client = client
        self._layers = layers
        self._way = way
        self._report = report
        # Of each layer: those that are not known to be wrong, and what was checked wholly.
        self._sources: dict[Digest, tuple[LayerSource, ...]] = {}
        self._checked: dict[Digest, LocalLayer] = {}

    async def check(self) -> None:
        """What can be found wrong before any image is admitted: raises the first that is.

        Every layer needs a source. Files are read: wholly checked if they are to be sent from
        here, else their blob's digest is.
        """
        for layer in self._layers:
            if not layer.sources:
                raise UsageError(
                    str(layer.digest),
                    "something must say where the layer is: a bundle's sources.json, or what was "
                    "published with the image",
                    actual=f"nothing does, and {layer.named_by} needs it",
                )
        jobs = [partial(self._check, layer) for layer in self._layers]
        await in_parallel(jobs, at_once=self._way.parallel)

    async def bring(self) -> int:
        """Bring all; returns how many failed. What failed and why was reported.

        When cancelled, connections are closed (by which the daemon gives up what nobody else
        waits for) and temporary files are gone.
        """
        jobs = [partial(self._bring, layer.digest) for layer in self._layers]
        arrived = await in_parallel(jobs, at_once=self._way.parallel)
        return arrived.count(False)

    async def _check(self, layer: WantedLayer) -> None:
        """Keeps the first source that is not wrong, and those after it."""
        for number, source in enumerate(layer.sources):
            self._sources[layer.digest] = layer.sources[number:]
            try:
                await self._check_source(layer.digest, source)
                return
            except (Refusal, OSError) as error:
                if number == len(layer.sources) - 1:
                    raise
                self._report.warning(f"layer {layer.digest}: trying another source: {error}")

    async def _check_source(self, digest: Digest, source: LayerSource) -> None:
        if not isinstance(source, FileBlob):
            return
        with self._report.step(digest, "check", source.size_bytes) as bar:
            if self._way.uploads(source):
                self._checked[digest] = await check_layer(source, digest, bar)
            else:
                await check_blob(source, digest, bar)

    async def _bring(self, digest: Digest) -> bool:
        try:
            how = await self._from_any(digest)
        except (Refusal, OSError) as error:
            self._report.layer(digest, "failed", error=error)
            return False
        self._report.layer(digest, "verified", how=how)
        return True

    async def _from_any(self, digest: Digest) -> How:
        """Sources are tried in order; the last one's failure counts."""
        *others, last = self._sources[digest]
        for source in others:
            try:
                return await self._from(digest, source)
            except (Refusal, OSError) as error:
                self._report.warning(f"layer {digest}: trying another source: {error}")
        return await self._from(digest, last)

    async def _from(self, digest: Digest, source: LayerSource) -> How:
        if not self._way.uploads(source):
            try:
                with self._report.step(digest, "fetch", source.size_bytes) as bar:
                    await self._client.fetch_layer(digest, source, progress=bar.reach)
                return "fetched"
            except (Denied, UnknownItem):
                pass  # not what its configuration lets it, or it cannot see it: sent from here
        async with self._at_hand(digest, source) as local:
            with self._report.step(digest, "send", local.size_bytes) as bar:
                await self._client.upload_layer(digest, local, progress=bar.reach)
        return "sent"

    @asynccontextmanager
    async def _at_hand(self, digest: Digest, source: LayerSource) -> AsyncIterator[LocalLayer]:
        """The layer in a file of this machine, checked; a temporary one goes with the block."""
        known = self._checked.get(digest)
        if known is not None and known.source == source:
            yield known
            return
        async with AsyncExitStack() as stack:
            with self._report.step(digest, "get", source.size_bytes) as bar:
                blob = await stack.enter_async_context(
                    local_blob(source, self._way.access, advance=bar.advance)
                )
            with self._report.step(digest, "check", blob.size_bytes) as bar:
                local = await check_layer(blob, digest, bar)
            yield local
