"""Control groups of version 1 as a runtime makes them, and processes in them."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from control_group_views import TOP


@contextmanager
def v1_group(instance: str, oci_id: str, *controllers: str) -> Iterator[list[Path]]:
    """One container's groups, a folder for each controller; gone with all in them at the end."""
    folders = [TOP / name / f"acond-{instance}" / oci_id for name in controllers]
    for folder in folders:
        folder.mkdir(parents=True)
    try:
        yield folders
    finally:
        for folder in folders:
            with suppress(FileNotFoundError):
                for pid in (folder / "cgroup.procs").read_text().split():
                    os.kill(int(pid), signal.SIGKILL)
        for folder in (one for group in folders for one in (group, group.parent)):
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def process_in(folders: Sequence[Path], *argv: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program that runs in these groups."""
    join = " && ".join(f"echo 0 > {folder}/cgroup.procs" for folder in folders)
    with subprocess.Popen(
        ["sh", "-c", f'{join} && echo in && exec "$@"', "sh", *argv], stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"in\n"
            yield process
        finally:
            process.kill()
