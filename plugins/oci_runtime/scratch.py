"""What a container keeps over its runs beside its root: `/tmp`, `/run`, `/run/user/UID`.

One tmpfs, made once. After that nothing in it is touched with the supervisor's rights: a
container may have put a link in every place. Between the moments of its starts it lies
nowhere, held by a descriptor alone: in nobody's way, and gone with the supervisor.

Prepared here rather than by the runtime, because runtimes give a tmpfs the mode of the
image's own folder, not the one asked for (runc 1.1), and would make a new one for each run.
"""

from __future__ import annotations

import os
from pathlib import Path

from plugins.oci_runtime import kernel
from supervisor import IdMap

# Passable: the container's root reaches its folders through it, and lists or changes nothing.
TOP_MODE = 0o711
SOCKET_NAME = "acon.sock"


class Scratch:
    """A container's scratch space. All methods block; `close` must follow."""

    def __init__(self, id_map: IdMap, *, size_mib: int) -> None:
        """Raises `OSError`; nothing is left then."""
        self._fd = kernel.detached_tmpfs(mode=TOP_MODE, size_mib=size_mib)
        self._place: Path | None = None
        try:
            self._make_folders(id_map)
        except BaseException:
            self.close()
            raise

    def attach(self, target: Path) -> None:
        """Make it visible at `target`, an empty folder. Raises `OSError`."""
        kernel.attach(self._fd, target)
        self._place = target

    def detach(self) -> None:
        """Take it away again; what was written in it stays. Idempotent. Raises `OSError`."""
        if self._place is None:
            return
        # What is unmounted cannot be mounted again: a copy that lies nowhere can.
        copy = kernel.detached_copy(self._place)
        os.close(self._fd)
        self._fd = copy
        kernel.unmount(self._place)
        self._place = None

    def close(self) -> None:
        """Free it. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _make_folders(self, id_map: IdMap) -> None:
        self._make_folder("tmp", 0o1777, id_map.root)
        self._make_folder("run", 0o755, id_map.root)
        self._make_folder("run/user", 0o755, id_map.root)
        for inside, outside in id_map.pairs:
            self._make_folder(f"run/user/{inside}", 0o700, outside)
        # What the socket is mounted over: made here, since the runtime's umask is not ours.
        # Nobody can take it away while a socket lies on it, and between runs nobody is there.
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
        os.close(os.open(f"run/{SOCKET_NAME}", flags, 0o444, dir_fd=self._fd))

    def _make_folder(self, path: str, mode: int, owner: int) -> None:
        os.mkdir(path, 0o700, dir_fd=self._fd)
        os.chown(path, owner, owner, dir_fd=self._fd)
        # Not by mkdir's argument: the supervisor's umask would cut it.
        os.chmod(path, mode, dir_fd=self._fd)
