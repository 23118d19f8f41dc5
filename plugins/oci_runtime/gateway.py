"""Where a container's first process finds its root, although our folders are closed.

A runtime enters the container's user namespace *before* it opens the root file
system. From then on it is an ordinary unprivileged user to the machine: it cannot
pass through folders of mode 0700, and the supervisor's folders are that for good
reasons. So each container's root, its socket and its scratch space are mounted, for
the moment of its start only, below a folder that can be passed through but not
listed: a private tmpfs at the deepest place on the way to the plugin's folder that
everyone may pass. Once the process runs it has mounts of its own, and ours go.

The scratch space (`/tmp`, `/run`) is prepared here rather than by the runtime,
because runtimes give a tmpfs the mode of the image's own folder, not the one asked
for (runc 1.1), and because here it costs one mount however many ids there are.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import msgspec

from plugins.oci_runtime import kernel
from supervisor import ContainerSpec, RuntimeFailed

PASSAGE_MODE = 0o711
SKELETON_SIZE_MIB = 1
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

    def __init__(self, runtime_dir: Path, *, scratch_size_mib: int, shared_size_mib: int) -> None:
        self.instance = hashlib.sha256(str(runtime_dir).encode()).hexdigest()[:12]
        self._runtime_dir = runtime_dir
        self._scratch_size_mib = scratch_size_mib
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

    def admit(self, spec: ContainerSpec) -> Places:
        """Make one container's places. Raises `OSError`; `dismiss` undoes it also then."""
        passage = self._passage(spec.container_id)
        passage.mkdir(mode=0o700)
        kernel.mount_tmpfs(passage, mode=PASSAGE_MODE, size_mib=self._scratch_size_mib)
        places = Places(
            root=passage / "root",
            tmp=passage / "tmp",
            run=passage / "run",
            shared=self._shared,
            socket=passage / "acon.sock",
        )
        owner = spec.id_map.root
        places.root.mkdir()
        kernel.bind(spec.root, places.root)
        places.socket.touch()
        kernel.bind(spec.socket_path, places.socket)
        _make_folder(places.tmp, 0o1777, owner)
        _make_folder(places.run, 0o755, owner)
        _make_folder(places.run / "user", 0o755, owner)
        for inside, outside in spec.id_map.pairs:
            _make_folder(places.run / "user" / str(inside), 0o700, outside)
        # What the socket is mounted over: made here, since the runtime's umask is not ours.
        (places.run / "acon.sock").touch()
        return places

    def dismiss(self, container_id: int) -> None:
        """Unmount one container's places; what it runs in already stays. Idempotent.

        Raises `OSError`.
        """
        passage = self._passage(container_id)
        while kernel.unmount(passage):
            pass
        if passage.exists():
            passage.rmdir()

    def make_folder(self, name: str) -> Path:
        """An empty folder that containers' roots can be made of: passable and executable."""
        folder = self.path / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        folder.chmod(0o755)
        return folder

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


def _make_folder(path: Path, mode: int, owner: int) -> None:
    path.mkdir()
    # Not by mkdir's argument: the supervisor's umask would cut it.
    path.chmod(mode)
    shutil.chown(path, owner, owner)
