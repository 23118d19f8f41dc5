"""Layers: fetched or uploaded, hashed into sealed memory, unpacked, mounted for containers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from plugins.image_store.config import StoreConfig
from plugins.image_store.store import Store
from supervisor import Allow, Deny, LayerFetched, PluginContext, hookimpl
from supervisor.formats.digest import parse_digest
from supervisor.formats.errors import FormatError

if TYPE_CHECKING:
    from supervisor import LayerStore


class ImageStore:
    """The plugin `image_store`: provides the layer store and judges layers by their digest."""

    Config = StoreConfig

    def __init__(self, config: StoreConfig, context: PluginContext) -> None:
        self._store = Store(config, context)

    @hookimpl
    async def layer_store(self) -> LayerStore:
        return self._store

    @hookimpl
    async def verify_layer(self, event: LayerFetched) -> Allow | Deny:
        """Allow only bytes with the digest that they were asked for by."""
        try:
            # Which algorithms are strong enough was decided when the manifest was read.
            expected = parse_digest(event.expected, item="expected", unsafe_allow_sha256=True)
        except FormatError as error:
            return Deny(str(error))
        computed = event.computed_hex(expected.algorithm)
        if computed is None:
            return Deny(f"{event.expected}: no {expected.algorithm} was computed over its bytes")
        if computed != expected.hex:
            return Deny(
                f"{event.expected}: the bytes have another digest; "
                f"expected {expected.hex}, got {computed}"
            )
        return Allow()

    @hookimpl
    async def lifespan(self, task_status: trio.TaskStatus[None]) -> None:
        async with self._store.opened():
            task_status.started()
            await trio.sleep_forever()
