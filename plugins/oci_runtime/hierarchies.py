"""Where control groups are mounted, and where below them a supervisor may put its own.

Version 1 (also beside a version 2 without controllers, "hybrid"): many hierarchies, each
with controllers of its own; groups at their tops are nobody's business but their maker's.

Version 2 alone: one tree, which systemd owns if it runs. A group may hold processes or
hand controllers down to its children, not both ("no internal processes"), except the
machine's topmost one. So a supervisor in a unit that systemd has delegated (`Delegate=yes`)
steps aside into a leaf of the unit, and its containers come beside it; without delegation
they go to the top of the tree, as those of other runtimes do.

Sources: cgroups(7); Documentation/admin-guide/cgroup-v2.rst; systemd's CGROUP_DELEGATION.md.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Literal

import msgspec

MOUNTINFO = Path("/proc/self/mountinfo")
OWN_GROUPS = Path("/proc/self/cgroup")
# Where every OCI runtime looks, and nowhere else.
TOP = Path("/sys/fs/cgroup")
# What containers are limited by.
WANTED = ("cpu", "memory", "pids")
# The leaf of a delegated unit in which the supervisor itself lives.
LEAF = "supervisor"
# systemd marks delegated groups so for privileged services, from version 236 on.
DELEGATED = "trusted.delegate"
# A process may start others while it is moved; nobody goes on doing so for ever.
STEPS = 20
_OCTAL_ESCAPE = re.compile(r"\\([0-7]{3})")


class Hierarchy(msgspec.Struct, frozen=True, kw_only=True):
    """One mounted tree of control groups; `options` are the superblock's (v1: controllers)."""

    mount_point: Path
    version: Literal[1, 2]
    device: tuple[int, int]
    options: frozenset[str]


def parse_hierarchies(mountinfo: str) -> tuple[Hierarchy, ...]:
    """All that proc(5)'s `mountinfo` tells of, in its order."""
    found = []
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(" "), after.split(" ")
        if kind[0] not in ("cgroup", "cgroup2") or len(fields) < 5 or len(kind) < 3:
            continue
        major, _, minor = fields[2].partition(":")
        found.append(
            Hierarchy(
                mount_point=Path(_OCTAL_ESCAPE.sub(lambda one: chr(int(one[1], 8)), fields[4])),
                version=2 if kind[0] == "cgroup2" else 1,
                device=(int(major), int(minor)),
                options=frozenset(kind[2].split(",")),
            )
        )
    return tuple(found)


def visible_hierarchies() -> tuple[Hierarchy, ...]:
    """Those that runtimes use: at or below TOP, not mounted over, each once. Blocks."""
    found: dict[tuple[int, int], Hierarchy] = {}
    for one in parse_hierarchies(MOUNTINFO.read_text(encoding="utf-8")):
        if one.mount_point == TOP or TOP in one.mount_point.parents:
            with suppress(OSError):
                device = one.mount_point.stat().st_dev
                if (os.major(device), os.minor(device)) == one.device:
                    found.setdefault(one.device, one)
    return tuple(found.values())


def is_unified(found: tuple[Hierarchy, ...]) -> bool:
    """Whether runtimes will use version 2, by their own test: what is mounted at TOP."""
    return any(one.mount_point == TOP and one.version == 2 for one in found)


def v1_controllers(found: tuple[Hierarchy, ...]) -> dict[str, Path]:
    """Controller -> where its hierarchy is mounted; `cpu` only if it can cap. Blocks."""
    return {
        name: one.mount_point
        for one in found
        for name in WANTED
        if one.version == 1
        and name in one.options
        and (name != "cpu" or (one.mount_point / "cpu.cfs_quota_us").exists())
    }


def own_unified_group(own_groups: str) -> str:
    """The version 2 group in the text of `/proc/self/cgroup`; "/" if there is none."""
    for line in own_groups.splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            return path
    return "/"


def make_place(top: Path, own_group: str) -> str:
    """The version 2 group below which ours may be made, with WANTED handed down to it.

    Moves this process and others of its unit aside where that is needed. Controllers that
    do not exist, or that somebody in there keeps from being handed down, are left out:
    the caller looks for what it got. Blocks. Raises `OSError`.
    """
    place = _delegated_unit(top, own_group) or "/"
    folder = _folder(top, place)
    # Only the machine's topmost group has no type: a container's topmost has.
    if (folder / "cgroup.type").exists():
        _step_aside(folder)
    hand_down(folder)
    return place


def hand_down(folder: Path) -> None:
    """Let the children of a version 2 group have the WANTED controllers that it has. Blocks."""
    available = (folder / "cgroup.controllers").read_text(encoding="ascii").split()
    for name in WANTED:
        if name in available:
            # Busy: somebody else's processes are in there. The others may still work.
            with suppress(OSError):
                (folder / "cgroup.subtree_control").write_text(f"+{name}", encoding="ascii")


def handed_down(folder: Path) -> frozenset[str]:
    """The WANTED controllers that a version 2 group's children have. Blocks."""
    text = (folder / "cgroup.subtree_control").read_text(encoding="ascii")
    return frozenset(text.split()) & frozenset(WANTED)


def groups_named(top: Path, name: str) -> tuple[Path, ...]:
    """Every group of this name in a tree, wherever a predecessor was started. Blocks."""
    found = []
    for folder, children, _ in os.walk(top):
        if name in children:
            found.append(Path(folder, name))
            children.remove(name)
    return tuple(found)


def _delegated_unit(top: Path, own_group: str) -> str | None:
    """Our own group, or the one around our leaf, if systemd gave it into our hands."""
    group = Path(own_group)
    for unit in (group, group.parent) if group.name == LEAF else (group,):
        with suppress(OSError):
            if os.getxattr(_folder(top, str(unit)), DELEGATED) == b"1":
                return str(unit)
    return None


def _step_aside(folder: Path) -> None:
    leaf = folder / LEAF
    leaf.mkdir(exist_ok=True)
    for _ in range(STEPS):
        members = (folder / "cgroup.procs").read_text(encoding="ascii").split()
        for pid in members:
            # 0: it is not of our pid namespace; or it has ended by now.
            with suppress(OSError):
                (leaf / "cgroup.procs").write_text(pid, encoding="ascii")
        if not members:
            break


def _folder(top: Path, group: str) -> Path:
    return Path(f"{top}{group}".rstrip("/"))
