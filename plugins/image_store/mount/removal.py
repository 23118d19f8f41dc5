"""Take directories away, with whatever is mounted in them."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

from plugins.image_store.mount.kernel import mounts_under, open_beneath, unmount

UNMOUNT_TIMEOUT_S = 5.0
UNMOUNT_RETRY_S = 0.05


def remove_all(directory: Path) -> None:
    """Unmount everything at and below `directory`, then delete it. Blocking, bounded.

    Mounts that stay busy are detached lazily after `UNMOUNT_TIMEOUT_S`. Idempotent.
    Raises `OSError`; nothing is deleted through a mount that could not be ended.
    """
    deadline_s = time.monotonic() + UNMOUNT_TIMEOUT_S
    while points := mounts_under(os.fsencode(directory)):
        for point in reversed(points):
            try:
                unmount(point, lazily=time.monotonic() > deadline_s)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                time.sleep(UNMOUNT_RETRY_S)
                break
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    _empty(fd)
    os.rmdir(directory)


def _empty(fd: int) -> None:
    """Delete what is below a directory and close it.

    Neither recursive nor by path: a stranger's tree can be deeper than Python's stack and
    longer than a path may be. Only one descriptor is open at a time; going back by `..` is
    safe because nobody else can reach, let alone move, these directories.
    """
    try:
        levels = [(b"", _without_files(fd))]
        while True:
            name, folders = levels[-1]
            if folders:
                name = folders.pop()
                fd = _instead_of(fd, open_beneath(fd, name, os.O_RDONLY | os.O_DIRECTORY))
                levels.append((name, _without_files(fd)))
            elif len(levels) > 1:
                levels.pop()
                parent = os.open(b"..", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
                fd = _instead_of(fd, parent)
                os.rmdir(name, dir_fd=fd)
            else:
                return
    finally:
        os.close(fd)


def _instead_of(old_fd: int, new_fd: int) -> int:
    os.close(old_fd)
    return new_fd


def _without_files(fd: int) -> list[bytes]:
    """Delete all but the directories; their names."""
    folders = []
    with os.scandir(fd) as found:
        for item in found:
            name = os.fsencode(item.name)
            if item.is_dir(follow_symlinks=False):
                folders.append(name)
            else:
                os.unlink(name, dir_fd=fd)
    return folders
