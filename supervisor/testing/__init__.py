"""What a plugin author needs to test a plugin without hardware, mounts or processes.

`Owner` signs manifests as an image owner would; `in_memory_plugin` is a whole software
machine (register, quotes, layer store, runtime) that keeps everything in memory;
`running` runs a real supervisor around it and the plugin under test.

    async with running([in_memory_plugin(tmp_path), plugin(MyPlugin, tmp_path)], tmp_path) as s:
        await s.admit([Owner("me").sign(manifest(name="app:1"))])

Nothing here proves anything to a relying party: the quotes are signed by nobody.
"""

from __future__ import annotations

from supervisor.testing.harness import config_for, in_memory_plugin, plugin, run_at_once, running
from supervisor.testing.memory import (
    InMemory,
    InMemoryConfig,
    MemoryLayers,
    MemoryQuotes,
    MemoryRegisters,
)
from supervisor.testing.memory_runtime import MemoryPrepared, MemoryProcess, MemoryRuntime
from supervisor.testing.owners import Owner, manifest

__all__ = [
    "InMemory",
    "InMemoryConfig",
    "MemoryLayers",
    "MemoryPrepared",
    "MemoryProcess",
    "MemoryQuotes",
    "MemoryRegisters",
    "MemoryRuntime",
    "Owner",
    "config_for",
    "in_memory_plugin",
    "manifest",
    "plugin",
    "run_at_once",
    "running",
]
