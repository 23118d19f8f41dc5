"""A layer that the store keeps: first a sealed tar, then a tree that containers can be shown."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Callable
from mmap import MAP_PRIVATE, PROT_READ, mmap
from pathlib import Path

import trio

from plugins.image_store.arrival.sealed import SealedTar
from plugins.image_store.budget import Budget, Reservation
from plugins.image_store.index import IndexPlan, plan_index
from plugins.image_store.mount.erofs import mount_index
from plugins.image_store.mount.kernel import refused_by_kernel
from plugins.image_store.mount.memory_files import MemoryFile, MemoryFiles
from plugins.image_store.mount.prepared import How, PreparedLayer
from plugins.image_store.mount.removal import remove_all
from plugins.image_store.mount.supplement import hints_bytes, hints_of
from plugins.image_store.mount.unpack import write_tree
from plugins.image_store.tar.reader import TarReader
from plugins.image_store.tar.tree import Tree, build_tree
from supervisor import StoredLayer


class KeptLayer(StoredLayer, frozen=True, kw_only=True):
    """What the supervisor holds of a layer; `key` says which of the store's it is.

    Two deliveries of the same bytes are two layers here, so that freeing one can never
    take the other's bytes.
    """

    key: int


@dataclasses.dataclass(frozen=True, slots=True)
class Preparation:
    """How layers are prepared here, and from what. `max_entries` bounds one layer's files."""

    how: How
    budget: Budget
    memory_files: MemoryFiles
    max_entries: int


class Layer:
    """One layer's bytes: a tar, then a mount over that tar or a tree in its place.

    `lock` guards the change. Methods are blocking; one thread at a time.
    """

    def __init__(self, kept: KeptLayer, tar: SealedTar, directory: Path) -> None:
        self.kept = kept
        self.lock = trio.Lock()
        self.prepared: PreparedLayer | None = None
        self.users = 0
        self.is_unwanted = False
        self._tar = tar
        self._directory = directory
        # What the index or the tree takes.
        self._reservation: Reservation | None = None
        self._index: MemoryFile | None = None

    @property
    def label(self) -> str:
        return f"layer {self.kept.expected}"

    def prepare(self, preparation: Preparation, *, between: Callable[[], None]) -> PreparedLayer:
        """Read the sealed tar and make its tree visible; when it raises nothing of that is left.

        `between` is called often and may raise. Raises `Untrusted` for a hostile tar, `Busy`
        before anything is written if there is no room, `RuntimeFailed`. The answer is also
        to be found in `prepared`; what of the tar is not needed any more is freed.
        """
        tree = self._read(preparation.max_entries, between)
        way = self._mount if preparation.how == "erofs" else self._unpack
        self.prepared = way(tree, preparation, between)
        return self.prepared

    def free(self, *, timeout_s: float) -> None:
        """Give all bytes back, unmounting first. Idempotent.

        Raises `OSError`: EBUSY when somebody still uses the mount after `timeout_s`, be it
        only by a file that was opened before it was detached. The bytes stay on the account
        then, and it can be tried again.
        """
        self.prepared = None
        remove_all(self._directory)
        if self._index is not None:
            if not self._index.wait_gone(timeout_s=timeout_s):
                raise OSError(errno.EBUSY, "its mount is detached, but somebody still uses it")
            self._index = None
        self._tar.close()
        self._release()

    # --- reading --------------------------------------------------------------------------------

    def _read(self, max_entries: int, between: Callable[[], None]) -> Tree:
        if self._tar.size_bytes == 0:
            return self._tree(b"", max_entries, between)
        with (
            refused_by_kernel(self.label, "the tar could not be mapped"),
            mmap(self._tar.fd, 0, flags=MAP_PRIVATE, prot=PROT_READ) as archive,
        ):
            return self._tree(archive, max_entries, between)

    def _tree(self, archive: mmap | bytes, max_entries: int, between: Callable[[], None]) -> Tree:
        entries = TarReader(archive, label=self.label, max_entries=max_entries, between=between)
        return build_tree(entries, label=self.label, max_entries=max_entries, between=between)

    # --- an index over the tar ------------------------------------------------------------------

    def _mount(
        self, tree: Tree, preparation: Preparation, between: Callable[[], None]
    ) -> PreparedLayer:
        plan = plan_index(tree, self._tar.size_bytes)
        hints = hints_of(tree)
        memory_bytes = plan.size_bytes + hints_bytes(hints)
        self._reserve(memory_bytes, preparation.budget)
        try:
            with refused_by_kernel(self.label, "could not be mounted through an index"):
                self._mount_index(plan, preparation.memory_files, between)
        except BaseException:
            self._undo()
            raise
        # The mount holds the tar from here on; so does the account.
        self._tar.close_file()
        return PreparedLayer(
            directory=self._directory,
            how="erofs",
            hints=hints,
            memory_bytes=self._tar.size_bytes + memory_bytes,
            copy_bytes=tree.memory_bytes,
        )

    def _mount_index(
        self, plan: IndexPlan, memory_files: MemoryFiles, between: Callable[[], None]
    ) -> None:
        self._directory.mkdir(mode=0o700)
        index = memory_files.make()
        try:
            plan.write(index.fd, between=between)
            mount_index(index.fd, self._tar.fd, self._directory)
            self._index = index
        finally:
            index.close()

    # --- a tree in the tar's place --------------------------------------------------------------

    def _unpack(
        self, tree: Tree, preparation: Preparation, between: Callable[[], None]
    ) -> PreparedLayer:
        hints = hints_of(tree)
        memory_bytes = tree.memory_bytes + hints_bytes(hints)
        self._reserve(memory_bytes, preparation.budget)
        try:
            with refused_by_kernel(self.label, "could not be unpacked"):
                self._directory.mkdir(mode=0o700)
                root_fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    write_tree(tree, root_fd, tar_fd=self._tar.fd, between=between)
                finally:
                    os.close(root_fd)
        except BaseException:
            self._undo()
            raise
        self._tar.close()
        return PreparedLayer(
            directory=self._directory,
            how="unpack",
            hints=hints,
            memory_bytes=memory_bytes,
            copy_bytes=tree.memory_bytes,
        )

    # --- what was taken -------------------------------------------------------------------------

    def _reserve(self, size_bytes: int, budget: Budget) -> None:
        self._reservation = budget.reserve(size_bytes, item=self.label)

    def _release(self) -> None:
        if self._reservation is not None:
            self._reservation.release()
            self._reservation = None

    def _undo(self) -> None:
        """Of a preparation that failed. Raises `OSError`; its bytes stay on the account then."""
        remove_all(self._directory)
        self._index = None
        self._release()
