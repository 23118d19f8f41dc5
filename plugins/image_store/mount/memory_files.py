"""Files in memory without a path, and the certainty that their bytes were given back."""

from __future__ import annotations

import os
import threading
import time

from plugins.image_store.mount.kernel import detached_mount, ended, new_notices, notice_end

LOOK_AGAIN_S = 0.01


class MemoryFile:
    """An empty file on a ramfs of its own, with nothing else on it; read-write.

    ramfs, since the kernel takes no EROFS index from tmpfs or a memfd (ENOTBLK), and since
    it is never swapped out. It has no size limit: its writer keeps to the budget.
    """

    def __init__(self, fd: int, number: int, files: MemoryFiles) -> None:
        self.fd = fd
        self._number = number
        self._files = files
        self._is_open = True

    def close(self) -> None:
        """Only the descriptor: the bytes stay for as long as a mount uses them. Idempotent."""
        if self._is_open:
            self._is_open = False
            os.close(self.fd)

    def wait_gone(self, *, timeout_s: float) -> bool:
        """Whether nobody has it open, and no mount uses it, by then. Blocking."""
        deadline_s = time.monotonic() + timeout_s
        while not self._files.is_gone(self._number):
            if time.monotonic() >= deadline_s:
                return False
            time.sleep(LOOK_AGAIN_S)
        return True


class MemoryFiles:
    """Makes them, and knows which are gone. Thread-safe.

    A mount that was detached lazily lives on, invisibly, with whoever still has a file of it
    open; only the end of its index's own ramfs shows that its memory is free.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._notices_fd: int | None = None
        self._alive: set[int] = set()

    def make(self) -> MemoryFile:
        """Blocking. Raises `OSError`; the caller closes the file."""
        mount_fd = detached_mount(b"ramfs", ((b"mode", b"0700"),))
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open("index", flags, 0o600, dir_fd=mount_fd)
        finally:
            os.close(mount_fd)
        try:
            with self._lock:
                if self._notices_fd is None:
                    self._notices_fd = new_notices()
                number = notice_end(self._notices_fd, fd)
                self._alive.add(number)
        except OSError:
            os.close(fd)
            raise
        return MemoryFile(fd, number, self)

    def close(self) -> None:
        """Forget them all, also those that are still alive. Idempotent."""
        with self._lock:
            self._alive.clear()
            if self._notices_fd is not None:
                os.close(self._notices_fd)
                self._notices_fd = None

    def is_gone(self, number: int) -> bool:
        """Whether that file is; `MemoryFile.wait_gone` waits for it."""
        with self._lock:
            if self._notices_fd is not None:
                self._alive.difference_update(ended(self._notices_fd))
            return number not in self._alive
