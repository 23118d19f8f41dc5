"""Mounts an index over the tar that it describes (Linux fs/erofs: a device table, file-backed).

Source and device are handed to the kernel as descriptors of this process, so neither has a
path that anybody could open, and no loop device is involved. The kernel opens both files
once more and keeps them until the file system is gone: whoever mounts closes its own
descriptors at once.
"""

from __future__ import annotations

import os
from pathlib import Path

from plugins.image_store.mount.kernel import attach, detached_mount


def mount_index(index_fd: int, tar_fd: int, target: Path) -> None:
    """Mount it at the directory `target`: read-only, nosuid, nodev, noexec.

    Blocking. Both descriptors stay the caller's, who may close them afterwards. Raises
    `OSError` with what the kernel says; nothing is mounted then. Linux 6.12 or later.
    """
    # Opened by these names when the file system is created, in this very call.
    options = (
        (b"source", b"/proc/self/fd/%d" % index_fd),
        (b"device", b"/proc/self/fd/%d" % tar_fd),
    )
    mount_fd = detached_mount(b"erofs", options, read_only=True)
    try:
        attach(mount_fd, os.fsencode(target))
    finally:
        os.close(mount_fd)
