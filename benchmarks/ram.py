"""A folder in memory, as the supervisor's runtime folder is in a TD."""

from __future__ import annotations

import os
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
def ram_folder() -> Iterator[Path]:
    """A new folder on a tmpfs that everyone may pass through; removed at the end.

    Where no tmpfs can be written root mounts one. Raises `CannotMeasure` for others.
    """
    ready = [
        fields[1]
        for fields in (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
        if fields[2] == "tmpfs" and fields[1] in PLACES and os.access(fields[1], os.W_OK)
    ]
    if not ready and os.geteuid() != 0:
        raise CannotMeasure(f"no tmpfs at {', '.join(PLACES)} can be written")
    folder = Path(tempfile.mkdtemp(prefix="acon-bench-", dir=ready[0] if ready else None))
    try:
        folder.chmod(0o711)
        if not ready:
            mount_tmpfs(folder, mode=0o711, size_mib=SIZE_MIB)
        yield folder
    finally:
        if not ready:
            unmount(folder)
        shutil.rmtree(folder)
