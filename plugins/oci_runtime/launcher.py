"""From a measured specification to a running container, or to nothing at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import msgspec
import structlog
import trio

from plugins.oci_runtime.cgroups import ControlGroups
from plugins.oci_runtime.config_json import oci_config
from plugins.oci_runtime.container import Container
from plugins.oci_runtime.gateway import Gateway
from plugins.oci_runtime.output import Output, open_streams
from plugins.oci_runtime.runtime import OciCommand
from plugins.oci_runtime.seccomp import Seccomp
from supervisor import Conflict, ContainerSpec, Refusal, RuntimeFailed, StartReceipt

DESTROY_TIMEOUT_S = 10
# Of which so much is left for removing by hand what the runtime did not.
FORCE_TIMEOUT_S = 4


class Launcher:
    """Implements `supervisor.seams.ContainerRuntime`.

    `nursery` owns the tasks that read the containers' output: none, none can be kept.
    `command` may be replaced until the first container that lasts.
    """

    def __init__(
        self,
        command: OciCommand,
        *,
        bundles_dir: Path,
        gateway: Gateway,
        groups: ControlGroups,
        seccomp: Seccomp,
        parallel_starts: int,
        start_timeout_s: float,
        log: structlog.stdlib.BoundLogger,
    ) -> None:
        self.command = command
        self.nursery: trio.Nursery | None = None
        self._bundles_dir = bundles_dir
        self._gateway = gateway
        self._groups = groups
        self._seccomp = seccomp
        self._start_timeout_s = start_timeout_s
        self._log = log
        # A runtime's start is work for the processor: many at once only share it out.
        self._starting = trio.CapacityLimiter(parallel_starts)
        self._containers: dict[str, Container | None] = {}

    async def start(self, spec: ContainerSpec, receipt: StartReceipt) -> Container:
        """Start exactly what was measured.

        Raises `RuntimeFailed` with the runtime's words, or if `receipt` speaks of another
        start. When it raises or is cancelled nothing of the container is left.
        """
        _require_measured(spec, receipt)
        return await self.launch(spec)

    async def launch(self, spec: ContainerSpec) -> Container:
        """`start` without its receipt: for the probe, whose program is our own."""
        oci_id = str(spec.container_id)
        if oci_id in self._containers:
            raise Conflict(f"container {oci_id}", "runs already")
        self._containers[oci_id] = None
        try:
            async with self._starting:
                container = await self._launch(oci_id, spec)
        except BaseException as error:
            with trio.move_on_after(DESTROY_TIMEOUT_S, shield=True) as scope:
                await self._remove_or_log(oci_id)
            if scope.cancelled_caught:
                self._log.error("remains", container_id=oci_id, error="no end in time")
            if isinstance(error, OSError):
                raise RuntimeFailed(
                    f"container {oci_id}", "must be preparable", actual=error
                ) from error
            raise
        self._containers[oci_id] = container
        return container

    async def destroy_all(self) -> None:
        """Destroy every container at once. Bounded, never raises."""
        async with trio.open_nursery() as nursery:
            for container in tuple(self._containers.values()):
                if container is not None:
                    nursery.start_soon(container.destroy)

    async def _launch(self, oci_id: str, spec: ContainerSpec) -> Container:
        bundle = self._bundles_dir / oci_id
        await trio.to_thread.run_sync(self._prepare, spec, bundle)
        output = Output()
        with open_streams(spec.log_fds) as streams:
            pid = await self.command.run_detached(
                oci_id,
                bundle,
                stdout=streams.stdout,
                stderr=streams.stderr,
                timeout_s=self._start_timeout_s,
            )
            container = Container(oci_id, pid, output=output, clean_up=self._destroy)
            try:
                # The container has mounts of its own now; nobody needs ours any more.
                await trio.to_thread.run_sync(self._gateway.dismiss, spec.container_id)
                await trio.lowlevel.checkpoint_if_cancelled()
            except BaseException:
                with trio.move_on_after(DESTROY_TIMEOUT_S, shield=True):
                    await container.kill()
                container.close()
                raise
            if self.nursery is not None:
                output.start(self.nursery, streams.take())
        return container

    def _prepare(self, spec: ContainerSpec, bundle: Path) -> None:
        bundle.mkdir(mode=0o700)
        places = self._gateway.admit(spec)
        document = oci_config(
            spec,
            places,
            seccomp=self._seccomp.document,
            cgroups_path=self._groups.path_of(bundle.name),
        )
        (bundle / "config.json").write_bytes(msgspec.json.encode(document))

    async def _destroy(self, container: Container) -> None:
        oci_id = container.oci_id
        with trio.move_on_after(DESTROY_TIMEOUT_S, shield=True) as scope:
            with trio.move_on_after(DESTROY_TIMEOUT_S - FORCE_TIMEOUT_S):
                try:
                    await container.kill()
                    await container.output.finish()
                    await self.command.delete(oci_id, self._bundles_dir / oci_id / "log")
                except (Refusal, OSError) as error:
                    self._log.warning(
                        "the runtime did not delete", container_id=oci_id, error=str(error)
                    )
            await self._remove_or_log(oci_id)
        if scope.cancelled_caught:
            self._log.error("remains", container_id=oci_id, error="no end in time")
        container.close()

    async def _remove_or_log(self, oci_id: str) -> None:
        """By hand whatever of a container the runtime has not removed."""
        try:
            await self._groups.end(oci_id)
            await trio.to_thread.run_sync(self._remove_files, oci_id)
        except OSError as error:
            self._log.error("remains", container_id=oci_id, error=str(error))
        finally:
            self._containers.pop(oci_id, None)

    def _remove_files(self, oci_id: str) -> None:
        self._gateway.dismiss(int(oci_id))
        for folder in (self.command.state_dir / oci_id, self._bundles_dir / oci_id):
            if os.path.lexists(folder):
                shutil.rmtree(folder)


def _require_measured(spec: ContainerSpec, receipt: StartReceipt) -> None:
    """The receipt is proof of this start and of no other. Raises `RuntimeFailed`."""
    if not isinstance(receipt, StartReceipt):
        raise RuntimeFailed(
            f"container {spec.container_id}",
            "starts only with the receipt of its measurement",
            actual=type(receipt).__name__,
        )
    for name, wanted, measured in (
        ("image_id", spec.image_id, receipt.event.image_id),
        ("argv", spec.argv, receipt.event.argv),
        ("environment", spec.environment, receipt.event.environment),
    ):
        if wanted != measured:
            raise RuntimeFailed(
                f"container {spec.container_id}",
                f"{name} must be what was measured",
                expected=measured,
                actual=wanted,
            )
