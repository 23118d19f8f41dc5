"""The containers' roots: made, handed out, and taken away again."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog
import trio

from plugins.image_store.budget import Budget, Reservation
from plugins.image_store.config import StoreConfig
from plugins.image_store.kernel import refused_by_kernel
from plugins.image_store.removal import remove_all
from plugins.image_store.rootfs import (
    ROOT,
    RootPlan,
    UnpackedLayer,
    assemble,
    outside_ids,
)
from plugins.image_store.supplement import Hints
from plugins.image_store.tree import INODE_BYTES
from plugins.image_store.user_namespace import user_namespace
from plugins.image_store.work import CLEANUP_TIMEOUT_S, check_cancelled, clean_up
from supervisor import Conflict, IdMap, RuntimeFailed

# Mounts made at the same time.
MOUNT_WORKERS = 8
# A root's own directories and its supplement.
ROOT_BYTES = 256 * INODE_BYTES
# A root's own removal, then that of layers that only it still held.
CLOSE_TIMEOUT_S = 3 * CLEANUP_TIMEOUT_S
_PROBE_MAP = IdMap(pairs=((0, 1_000_000_000),))


class MountedRoot:
    """Implements `supervisor.Rootfs`: a root and what it holds of the budget."""

    def __init__(
        self,
        base: Path,
        reservation: Reservation,
        ended: Callable[[], Awaitable[None]],
        log: structlog.stdlib.BoundLogger,
    ) -> None:
        self.base = base
        self._reservation = reservation
        self._ended = ended
        self._log = log
        self._lock = trio.Lock()
        self._is_closed = False

    @property
    def path(self) -> Path:
        return self.base / ROOT

    async def close(self) -> None:
        """See `Rootfs`. What could not be removed stays on the account, and is logged."""
        with trio.move_on_after(CLOSE_TIMEOUT_S, shield=True):
            async with self._lock:
                if self._is_closed:
                    return
                self._is_closed = True
                if await clean_up(str(self.base), lambda: remove_all(self.base), log=self._log):
                    self._reservation.release()
                    await self._ended()


class Roots:
    """Makes roots under `directory`, one per container at a time."""

    def __init__(
        self,
        directory: Path,
        budget: Budget,
        config: StoreConfig,
        log: structlog.stdlib.BoundLogger,
    ) -> None:
        self._directory = directory
        self._budget = budget
        self._config = config
        self._log = log
        self._mounted: dict[int, MountedRoot] = {}
        self._limiter = trio.CapacityLimiter(MOUNT_WORKERS)
        self._idmaps = False

    async def open(self) -> None:
        """Find out how owners can be shifted here: tried out, not guessed.

        Raises `RuntimeFailed` when the configured way, or any, is missing.
        """
        await trio.to_thread.run_sync(lambda: self._directory.mkdir(mode=0o711))
        if self._config.id_shift != "copy":
            try:
                await self._probe(idmaps=True)
            except RuntimeFailed as error:
                if self._config.id_shift == "idmap":
                    raise
                self._log.warning("idmapped_mounts_missing", reason=str(error))
            else:
                self._idmaps = True
                return
        await self._probe(idmaps=False)
        self._idmaps = False

    async def close(self) -> None:
        """Take away what is still mounted. Never raises."""
        for root in tuple(self._mounted.values()):
            await root.close()

    def claim(
        self,
        layers: tuple[UnpackedLayer, ...],
        *,
        container_id: int,
        writable: bool,
        ended: Callable[[], Awaitable[None]],
    ) -> MountedRoot:
        """Memory and name of a root that is not mounted yet; `mount` or `close` must follow.

        `ended` is called once the root is gone for good. Raises `Conflict`, `Busy`.
        """
        item = f"container {container_id}"
        if container_id in self._mounted:
            raise Conflict(item, "has a root already")
        size_bytes = ROOT_BYTES + (self._config.writable_bytes if writable else 0)
        if not self._idmaps:
            size_bytes += sum(layer.memory_bytes for layer in layers)
        reservation = self._budget.reserve(size_bytes, item=item)

        async def root_ended() -> None:
            del self._mounted[container_id]
            await ended()

        root = MountedRoot(self._directory / str(container_id), reservation, root_ended, self._log)
        self._mounted[container_id] = root
        return root

    async def mount(
        self,
        root: MountedRoot,
        layers: tuple[UnpackedLayer, ...],
        *,
        id_map: IdMap,
        writable: bool,
    ) -> None:
        """Mount a claimed root, lowest layer first. When it raises, `root` is closed.

        Raises `RuntimeFailed`, `DeadlineExceeded`, `Conflict`, `Untrusted`.
        """
        item = f"container {root.base.name}"
        try:
            await self._assemble(item, root.base, layers, id_map, self._idmaps, writable)
        except BaseException:
            await root.close()
            raise

    async def _assemble(
        self,
        item: str,
        base: Path,
        layers: tuple[UnpackedLayer, ...],
        id_map: IdMap,
        idmaps: bool,
        writable: bool,
    ) -> None:
        outside = outside_ids(id_map.pairs, item=item)

        async def with_namespace(user_namespace_fd: int | None) -> None:
            plan = RootPlan(
                item=item,
                base=base,
                layers=layers,
                outside=outside,
                user_namespace_fd=user_namespace_fd,
                writable_bytes=self._config.writable_bytes if writable else None,
                max_entries=self._config.max_entries,
            )
            await trio.to_thread.run_sync(_assembled, plan, limiter=self._limiter)

        if idmaps:
            async with user_namespace(id_map.pairs, item=item) as user_namespace_fd:
                await with_namespace(user_namespace_fd)
        else:
            await with_namespace(None)

    async def _probe(self, *, idmaps: bool) -> None:
        """Mount an empty root and look at its owner; raises `RuntimeFailed`."""
        empty = self._directory / "probe-layer"
        base = self._directory / "probe"
        layer = UnpackedLayer(
            directory=empty, hints=Hints(implied=True, opaque=False), memory_bytes=0
        )

        def owner() -> int:
            return os.stat(base / ROOT).st_uid

        def remove() -> None:
            remove_all(base)
            remove_all(empty)

        try:
            await trio.to_thread.run_sync(lambda: empty.mkdir(mode=0o700))
            await self._assemble("probe", base, (layer,), _PROBE_MAP, idmaps, writable=False)
            shown = await trio.to_thread.run_sync(owner)
            if shown != _PROBE_MAP.root:
                raise RuntimeFailed(
                    "probe", "owners must be shifted", expected=_PROBE_MAP.root, actual=shown
                )
        finally:
            await clean_up("probe", remove, log=self._log)


def _assembled(plan: RootPlan) -> None:
    with refused_by_kernel(plan.item, "its root could not be mounted"):
        assemble(plan, between=check_cancelled)
