"""A layer that the store keeps: first a sealed tar, then a tree on tmpfs."""

from __future__ import annotations

import os
from collections.abc import Callable
from mmap import MAP_PRIVATE, PROT_READ, mmap
from pathlib import Path

import trio

from plugins.image_store.budget import Budget, Reservation
from plugins.image_store.kernel import refused_by_kernel
from plugins.image_store.removal import remove_all
from plugins.image_store.rootfs import UnpackedLayer
from plugins.image_store.sealed import SealedTar
from plugins.image_store.supplement import hints_of
from plugins.image_store.tar_reader import TarReader
from plugins.image_store.tree import Tree, build_tree
from plugins.image_store.unpack import write_tree
from supervisor import StoredLayer


class KeptLayer(StoredLayer, frozen=True, kw_only=True):
    """What the supervisor holds of a layer; `key` says which of the store's it is.

    Two deliveries of the same bytes are two layers here, so that freeing one can never
    take the other's bytes.
    """

    key: int


class Layer:
    """One layer's bytes, at most once as a tar and once as a tree. `lock` guards the change."""

    def __init__(self, kept: KeptLayer, tar: SealedTar, directory: Path) -> None:
        self.kept = kept
        self.lock = trio.Lock()
        self.unpacked: UnpackedLayer | None = None
        self.users = 0
        self.is_unwanted = False
        self._tar = tar
        self._directory = directory
        self._tree_reservation: Reservation | None = None

    @property
    def label(self) -> str:
        return f"layer {self.kept.expected}"

    def read(self, *, max_entries: int, between: Callable[[], None]) -> Tree:
        """Parse the sealed tar; blocking. Raises `FormatError`, `RuntimeFailed`."""
        if self._tar.size_bytes == 0:
            return self._tree(b"", max_entries, between)
        with (
            refused_by_kernel(self.label, "the tar could not be mapped"),
            mmap(self._tar.fd, 0, flags=MAP_PRIVATE, prot=PROT_READ) as archive,
        ):
            return self._tree(archive, max_entries, between)

    def _tree(self, archive: mmap | bytes, max_entries: int, between: Callable[[], None]) -> Tree:
        entries = TarReader(archive, label=self.label, max_entries=max_entries, between=between)
        return build_tree(entries, label=self.label, max_entries=max_entries)

    def unpack(self, tree: Tree, budget: Budget, *, between: Callable[[], None]) -> UnpackedLayer:
        """Write the tree; blocking. When it raises nothing of it is left.

        Raises `Busy` before anything is written if there is no room, `RuntimeFailed`.
        """
        reservation = budget.reserve(tree.memory_bytes, item=self.label)
        try:
            with refused_by_kernel(self.label, "could not be unpacked"):
                self._directory.mkdir(mode=0o700)
                root_fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    write_tree(tree, root_fd, tar_fd=self._tar.fd, between=between)
                finally:
                    os.close(root_fd)
        except BaseException:
            remove_all(self._directory)
            reservation.release()
            raise
        self._tree_reservation = reservation
        return UnpackedLayer(
            directory=self._directory, hints=hints_of(tree), memory_bytes=tree.memory_bytes
        )

    def free_tar(self) -> None:
        """The tree has taken its place. Idempotent, blocking."""
        self._tar.close()

    def free(self) -> None:
        """Give all bytes back. Idempotent, blocking. Raises `OSError`."""
        self._tar.close()
        self.unpacked = None
        remove_all(self._directory)
        if self._tree_reservation is not None:
            self._tree_reservation.release()
            self._tree_reservation = None
