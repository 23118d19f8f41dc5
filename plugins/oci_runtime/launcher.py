"""All containers of one supervisor: prepared here, counted here, and ended together."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec
import trio

from plugins.oci_runtime.config_json import Common, oci_config
from plugins.oci_runtime.prepared import Prepared, Workshop
from plugins.oci_runtime.runtime import OciCommand
from plugins.oci_runtime.scratch import Scratch
from plugins.oci_runtime.shim import first_fd_above, shim_argv
from supervisor import Conflict, ContainerSpec, RuntimeFailed


class Launcher:
    """Implements `supervisor.ContainerRuntime`."""

    def __init__(
        self,
        workshop: Workshop,
        common: Common,
        *,
        bundles_dir: Path,
        scratch_size_mib: int,
        notes: tuple[str, ...],
    ) -> None:
        self._workshop = workshop
        self._common = common
        self._bundles_dir = bundles_dir
        self._scratch_size_mib = scratch_size_mib
        self._notes = notes
        self._prepared: dict[str, Prepared | None] = {}

    @property
    def notes(self) -> tuple[str, ...]:
        """See `ContainerRuntime`."""
        return self._notes

    @property
    def command(self) -> OciCommand:
        """The runtime in use; may be replaced until the first container that lasts."""
        return self._workshop.command

    @command.setter
    def command(self, command: OciCommand) -> None:
        self._workshop.command = command

    async def prepare(self, spec: ContainerSpec) -> Prepared:
        """Make scratch space and bundle for all runs; `close` must follow.

        Raises `RuntimeFailed`, and `Conflict` for an id that is in use.
        """
        oci_id = str(spec.container_id)
        if oci_id in self._prepared:
            raise Conflict(f"container {oci_id}", "is there already")
        self._prepared[oci_id] = None
        try:
            prepared = await trio.to_thread.run_sync(self._prepare, oci_id, spec)
        except BaseException as error:
            del self._prepared[oci_id]
            if isinstance(error, OSError):
                raise RuntimeFailed(
                    f"container {oci_id}", "must be preparable", actual=error
                ) from error
            raise
        self._prepared[oci_id] = prepared
        return prepared

    async def memory_bytes(self, container_ids: Sequence[int]) -> dict[int, int]:
        """See `ContainerRuntime`; one read per container, in a thread."""
        return await trio.to_thread.run_sync(self._memory_bytes, tuple(container_ids))

    async def close_all(self) -> None:
        """Destroy and free every container at once. Bounded, never raises."""
        async with trio.open_nursery() as nursery:
            for prepared in tuple(self._prepared.values()):
                if prepared is not None:
                    nursery.start_soon(prepared.close)

    def _prepare(self, oci_id: str, spec: ContainerSpec) -> Prepared:
        bundle = self._bundles_dir / oci_id
        with ExitStack() as undo:
            bundle.mkdir(mode=0o700)
            undo.callback(shutil.rmtree, bundle, ignore_errors=True)
            document = oci_config(
                spec,
                self._workshop.gateway.places(spec.container_id),
                self._common,
                program=shim_argv(first_fd_above(spec.log_fds)),
                cgroups_path=self._workshop.groups.path_of(oci_id),
            )
            (bundle / "config.json").write_bytes(msgspec.json.encode(document))
            scratch = Scratch(spec.id_map, size_mib=self._scratch_size_mib)
            undo.pop_all()
        return Prepared(
            spec,
            self._workshop,
            scratch=scratch,
            bundle=bundle,
            ended=lambda: self._prepared.pop(oci_id, None),
        )

    def _memory_bytes(self, container_ids: tuple[int, ...]) -> dict[int, int]:
        found = {}
        for container_id in container_ids:
            size_bytes = self._workshop.groups.memory_bytes(str(container_id))
            if size_bytes is not None:
                found[container_id] = size_bytes
        return found
