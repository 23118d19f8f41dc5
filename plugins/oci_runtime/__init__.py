"""Containers, through the machine's own OCI runtime (runc or crun)."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import trio

from plugins.oci_runtime.service import RuntimeService
from plugins.oci_runtime.settings import Settings
from supervisor import ConfigError, PluginContext, hookimpl

if TYPE_CHECKING:
    from supervisor import ContainerRuntime


class OciRuntime:
    """Provides `container_runtime`; keeps what containers need for as long as it lives."""

    Config: TypeAlias = Settings

    def __init__(self, config: Settings, context: PluginContext) -> None:
        self._service = RuntimeService(context, config)

    @hookimpl
    async def lifespan(self, task_status: trio.TaskStatus[None]) -> None:
        await self._service.run(task_status)

    @hookimpl
    async def container_runtime(self) -> ContainerRuntime:
        await trio.lowlevel.checkpoint()
        if self._service.launcher is None:
            raise ConfigError("oci_runtime", "provides containers only while its lifespan runs")
        return self._service.launcher
