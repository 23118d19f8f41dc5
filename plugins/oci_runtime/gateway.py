"""Where a container's first process finds its root, although our folders are closed.

A runtime enters the container's user namespace *before* it opens the root file
system. From then on it is an ordinary unprivileged user to the machine: it cannot
pass through folders of mode 0700, and the supervisor's folders are that for good
reasons. So each container's root, its scratch space and its socket are mounted, for
the moment of a start only, below a folder that can be passed through but not
listed: a private tmpfs at the deepest place on the way to the plugin's folder that
everyone may pass. Once the process runs it has mounts of its own, and ours go: a
start takes as long beside 500 containers as beside none.
"""

from __future__ import annotations

import hashlib
import shutil
from contextlib import ExitStack
from pathlib import Path

import msgspec

from plugins.oci_runtime import kernel
from plugins.oci_runtime.scratch import SOCKET_NAME, Scratch
from supervisor import Rootfs, RuntimeFailed

PASSAGE_MODE = 0o711
# A MiB of it is room for 1024 files, and a container takes up to four.
SKELETON_SIZE_MIB = 64
S_IXOTH = 0o001


class Places(msgspec.Struct, frozen=True, kw_only=True):
    """Where things for one container can be reached by its own root."""

    root: Path
    tmp: Path
    run: Path
    shared: Path
    socket: Path


class Gateway:
    """The passage of one supervisor, named after its runtime folder. All methods block."""

    def __init__(self, runtime_dir: Path, *, shared_size_mib: int) -> None:
        self.instance = hashlib.sha256(str(runtime_dir).encode()).hexdigest()[:12]
        self._runtime_dir = runtime_dir
        self._shared_size_mib = shared_size_mib
        self.path = reachable_ancestor(runtime_dir) / self._name

    @property
    def _name(self) -> str:
        return f"acond-{self.instance}"

    def open(self) -> None:
        """Mount the passage and the containers' common `/shared`. Raises `RuntimeFailed`."""
        try:
            self.path.mkdir(mode=0o700)
            kernel.mount_tmpfs(self.path, mode=PASSAGE_MODE, size_mib=SKELETON_SIZE_MIB)
            self._shared.mkdir(mode=0o700)
            kernel.mount_tmpfs(self._shared, mode=0o1777, size_mib=self._shared_size_mib)
            # Each container's own socket is mounted over it. It belongs to the machine's root
            # and lies in a sticky folder: no container can take it away from the others.
            (self._shared / SOCKET_NAME).touch(mode=0o444)
        except OSError as error:
            self.close()
            raise RuntimeFailed(str(self.path), "must be mountable", actual=error) from error

    def close(self) -> bool:
        """Unmount everything, also what a killed predecessor mounted. Idempotent.

        Returns whether anything was mounted. Raises `OSError`.
        """
        found = False
        # A predecessor may have found other folders passable than we do.
        for folder in (self._runtime_dir, *self._runtime_dir.parents):
            passage = folder / self._name
            while kernel.unmount(passage):
                found = True
            if passage.is_dir() and not passage.is_symlink():
                passage.rmdir()
        return found

    def places(self, container_id: int) -> Places:
        """Where one container's things are during a start. Does not block."""
        passage = self._passage(container_id)
        return Places(
            root=passage / "root",
            tmp=passage / "scratch" / "tmp",
            run=passage / "scratch" / "run",
            shared=self._shared,
            socket=passage / SOCKET_NAME,
        )

    def admit(self, container_id: int, root: Rootfs, scratch: Scratch, socket_path: Path) -> None:
        """Mount one container's things at their places. Raises `OSError`; nothing is left then."""
        places = self.places(container_id)
        passage = self._passage(container_id)
        with ExitStack() as undo:
            undo.callback(self.dismiss, container_id, root, scratch)
            passage.mkdir(mode=0o700, exist_ok=True)
            places.root.mkdir(exist_ok=True)
            root.attach(places.root)
            places.tmp.parent.mkdir()
            scratch.attach(places.tmp.parent)
            places.socket.touch()
            kernel.bind(socket_path, places.socket)
            # Last: nobody passes before everything is in its place.
            passage.chmod(PASSAGE_MODE)
            undo.pop_all()

    def dismiss(self, container_id: int, root: Rootfs, scratch: Scratch) -> None:
        """Unmount one container's places; what it runs in already stays. Idempotent.

        Where its root was an empty folder stays, until `forget`: runc begins there, before it
        enters the container, when it has to run a command in it. Raises `OSError`.
        """
        passage = self._passage(container_id)
        root.detach()
        scratch.detach()
        kernel.unmount(passage / SOCKET_NAME)
        if passage.exists():
            passage.chmod(0o700)
            self._remove_folders(passage)
            (passage / SOCKET_NAME).unlink(missing_ok=True)
            (passage / "root").mkdir(mode=0o700)

    def forget(self, container_id: int) -> None:
        """Remove what `dismiss` left. Idempotent. Raises `OSError`."""
        passage = self._passage(container_id)
        if passage.exists():
            self._remove_folders(passage)
            passage.rmdir()

    def make_folder(self, name: str) -> Path:
        """An empty folder that containers' roots can be made of: passable and executable."""
        folder = self.path / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        folder.chmod(0o755)
        return folder

    @staticmethod
    def _remove_folders(passage: Path) -> None:
        # Of folders of ours only: a mount that was left would not let itself be removed.
        for name in ("root", "scratch"):
            if (passage / name).exists():
                (passage / name).rmdir()

    @property
    def _shared(self) -> Path:
        return self.path / "shared"

    def _passage(self, container_id: int) -> Path:
        return self.path / str(container_id)


def reachable_ancestor(folder: Path) -> Path:
    """The deepest folder on the way to `folder`, itself included, that everyone can reach."""
    reached = Path(folder.anchor)
    for step in reversed((folder, *folder.parents)):
        if not step.stat().st_mode & S_IXOTH:
            break
        reached = step
    return reached
