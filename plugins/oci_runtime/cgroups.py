"""The control groups that the runtime makes for us, on v1, v2 and hybrid machines.

Every container's is `…/acond-INSTANCE/ID` in each hierarchy, so what a killed supervisor
left can be found without asking any runtime.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import trio

from plugins.oci_runtime.hierarchies import (
    OWN_GROUPS,
    TOP,
    Hierarchy,
    groups_named,
    hand_down,
    handed_down,
    is_unified,
    make_place,
    own_unified_group,
    v1_controllers,
    visible_hierarchies,
)
from plugins.oci_runtime.limits import SWAP_ACCOUNTING
from plugins.oci_runtime.processes import PROC
from supervisor import RuntimeFailed

POLL_S = 0.01


class ControlGroups:
    """All groups of one supervisor: `find`, then (after the leftovers' end) `open`, last `end`.

    The async methods read and write files in threads; the others block.
    """

    def __init__(self, instance: str) -> None:
        self._name = f"acond-{instance}"
        self._parent = f"/{self._name}"
        self._hierarchies: tuple[Hierarchy, ...] = ()
        # One for each hierarchy, and where predecessors of this name had theirs.
        self._folders: tuple[Path, ...] = ()
        # Controller -> the folder of `_parent` in its hierarchy.
        self._controlled: dict[str, Path] = {}
        self._controllers: frozenset[str] = frozenset()

    @property
    def controllers(self) -> frozenset[str]:
        """Which of cpu, memory, pids (and SWAP_ACCOUNTING) limit our containers here."""
        return self._controllers

    def path_of(self, oci_id: str) -> str:
        """What config.json's `cgroupsPath` says for one container; absolute."""
        return f"{self._parent}/{oci_id}"

    async def find(self) -> None:
        """Look where control groups are mounted, and which of this name there are.

        Raises `RuntimeFailed`.
        """
        with _refused("must be readable"):
            await trio.to_thread.run_sync(self._find)

    async def open(self) -> None:
        """Make the group of all containers where one is needed; learn which controllers work.

        On a version 2 machine this may move the supervisor's own processes into a leaf
        (`hierarchies.py`). Raises `RuntimeFailed`.
        """
        with _refused("must be writable"):
            await trio.to_thread.run_sync(self._open)

    def remain(self, oci_id: str | None = None) -> bool:
        """Whether a container's group, or any at all, is still there."""
        return any(folder.is_dir() for folder in self._roots(oci_id))

    def ids(self) -> set[str]:
        """Of the containers that have a group."""
        found: set[str] = set()
        for folder in self._folders:
            with suppress(OSError):
                found.update(one.name for one in folder.iterdir() if one.is_dir())
        return found

    def members(self, oci_id: str | None = None) -> set[int]:
        """Process ids in a container's group (or in all), as this pid namespace sees them."""
        found: set[int] = set()
        for root in self._roots(oci_id):
            for folder, _, _ in os.walk(root):
                with suppress(OSError):
                    text = Path(folder, "cgroup.procs").read_text(encoding="ascii")
                    found.update(int(line) for line in text.split())
        return found - {0}

    def memory_bytes(self, oci_id: str) -> int | None:
        """What counts on a container's memory limit now, page cache included; None: unknown."""
        for name in ("memory.current", "memory.usage_in_bytes"):
            text = self._read_memory(oci_id, name)
            if text is not None:
                return int(text)
        return None

    def out_of_memory(self, oci_id: str) -> bool:
        """Whether the kernel killed anything in a container for want of memory.

        To be asked before the group is removed, which forgets it.
        """
        for name in ("memory.events", "memory.oom_control"):
            for line in (self._read_memory(oci_id, name) or "").splitlines():
                key, _, value = line.partition(" ")
                if key == "oom_kill":
                    return int(value) > 0
        return False

    async def end(self, oci_id: str | None = None) -> set[int]:
        """Kill and reap all members, remove the groups; returns who was killed.

        Goes on until nothing is left: the caller sets the deadline.
        """
        killed: set[int] = set()
        unreaped: set[int] = set()
        while True:
            members, unreaped, remain = await trio.to_thread.run_sync(
                self._end_once, oci_id, unreaped
            )
            killed |= members
            if not unreaped and not remain:
                return killed
            await trio.sleep(POLL_S)

    def _find(self) -> None:
        self._hierarchies = visible_hierarchies()
        folders: dict[Path, None] = {}
        for one in self._hierarchies:
            folders[one.mount_point / self._name] = None
            if one.version == 2:
                folders |= dict.fromkeys(groups_named(one.mount_point, self._name))
        self._folders = tuple(folders)

    def _open(self) -> None:
        if is_unified(self._hierarchies):
            self._open_unified()
            return
        mount_points = v1_controllers(self._hierarchies)
        self._controlled = {
            name: mount_point / self._name for name, mount_point in mount_points.items()
        }
        memory = mount_points.get("memory")
        swap = memory is not None and (memory / "memory.memsw.limit_in_bytes").exists()
        self._controllers = frozenset({*mount_points, *([SWAP_ACCOUNTING] if swap else ())})

    def _open_unified(self) -> None:
        place = make_place(TOP, own_unified_group(OWN_GROUPS.read_text(encoding="utf-8")))
        self._parent = f"{place.rstrip('/')}/{self._name}"
        folder = Path(f"{TOP}{self._parent}")
        folder.mkdir(exist_ok=True)
        self._folders = tuple(dict.fromkeys((*self._folders, folder)))
        hand_down(folder)
        names = handed_down(folder)
        swap = "memory" in names and (folder / "memory.swap.max").exists()
        self._controlled = dict.fromkeys(names, folder)
        self._controllers = names | ({SWAP_ACCOUNTING} if swap else frozenset())

    def _read_memory(self, oci_id: str, name: str) -> str | None:
        folder = self._controlled.get("memory")
        if folder is None:
            return None
        try:
            return (folder / oci_id / name).read_text(encoding="ascii")
        except OSError:
            # The other version's file, or the group is gone.
            return None

    def _roots(self, oci_id: str | None) -> Iterator[Path]:
        for folder in self._folders:
            yield folder if oci_id is None else folder / oci_id

    def _end_once(self, oci_id: str | None, unreaped: set[int]) -> tuple[set[int], set[int], bool]:
        """One round: stop forks, kill, reap, remove.

        Returns (members found, who is still to reap, whether groups remain).
        """
        members = self.members(oci_id)
        for root in self._roots(oci_id):
            # What forks faster than we kill cannot fork any more, ...
            _write(root / "pids.max", "0")
            # ... all at once where the kernel can (Linux 5.14, version 2), ...
            _write(root / "cgroup.kill", "1")
            # ... and what an interrupted runtime froze has to thaw before it can die.
            for folder, _, _ in os.walk(root):
                _write(Path(folder, "freezer.state"), "THAWED")
        for pid in members:
            self._kill(pid)
        unreaped = _reap(unreaped | members)
        if not members:
            self._remove(oci_id)
        return members, unreaped, self.remain(oci_id)

    def _kill(self, pid: int) -> None:
        with suppress(OSError):
            pidfd = os.pidfd_open(pid)
            try:
                # Whoever was listed may be gone, and its number given to a stranger.
                groups = (PROC / str(pid) / "cgroup").read_text(encoding="utf-8")
                if f"/{self._name}/" in groups or f"/{self._name}\n" in groups:
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            finally:
                os.close(pidfd)

    def _remove(self, oci_id: str | None) -> None:
        for root in self._roots(oci_id):
            for folder, _, _ in os.walk(root, topdown=False):
                # Busy while the last process is on its way out: the next round tries again.
                with suppress(OSError):
                    os.rmdir(folder)


@contextmanager
def _refused(rule: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RuntimeFailed("control groups", rule, expected=str(TOP), actual=error) from error


def _write(file: Path, text: str) -> None:
    """To a control file, if there is such a one: never makes it."""
    with suppress(OSError):
        fd = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)


def _reap(pids: set[int]) -> set[int]:
    """Reap those that have ended; returns those that have not."""
    alive = set()
    for pid in pids:
        # Only some are our children: most belong to their container's first process.
        with suppress(ChildProcessError):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG) is None:
                alive.add(pid)
    return alive
