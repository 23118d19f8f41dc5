"""How far the layers are that requests under way let the supervisor fetch.

Which these are is known here for certain; how far each has come is what observers are
told, which may be late, or lost. So a number may lag behind, and never outlives its fetch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec

from supervisor import LayerFetched, LayerProgress

if TYPE_CHECKING:
    from supervisor import Event
    from supervisor.formats.digest import Digest


class LayerState(msgspec.Struct, frozen=True, kw_only=True):
    """What is here of a layer.

    `state` is "absent", "incomplete" (an upload), "arriving" (a fetch) or "verified". Bytes
    are of the uncompressed tar; of the blob as it is stored while it is arriving. None where
    they are not known: what was fetched keeps no count.
    """

    state: str
    received_bytes: int | None
    total_bytes: int | None = None


class _Arrival:
    def __init__(self, total_bytes: int | None) -> None:
        self.requests = 0
        self.received_bytes = 0
        self.total_bytes = total_bytes


class Arrivals:
    """As many as there are requests that fetch, which are bounded."""

    def __init__(self) -> None:
        self._arrivals: dict[str, _Arrival] = {}

    @contextmanager
    def fetching(self, digest: Digest, total_bytes: int | None) -> Iterator[None]:
        """A request waits for this layer while the block runs; `total_bytes`, of the blob, is
        what its client believes."""
        arrival = self._arrivals.setdefault(str(digest), _Arrival(total_bytes))
        arrival.requests += 1
        try:
            yield
        finally:
            arrival.requests -= 1
            if arrival.requests == 0:
                del self._arrivals[str(digest)]

    def observe(self, event: Event) -> None:
        """Take in what is told of layers that somebody waits for here; never waits."""
        if isinstance(event, LayerProgress):
            arrival = self._arrivals.get(event.digest)
            if arrival is not None:
                arrival.received_bytes = event.received_bytes
                arrival.total_bytes = event.total_bytes
        elif isinstance(event, LayerFetched):
            arrival = self._arrivals.get(event.expected)
            if arrival is not None and arrival.total_bytes is not None:
                arrival.received_bytes = arrival.total_bytes

    def state(self, digest: Digest) -> LayerState | None:
        """None for a layer that no request lets fetch."""
        arrival = self._arrivals.get(str(digest))
        if arrival is None:
            return None
        return LayerState(
            state="arriving",
            received_bytes=arrival.received_bytes,
            total_bytes=arrival.total_bytes,
        )
