"""The daemon's folder: made, in RAM, and one daemon's at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from supervisor.config import Config
from supervisor.errors import ConfigError, Conflict, RuntimeFailed
from supervisor.ram import refuse_disk

LOCK_NAME = "lock"


def prepare_runtime_dir(config: Config) -> Path:
    """Make the folder, which others may pass through but not list. Raises `ConfigError`."""
    path = Path(config.runtime_dir)
    try:
        path.mkdir(mode=0o711, parents=True, exist_ok=True)
        path.chmod(0o711)
    except OSError as error:
        raise ConfigError(
            f"$.runtime_dir: {path}",
            "must be a folder that acond, as root, can make and own",
            actual=error,
        ) from error
    if not config.unsafe_allow_runtime_dir_on_disk:
        refuse_disk(path)
    return path


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the folder until exit, before any plugin looks into it.

    A plugin cleans up what a dead predecessor left; a living one's it must never see.
    Raises `Conflict` that names the process which holds it. The kernel lets go of it when
    the process dies, however it dies.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        descriptor = os.open(path / LOCK_NAME, flags, 0o600)
    except OSError as error:
        raise RuntimeFailed(str(path / LOCK_NAME), "must be ours", actual=error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace")
            raise Conflict(
                str(path), "another supervisor uses this folder", actual=f"process {holder}"
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)
