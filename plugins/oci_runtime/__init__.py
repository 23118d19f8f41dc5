"""Containers, through the machine's own OCI runtime (runc or crun)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import msgspec
import trio

from plugins.oci_runtime.service import RuntimeService
from supervisor import ConfigError, PluginContext, hookimpl

if TYPE_CHECKING:
    from supervisor import ContainerRuntime

Mebibytes = Annotated[int, msgspec.Meta(ge=1, le=1_048_576)]


class OciRuntime:
    """Provides `container_runtime`; keeps what containers need for as long as it lives."""

    class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
        """`runtime` and `seccomp_profile` take `auto` or an absolute path, the latter also
        `builtin`. `scratch_size_mib` bounds one container's `/tmp` and `/run` together,
        `shared_size_mib` the `/shared` of all of them."""

        runtime: str = "auto"
        seccomp_profile: str = "auto"
        scratch_size_mib: Mebibytes = 256
        shared_size_mib: Mebibytes = 64
        parallel_starts: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 8
        start_timeout_s: Annotated[int, msgspec.Meta(ge=1, le=3600)] = 30

    def __init__(self, config: Config, context: PluginContext) -> None:
        self._service = RuntimeService(
            context.runtime_dir,
            context.log,
            runtime=config.runtime,
            seccomp_profile=config.seccomp_profile,
            scratch_size_mib=config.scratch_size_mib,
            shared_size_mib=config.shared_size_mib,
            parallel_starts=config.parallel_starts,
            start_timeout_s=config.start_timeout_s,
        )

    @hookimpl
    async def lifespan(self, task_status: trio.TaskStatus[None]) -> None:
        await self._service.run(task_status)

    @hookimpl
    async def container_runtime(self) -> ContainerRuntime:
        await trio.lowlevel.checkpoint()
        if self._service.launcher is None:
            raise ConfigError("oci_runtime", "provides containers only while its lifespan runs")
        return self._service.launcher
