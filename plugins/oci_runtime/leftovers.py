"""What a supervisor that was killed left behind, ended before anything else happens."""

from __future__ import annotations

import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import msgspec
import trio

from plugins.oci_runtime.cgroups import POLL_S, ControlGroups
from plugins.oci_runtime.gateway import Gateway
from plugins.oci_runtime.probe import PROBE_ID
from plugins.oci_runtime.processes import PROC, all_pids, is_dead
from supervisor import PredecessorEnded, RuntimeFailed

TIMEOUT_S = 20
# A note is for people, and travels with every piece of evidence.
NAMED_IDS = 10


class Leftovers(msgspec.Struct, frozen=True, kw_only=True):
    """What was found and ended. `containers` are ids of the predecessor's counting."""

    containers: tuple[str, ...]
    processes: int
    mounts: bool

    @property
    def any(self) -> bool:
        return bool(self.containers or self.processes or self.mounts)

    @property
    def notes(self) -> tuple[str, ...]:
        """A sentence for the status, if there is anything to say."""
        if not self.any:
            return ()
        ids = ", ".join(self.containers[:NAMED_IDS])
        more = len(self.containers) - NAMED_IDS
        named = f" ({ids}{f' and {more} more' if more > 0 else ''})" if ids else ""
        return (
            "the supervisor before was killed; at this start what it had left was ended: "
            f"containers: {len(self.containers)}{named}, processes: {self.processes}",
        )

    def event(self) -> PredecessorEnded:
        """For observers, if there is anything to tell them."""
        return PredecessorEnded(containers=self.containers, processes=self.processes)


async def end_leftovers(
    *, state_dir: Path, bundles_dir: Path, groups: ControlGroups, gateway: Gateway
) -> Leftovers:
    """End a predecessor's containers, and remove their groups, mounts and folders.

    `groups.find` was called. It asks no runtime: the predecessor may have used another
    one, and one that was interrupted keeps no state yet. Raises `RuntimeFailed` if
    something resists.
    """
    containers = await trio.to_thread.run_sync(_ids, state_dir, groups)
    with trio.move_on_after(TIMEOUT_S) as scope:
        # 1. Runtimes still at work would make new processes behind our back.
        runtimes = await _end_runtimes(state_dir)
        # 2. Every process that is in a container of ours, invoked commands included.
        processes = await groups.end()
    if scope.cancelled_caught:
        raise RuntimeFailed(
            "containers of the predecessor",
            "must end",
            expected=f"within {TIMEOUT_S} s",
            actual=f"processes {sorted(await trio.to_thread.run_sync(groups.members))}",
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


def _ids(state_dir: Path, groups: ControlGroups) -> tuple[str, ...]:
    """Numerically sorted; a runtime keeps state in a folder of the container's name."""
    found = groups.ids()
    if state_dir.is_dir():
        found |= {entry.name for entry in state_dir.iterdir() if entry.is_dir()}
    return tuple(sorted(found - {str(PROBE_ID)}, key=lambda name: (len(name), name)))


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


async def _end_runtimes(state_dir: Path) -> set[int]:
    """Kill every runtime that was started with `--root STATE_DIR`: only ours are.

    With its whole process group: what it was about to put into a container may not be in
    the control group yet. Returns once all are dead; the caller sets the deadline.
    """
    mark = b"\0--root\0" + os.fsencode(state_dir) + b"\0"
    ended: set[int] = set()
    leaders = await trio.to_thread.run_sync(_marked, mark)
    while found := await trio.to_thread.run_sync(_kill_groups, leaders):
        ended |= found
        await trio.sleep(POLL_S)
    return ended


def _marked(mark: bytes) -> set[int]:
    """Process groups of all whose command line contains `mark`."""
    found = set()
    for pid in all_pids():
        with suppress(OSError):
            group = os.getpgid(pid)
            command = (PROC / str(pid) / "cmdline").read_bytes()
            # The number may have been given to a stranger meanwhile, who is in another group.
            if mark in command and os.getpgid(pid) == group:
                found.add(group)
    # Whoever is in our own group was started by us or by our own parent.
    return found - {os.getpgrp(), 0}


def _kill_groups(leaders: set[int]) -> set[int]:
    """SIGKILL to each process that lives in one of these groups; returns who did."""
    killed = set()
    if leaders:
        for pid in all_pids():
            with suppress(OSError):
                pidfd = os.pidfd_open(pid)
                try:
                    # Asked after opening: if the number has been given to somebody else since,
                    # the descriptor is of a dead process, and the signal goes to nobody.
                    if os.getpgid(pid) in leaders and not is_dead(pid):
                        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                        killed.add(pid)
                finally:
                    os.close(pidfd)
    return killed
