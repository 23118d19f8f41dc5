"""Where layers' tars lie: in RAM, or in a directory that the operator names."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from typing import Protocol

from supervisor import ConfigError

# Each takes up to 150 ms (memfd_wait_for_pins in the kernel's mm/memfd.c).
SEAL_ATTEMPTS = 10
SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
SETTING = "$.plugin.image_store.storage_dir"


class Storage(Protocol):
    """Files without a name, gone with their last descriptor. Blocking; raises `OSError`."""

    def open(self) -> None:
        """Before the first file. Raises `ConfigError` if layers cannot lie there."""

    def new_file(self) -> int:
        """An empty one, writable; the descriptor is the caller's."""

    def freeze(self, fd: int) -> int:
        """A descriptor through which nothing can be changed, in the place of `fd`.

        `fd` is closed or the same one; if it raises, it is as it was.
        """

    def close(self) -> None:
        """No more files are made. Idempotent."""


class Ram:
    """Memory files that the kernel seals (memfd_create(2), fcntl(2) F_ADD_SEALS)."""

    def open(self) -> None:
        """See `Storage`: there is always RAM; the budget says how much."""

    def new_file(self) -> int:
        return os.memfd_create("layer", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)

    def freeze(self, fd: int) -> int:
        # EBUSY: on a busy machine pages that were just written are still on some processor's
        # list, which counts as a use of them. The kernel waits for that itself, but not long.
        for _ in range(SEAL_ATTEMPTS - 1):
            try:
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
            else:
                return fd
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        return fd

    def close(self) -> None:
        """See `Storage`: there is nothing to close."""


RAM = Ram()


class Directory:
    """Unnamed files of a directory on storage that cannot change behind our back.

    What it must promise cannot be tested from here: docs/config.md says it. Nothing but
    root may be able to put a file system or a link in its place, hence the checks.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd: int | None = None

    def open(self) -> None:
        """See `Storage`. Also makes a file there, since not every file system can (open(2))."""
        if not os.path.isabs(self._path):
            raise ConfigError(SETTING, "must be absolute", actual=self._path)
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(SETTING, "must be a directory, and no link", actual=error) from error
        self._fd = fd
        try:
            status = os.fstat(fd)
            if status.st_uid != 0 or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise ConfigError(
                    SETTING,
                    "must belong to root, and nobody else may write there",
                    expected="owner 0, mode without 0022",
                    actual=f"owner {status.st_uid}, mode {stat.S_IMODE(status.st_mode):04o}",
                )
            try:
                os.close(self.freeze(self.new_file()))
            except OSError as error:
                raise ConfigError(
                    SETTING, "its file system must have unnamed files (O_TMPFILE)", actual=error
                ) from error
        except ConfigError:
            self.close()
            raise

    def new_file(self) -> int:
        # O_EXCL: it can never be given a name.
        flags = os.O_RDWR | os.O_TMPFILE | os.O_EXCL | os.O_CLOEXEC
        return os.open(".", flags, 0o600, dir_fd=self._fd)

    def freeze(self, fd: int) -> int:
        frozen = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        os.close(fd)
        return frozen

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def storage_for(storage_dir: str | None) -> Storage:
    """As the setting `storage_dir` says."""
    return RAM if storage_dir is None else Directory(storage_dir)
