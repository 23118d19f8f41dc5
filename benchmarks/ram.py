"""A folder in memory, as the supervisor's runtime folder is in a TD."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.figures import CannotMeasure
from plugins.oci_runtime.kernel import mount_tmpfs, unmount

PLACES = ("/dev/shm", "/run", "/tmp")
SIZE_MIB = 1024


@contextmanager
def ram_folder(*, size_mib: int = SIZE_MIB) -> Iterator[Path]:
    """A new folder on a tmpfs that everyone may pass through; removed at the end.

    Where no tmpfs with that much free can be written root mounts one. Raises `CannotMeasure`
    for others.
    """
    ready = [
        fields[1]
        for fields in (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
        if fields[2] == "tmpfs" and fields[1] in PLACES and os.access(fields[1], os.W_OK)
    ]
    ready = [place for place in ready if shutil.disk_usage(place).free >= size_mib << 20]
    if not ready and os.geteuid() != 0:
        raise CannotMeasure(f"no tmpfs at {', '.join(PLACES)} has {size_mib} MiB to write")
    # Podman makes names of such paths, and they may not end with "_" as mkdtemp's do.
    folder = Path(
        ready[0] if ready else tempfile.gettempdir(), f"acon-bench-{secrets.token_hex(6)}"
    )
    folder.mkdir(mode=0o700)
    try:
        folder.chmod(0o711)
        if not ready:
            mount_tmpfs(folder, mode=0o711, size_mib=size_mib)
        yield folder
    finally:
        if not ready:
            unmount(folder)
        shutil.rmtree(folder)
