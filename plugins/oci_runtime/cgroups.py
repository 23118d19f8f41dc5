"""The control groups that the runtime makes for us, on v1, v2 and hybrid machines.

Every container's is `/acond-INSTANCE/ID` below the root of each hierarchy, so what a
killed supervisor left can be found without asking any runtime.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import trio

MOUNTINFO = Path("/proc/self/mountinfo")
POLL_S = 0.01
_OCTAL_ESCAPE = re.compile(r"\\([0-7]{3})")


def hierarchies(mountinfo: str) -> tuple[Path, ...]:
    """Where control groups are mounted, from the text of proc(5)'s `mountinfo`."""
    found: dict[Path, None] = {}
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split(" ")
        if after.split(" ")[0] in ("cgroup", "cgroup2") and len(fields) > 4:
            mount_point = _OCTAL_ESCAPE.sub(lambda match: chr(int(match[1], 8)), fields[4])
            found[Path(mount_point)] = None
    return tuple(found)


class ControlGroups:
    """All groups of one supervisor. `parent` is absolute, as config.json takes it."""

    def __init__(self, instance: str) -> None:
        self.parent = f"/acond-{instance}"
        self._folders = tuple(
            Path(f"{mount_point}{self.parent}")
            for mount_point in hierarchies(MOUNTINFO.read_text())
        )

    def path_of(self, oci_id: str) -> str:
        """What config.json's `cgroupsPath` says for one container."""
        return f"{self.parent}/{oci_id}"

    def remain(self, oci_id: str | None = None) -> bool:
        """Whether a container's group, or any at all, is still there."""
        return any(folder.is_dir() for folder in self._roots(oci_id))

    def members(self, oci_id: str | None = None) -> set[int]:
        """Process ids in a container's group (or in all), as this pid namespace sees them."""
        found: set[int] = set()
        for root in self._roots(oci_id):
            for folder, _, _ in os.walk(root):
                with suppress(OSError):
                    text = Path(folder, "cgroup.procs").read_text()
                    found.update(int(line) for line in text.split())
        return found - {0}

    async def end(self, oci_id: str | None = None) -> set[int]:
        """Kill and reap all members, remove the groups; returns who was killed.

        Goes on until nothing is left: the caller sets the deadline.
        """
        killed: set[int] = set()
        unreaped: set[int] = set()
        while unreaped or self.remain(oci_id):
            members = self.members(oci_id)
            for pid in members:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            killed |= members
            unreaped = _reap(unreaped | members)
            if not members:
                self._remove(oci_id)
                if not unreaped and not self.remain(oci_id):
                    break
            await trio.sleep(POLL_S)
        return killed

    def _roots(self, oci_id: str | None) -> Iterator[Path]:
        for folder in self._folders:
            yield folder if oci_id is None else folder / oci_id

    def _remove(self, oci_id: str | None) -> None:
        for root in self._roots(oci_id):
            for folder, _, _ in os.walk(root, topdown=False):
                # Busy while the last process is on its way out: the next round tries again.
                with suppress(OSError):
                    os.rmdir(folder)


def _reap(pids: set[int]) -> set[int]:
    """Reap those that have ended; returns those that have not."""
    alive = set()
    for pid in pids:
        # Only some are our children: most belong to their container's first process.
        with suppress(ChildProcessError):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG) is None:
                alive.add(pid)
    return alive
