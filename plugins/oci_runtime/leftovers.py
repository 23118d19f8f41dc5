"""What a supervisor that was killed left behind, ended before anything else happens."""

from __future__ import annotations

import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import msgspec
import trio

from plugins.oci_runtime.cgroups import ControlGroups
from plugins.oci_runtime.gateway import Gateway
from supervisor import RuntimeFailed

TIMEOUT_S = 20
PROC = Path("/proc")


class Leftovers(msgspec.Struct, frozen=True, kw_only=True):
    """What was found and ended. `containers` are ids of the predecessor's counting."""

    containers: tuple[str, ...]
    processes: int
    mounts: bool

    @property
    def any(self) -> bool:
        return bool(self.containers or self.processes or self.mounts)


async def end_leftovers(
    *, state_dir: Path, bundles_dir: Path, groups: ControlGroups, gateway: Gateway
) -> Leftovers:
    """End a predecessor's containers, and remove their groups, mounts and folders.

    It asks no runtime: the predecessor may have used another one, and one that was
    interrupted keeps no state yet. Raises `RuntimeFailed` if something resists.
    """
    containers = await trio.to_thread.run_sync(_ids_in, state_dir)
    with trio.move_on_after(TIMEOUT_S) as scope:
        # 1. Runtimes still at work would make new processes behind our back.
        runtimes = await trio.to_thread.run_sync(_kill_runtimes, state_dir)
        # 2. Every process that is in a container of ours.
        processes = await groups.end()
    if scope.cancelled_caught:
        raise RuntimeFailed(
            "containers of the predecessor",
            "must end",
            expected=f"within {TIMEOUT_S} s",
            actual=f"processes {sorted(groups.members())}",
        )
    # 3. Mounts live on in no namespace but ours now; folders last.
    try:
        mounts = await trio.to_thread.run_sync(gateway.close)
        for folder in (state_dir, bundles_dir):
            await trio.to_thread.run_sync(_remove, folder)
    except OSError as error:
        raise RuntimeFailed(
            "mounts of the predecessor", "must be removable", actual=error
        ) from error
    return Leftovers(containers=containers, processes=len(processes | runtimes), mounts=mounts)


def _ids_in(state_dir: Path) -> tuple[str, ...]:
    if not state_dir.is_dir():
        return ()
    return tuple(sorted(entry.name for entry in state_dir.iterdir() if entry.is_dir()))


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _kill_runtimes(state_dir: Path) -> set[int]:
    """Kill every runtime that was started with `--root STATE_DIR`: only ours are."""
    mark = b"\0--root\0" + os.fsencode(state_dir) + b"\0"
    killed = set()
    for entry in PROC.iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError):
            if mark in Path(entry, "cmdline").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)
                killed.add(int(entry.name))
    return killed
