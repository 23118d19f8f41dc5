"""A supervisor around a machine in memory, for tests of what containers live through."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

from supervisor import ContainerView, Event, Invocation, PluginContext, hookimpl
from supervisor.formats.digest import digest_of
from supervisor.service import Supervisor
from supervisor.testing import (
    InMemory,
    InMemoryConfig,
    MemoryProcess,
    MemoryRuntime,
    Owner,
    in_memory_plugin,
    manifest,
    plugin,
    running,
)

OWNER = Owner("owner")
TAR = b"bytes of a layer"
LAYER = digest_of("sha384", TAR)


class Watching:
    """Keeps every event, in order."""

    Config = InMemoryConfig

    def __init__(self, config: InMemoryConfig, context: PluginContext) -> None:
        self.events: list[Event] = []

    @hookimpl
    async def observe(self, event: Event) -> None:
        self.events.append(event)


class Machine(NamedTuple):
    """The supervisor, what lies below it, and what it told its observers."""

    supervisor: Supervisor
    memory: InMemory
    events: list[Event]

    @property
    def runtime(self) -> MemoryRuntime:
        return self.memory.runtime

    async def load(self, **fields: object) -> str:
        """An image, admitted, with its one layer; `fields` are its manifest's."""
        name = str(fields.pop("name", "app:1"))
        signed = OWNER.sign(manifest(name=name, layers=[str(LAYER)], **fields))  # type: ignore[arg-type]  # any JSON
        (image_id,) = (await self.supervisor.admit([signed])).image_ids
        if not self.supervisor.has_layer(LAYER):
            upload = await self.supervisor.upload_layer(LAYER, size_bytes=len(TAR))
            await upload.write(TAR)
            await self.supervisor.finish_layer(LAYER, upload)
        return image_id

    async def start(self, **fields: object) -> int:
        """A container of an image with these fields."""
        return await self.supervisor.start(await self.load(**fields), [])

    def process(self, container_id: int) -> MemoryProcess:
        return self.runtime.running[container_id]

    def view(self, container_id: int) -> ContainerView:
        (view,) = [one for one in self.supervisor.containers() if one.container_id == container_id]
        return view

    def told(self, container_id: int) -> list[str]:
        """The names of the events about a container."""
        return [
            type(event).__name__
            for event in self.events
            if getattr(event, "container_id", None) == container_id
        ]

    @property
    def is_empty(self) -> bool:
        """Nothing of any container is left below the supervisor."""
        return not (self.runtime.running or self.runtime.prepared or self.memory.layers.mounted)


@asynccontextmanager
async def containing(folder: Path, **settings: int) -> AsyncIterator[Machine]:
    """`settings` are those of `[containers]`."""
    machine, watching = in_memory_plugin(folder), plugin(Watching, folder)
    assert isinstance(machine.plugin, InMemory) and isinstance(watching.plugin, Watching)
    toml = "[containers]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items())
    async with running([machine, watching], folder, toml) as supervisor:
        yield Machine(supervisor, machine.plugin, watching.plugin.events)


def invocation(entry_point: str = "Run", **fields: object) -> Invocation:
    """One with a deadline of 30 s that keeps 100 bytes of each output."""
    values = {"timeout_s": 30.0, "capture_bytes": 100, **fields}
    return Invocation(entry_point=entry_point, **values)  # type: ignore[arg-type]  # its own fields
