"""The containers' roots: made, handed out, and taken away again."""

from __future__ import annotations

import errno
import functools
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path

import msgspec
import structlog
import trio

from plugins.image_store.budget import Budget, Reservation
from plugins.image_store.config import StoreConfig
from plugins.image_store.mount.held import HeldMount
from plugins.image_store.mount.kernel import refused_by_kernel
from plugins.image_store.mount.prepared import PreparedLayer
from plugins.image_store.mount.removal import remove_all
from plugins.image_store.mount.rootfs import RootPlan, assemble, outside_ids
from plugins.image_store.mount.user_namespace import user_namespace
from plugins.image_store.tar.tree import INODE_BYTES
from plugins.image_store.work import CLEANUP_TIMEOUT_S, check_cancelled, clean_up
from supervisor import Conflict, IdMap

# Mounts made at the same time.
MOUNT_WORKERS = 8
# A root's own directories, and of its supplement what every root has.
ROOT_BYTES = 256 * INODE_BYTES
# A root's own removal, then that of layers that only it still held.
CLOSE_TIMEOUT_S = 3 * CLEANUP_TIMEOUT_S


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
        self._mount: HeldMount | None = None
        self._lock = trio.Lock()
        self._is_closed = False

    def hold(self, mount: HeldMount) -> None:
        """What was mounted; it is the root's to close from now on."""
        self._mount = mount

    def set_aside(self, size_bytes: int) -> None:
        """So many bytes beside what was claimed. From any thread; raises `Busy`."""
        self._reservation.cover(self._reservation.size_bytes + size_bytes)

    def attach(self, target: Path) -> None:
        """See `Rootfs`. EBUSY while it is attached elsewhere, EBADF once it was closed."""
        if self._mount is None:
            raise OSError(errno.EBADF, "the root is not mounted", str(target))
        self._mount.attach(target)

    def detach(self) -> None:
        """See `Rootfs`. Should it stay visible, that is logged."""
        try:
            if self._mount is not None:
                self._mount.detach()
        except OSError as error:
            self._log.error("cleanup_failed", item=str(self.base), reason=repr(error))

    async def close(self) -> None:
        """See `Rootfs`. What could not be removed stays on the account, and is logged."""
        with trio.move_on_after(CLOSE_TIMEOUT_S, shield=True):
            async with self._lock:
                if self._is_closed:
                    return
                self._is_closed = True
                if await clean_up(str(self.base), self._remove, log=self._log):
                    self._reservation.release()
                    await self._ended()

    def _remove(self) -> None:
        if self._mount is not None:
            self._mount.close()
        remove_all(self.base)


class Roots:
    """Makes roots under `directory`, one per container at a time, once `open` was called."""

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

    def open(self, *, idmaps: bool) -> None:
        """`idmaps`: owners are shifted by idmapped mounts, else by copying."""
        self._idmaps = idmaps

    async def close(self) -> None:
        """Take away what is still mounted. Never raises."""
        for root in tuple(self._mounted.values()):
            await root.close()

    def claim(
        self,
        layers: tuple[PreparedLayer, ...],
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
            size_bytes += sum(layer.copy_bytes for layer in layers)
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
        layers: tuple[PreparedLayer, ...],
        *,
        id_map: IdMap,
        writable: bool,
    ) -> None:
        """Mount a claimed root, lowest layer first. When it raises, `root` is closed.

        Raises `RuntimeFailed`, `DeadlineExceeded`, `Conflict`, `Untrusted`.
        """
        item = f"container {root.base.name}"
        try:
            plan = RootPlan(
                item=item,
                base=root.base,
                layers=layers,
                outside=outside_ids(id_map.pairs, item=item),
                user_namespace_fd=None,
                writable_bytes=self._config.writable_bytes if writable else None,
                max_entries=self._config.max_entries,
                set_aside=root.set_aside,
            )
            root.hold(await assemble_root(plan, id_map, idmaps=self._idmaps, limiter=self._limiter))
        except BaseException:
            await root.close()
            raise


async def assemble_root(
    plan: RootPlan, id_map: IdMap, *, idmaps: bool, limiter: trio.CapacityLimiter
) -> HeldMount:
    """`assemble` in a thread, with a user namespace for `id_map` if `idmaps`.

    Raises `RuntimeFailed`, `DeadlineExceeded`, `Conflict`, `Untrusted`; the caller then
    removes `plan.base`, also when cancelled. There is no checkpoint after the thread's
    work, so that what it returns always has an owner.
    """
    work = functools.partial(_assembled, plan, id_map if idmaps else None)
    return await trio.to_thread.run_sync(work, limiter=limiter)


def _assembled(plan: RootPlan, id_map: IdMap | None) -> HeldMount:
    with ExitStack() as stack:
        if id_map is not None:
            namespace_fd = stack.enter_context(user_namespace(id_map.pairs, item=plan.item))
            plan = msgspec.structs.replace(plan, user_namespace_fd=namespace_fd)
        with refused_by_kernel(plan.item, "its root could not be mounted"):
            return assemble(plan, between=check_cancelled)
