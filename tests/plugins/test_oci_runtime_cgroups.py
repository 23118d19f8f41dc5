"""Control groups of versions 1 and 2 and of hybrid machines: found, made, read, ended.

This machine's own are hybrid. Others are shown in a mount namespace of a child process;
in version 2 there, only controllers that version 1 does not hold exist.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio
from control_group_views import TOP, machine_is_hybrid, run_in_view
from control_groups_rig import process_in, v1_group
from oci_runtime_rig import children

from plugins.oci_runtime.cgroups import ControlGroups
from plugins.oci_runtime.hierarchies import (
    Hierarchy,
    is_unified,
    own_unified_group,
    parse_hierarchies,
    v1_controllers,
)
from plugins.oci_runtime.limits import SWAP_ACCOUNTING

NAME = f"test-{os.getpid()}"
PATIENCE_S = 60

V1 = r"""
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
33 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
34 31 0:37 / /sys/fs/cgroup/a\040space rw,relatime - cgroup cgroup rw,name=systemd
"""
V2 = """
28 23 0:25 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime - cgroup2 cgroup2 rw,nsdelegate
"""
UNIFIED_BESIDE = "35 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"


def test_version_1_hierarchies_are_read_with_their_controllers() -> None:
    found = parse_hierarchies(V1)
    assert [(one.version, str(one.mount_point)) for one in found] == [
        (1, "/sys/fs/cgroup/cpu,cpuacct"),
        (1, "/sys/fs/cgroup/memory"),
        (1, "/sys/fs/cgroup/a space"),
    ]
    assert found[0].device == (0, 29)
    assert {"cpu", "cpuacct"} <= found[0].options
    assert not is_unified(found)


def test_version_2_alone_is_unified_and_beside_version_1_it_is_not() -> None:
    assert is_unified(parse_hierarchies(V2))
    assert not is_unified(parse_hierarchies(V1 + UNIFIED_BESIDE))
    assert is_unified(()) is False


@pytest.mark.parametrize(
    "line", ["", "31 23 0:28 / /sys", "1 2 0:3 / / - cgroup2", "a - cgroup b c"]
)
def test_lines_that_are_cut_short_tell_nothing(line: str) -> None:
    assert parse_hierarchies(line) == ()


def test_a_processor_controller_that_cannot_cap_does_not_count(tmp_path: Path) -> None:
    options = frozenset({"rw", "cpu", "memory"})
    one = Hierarchy(mount_point=tmp_path, version=1, device=(0, 1), options=options)
    assert v1_controllers((one,)) == {"memory": tmp_path}
    (tmp_path / "cpu.cfs_quota_us").touch()
    assert v1_controllers((one,)) == {"cpu": tmp_path, "memory": tmp_path}


def test_the_own_group_is_that_of_version_2() -> None:
    text = "8:pids:/elsewhere\n1:name=systemd:/other\n0::/system.slice/acond.service\n"
    assert own_unified_group(text) == "/system.slice/acond.service"
    assert own_unified_group("8:pids:/elsewhere\n") == "/"


def version_2_groups(folder: Path) -> ControlGroups:
    """As if version 2 had the memory controller here: files instead of a kernel."""
    groups = ControlGroups("test")
    groups._controlled = {"memory": folder}
    return groups


def test_memory_of_version_2_is_read(tmp_path: Path) -> None:
    group = tmp_path / "7"
    group.mkdir()
    (group / "memory.current").write_text("1048576\n")
    events = "low 0\nhigh 3\nmax 17\noom 1\noom_kill {}\noom_group_kill 0\n"
    groups = version_2_groups(tmp_path)
    assert groups.memory_bytes("7") == 1048576
    assert groups.memory_bytes("8") is None
    for kills in (0, 1):
        (group / "memory.events").write_text(events.format(kills))
        assert groups.out_of_memory("7") is bool(kills)
    assert not groups.out_of_memory("8")


# --- real ones ------------------------------------------------------------------------------


async def found_groups() -> ControlGroups:
    groups = ControlGroups(NAME)
    await groups.find()
    return groups


needs_hybrid = pytest.mark.skipif(
    not machine_is_hybrid(), reason="needs version 1 controllers beside version 2"
)


@pytest.mark.root
@needs_hybrid
async def test_a_hybrid_machine_counts_with_version_1_s_controllers() -> None:
    groups = await found_groups()
    await groups.open()
    expected = {"cpu", "memory", "pids"}
    if (TOP / "memory" / "memory.memsw.limit_in_bytes").exists():
        expected.add(SWAP_ACCOUNTING)
    assert groups.controllers == expected
    assert groups.path_of("7") == f"/acond-{NAME}/7"
    # Runtimes make version 1's groups: nothing is there to be removed.
    assert not groups.remain()


@pytest.mark.root
@needs_hybrid
async def test_a_fork_bomb_is_ended() -> None:
    # Each forks on, also when it could not for a while.
    bomb = "import os\nwhile True:\n try: os.fork()\n except OSError: pass"
    with v1_group(NAME, "7", "pids", "memory") as folders, ExitStack() as stack:
        (folders[0] / "pids.max").write_text("100")
        process = stack.enter_context(process_in(folders, sys.executable, "-c", bomb))
        groups = await found_groups()
        with trio.fail_after(PATIENCE_S):
            while len(groups.members("7")) < 50:  # noqa: ASYNC110 - another process's doing
                await trio.sleep(0.01)
            killed = await groups.end("7")
        assert process.pid in killed
        # Reaped as well: it was a child of ours.
        assert str(process.pid) not in children()
        assert not groups.remain("7")
        assert groups.members() == set()


@pytest.mark.root
@needs_hybrid
async def test_nobody_can_fork_any_more_once_the_killing_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits = []
    kill = ControlGroups._kill
    with v1_group(NAME, "7", "pids", "memory") as folders, process_in(folders, "sleep", "1000"):

        def watched(groups: ControlGroups, pid: int) -> None:
            limits.append((folders[0] / "pids.max").read_text())
            kill(groups, pid)

        monkeypatch.setattr(ControlGroups, "_kill", watched)
        with trio.fail_after(PATIENCE_S):
            await (await found_groups()).end("7")
    assert limits
    assert set(limits) == {"0\n"}


@pytest.mark.root
@needs_hybrid
async def test_what_an_interrupted_runtime_froze_is_ended() -> None:
    with v1_group(NAME, "7", "freezer") as folders, process_in(folders, "sleep", "1000") as process:
        (folders[0] / "freezer.state").write_text("FROZEN")
        groups = await found_groups()
        with trio.fail_after(PATIENCE_S):
            assert await groups.end() == {process.pid}
        assert not groups.remain()


@pytest.mark.root
@needs_hybrid
async def test_the_end_of_one_container_spares_the_others() -> None:
    with ExitStack() as stack:
        first = stack.enter_context(v1_group(NAME, "7", "pids"))
        second = stack.enter_context(v1_group(NAME, "8", "pids"))
        stack.enter_context(process_in(first, "sleep", "1000"))
        spared = stack.enter_context(process_in(second, "sleep", "1000"))
        groups = await found_groups()
        assert groups.ids() == {"7", "8"}
        with trio.fail_after(PATIENCE_S):
            await groups.end("7")
        assert groups.ids() == {"8"}
        assert spared.poll() is None
        with trio.fail_after(PATIENCE_S):
            await groups.end()
        assert not groups.remain()


async def test_a_stranger_who_got_a_member_s_number_is_spared() -> None:
    with subprocess.Popen(["sleep", "1000"]) as stranger:  # noqa: ASYNC220 - not waited for
        try:
            ControlGroups(NAME)._kill(stranger.pid)
            await trio.sleep(0.05)
            assert stranger.poll() is None
        finally:
            stranger.kill()


# --- what other machines show ---------------------------------------------------------------

LOOK = """
    import json, sys, trio
    from plugins.oci_runtime.cgroups import ControlGroups

    async def main():
        groups = ControlGroups(sys.argv[1])
        await groups.find()
        await groups.open()
        made = groups.remain()
        await groups.end()
        print(json.dumps([sorted(groups.controllers), groups.path_of("7"), made, groups.remain()]))

    trio.run(main)
"""


@pytest.mark.root
def test_on_a_version_2_machine_the_parent_is_made_and_removed() -> None:
    controllers, path, made, remain = run_in_view("v2", LOOK, NAME)
    assert path == f"/acond-{NAME}/7"
    assert made and not remain
    # What version 1 holds on this machine is not there.
    assert set(controllers) <= {"cpu", "memory", "pids", SWAP_ACCOUNTING}
    assert not machine_is_hybrid() or controllers == []


@pytest.mark.root
@needs_hybrid
def test_a_version_1_machine_has_all_controllers() -> None:
    controllers, path, made, remain = run_in_view("v1", LOOK, NAME)
    assert {"cpu", "memory", "pids"} <= set(controllers)
    assert path == f"/acond-{NAME}/7"
    assert not made and not remain


@pytest.mark.root
def test_without_any_control_groups_there_are_no_controllers() -> None:
    assert run_in_view("none", LOOK, NAME) == [[], f"/acond-{NAME}/7", False, False]


# A unit as systemd makes it: a group with the mark, the service's processes in it. The
# controller stands for those that this kernel's version 1 holds.
UNIT = """
    import json, os, subprocess, sys, trio
    from pathlib import Path
    from plugins.oci_runtime import hierarchies
    from plugins.oci_runtime.cgroups import ControlGroups

    name, mark, leaf = sys.argv[1:]
    top = Path("/sys/fs/cgroup")
    unit = top / f"{name}.service"
    free = (top / "cgroup.controllers").read_text().split()
    hierarchies.WANTED = tuple(free[:1])

    def own_group():
        return hierarchies.own_unified_group(Path("/proc/self/cgroup").read_text())

    async def main():
        groups = ControlGroups(name)
        await groups.find()
        await groups.open()
        parent = Path(f"{top}{groups.path_of('7')}").parent
        answer = {
            "path": groups.path_of("7"),
            "own": own_group(),
            "controllers": sorted(groups.controllers),
            "helper": Path(f"/proc/{helper.pid}/cgroup").read_text().splitlines()[-1],
            "free": free[:1],
        }
        # The next supervisor of this name finds it, wherever it is started itself.
        (top / "cgroup.procs").write_text(str(os.getpid()))
        again = ControlGroups(name)
        await again.find()
        answer["found again"] = again.remain()
        with trio.fail_after(60):
            await again.end()
        answer["left"] = parent.exists()
        print(json.dumps(answer))

    before = (top / "cgroup.subtree_control").read_text().split()
    if mark:
        # A unit with Delegate=yes has what there is, from systemd.
        for controller in hierarchies.WANTED:
            (top / "cgroup.subtree_control").write_text(f"+{controller}")
    unit.mkdir()
    if mark:
        os.setxattr(unit, "trusted.delegate", mark.encode())
    start = unit / leaf
    start.mkdir(exist_ok=True)
    (start / "cgroup.procs").write_text(str(os.getpid()))
    helper = subprocess.Popen(["sleep", "1000"])
    try:
        trio.run(main)
    finally:
        helper.kill()
        helper.wait()
        (top / "cgroup.procs").write_text(str(os.getpid()))
        for folder in (unit / "supervisor", unit):
            if folder.exists():
                folder.rmdir()
        for controller in set(free[:1]) - set(before):
            (top / "cgroup.subtree_control").write_text(f"-{controller}")
"""


@pytest.mark.root
@needs_hybrid
@pytest.mark.parametrize("leaf", ["", "supervisor"])
def test_in_a_delegated_unit_the_supervisor_steps_aside_and_controllers_are_handed_down(
    leaf: str,
) -> None:
    seen = run_in_view("v2", UNIT, NAME, "1", leaf)
    assert seen["path"] == f"/{NAME}.service/acond-{NAME}/7"
    assert seen["own"] == f"/{NAME}.service/supervisor"
    # Whoever else is of the unit is in the way as well.
    assert seen["helper"] == f"0::/{NAME}.service/supervisor"
    assert seen["found again"] and not seen["left"]
    assert seen["controllers"] == seen["free"]


@pytest.mark.root
@needs_hybrid
@pytest.mark.parametrize("mark", ["", "0"])
def test_in_a_unit_that_is_not_delegated_containers_go_to_the_top(mark: str) -> None:
    seen = run_in_view("v2", UNIT, NAME, mark, "")
    assert seen["path"] == f"/acond-{NAME}/7"
    assert seen["own"] == f"/{NAME}.service"
    assert seen["helper"] == f"0::/{NAME}.service"
    assert seen["controllers"] == seen["free"]
    assert seen["found again"] and not seen["left"]


# What systemd or another machine's kernel would have done before: all handed down to a unit.
CONTAINER = """
    import json, os, subprocess, sys, trio
    from pathlib import Path
    from plugins.oci_runtime import hierarchies
    from plugins.oci_runtime.cgroups import ControlGroups

    top = Path("/sys/fs/cgroup")
    hierarchies.WANTED = ("hugetlb",)

    async def main():
        groups = ControlGroups(sys.argv[1])
        await groups.find()
        await groups.open()
        own = hierarchies.own_unified_group(Path("/proc/self/cgroup").read_text())
        print(json.dumps([own, groups.path_of("7"), sorted(groups.controllers)]))
        await groups.end()

    trio.run(main)
"""


@pytest.mark.root
@needs_hybrid
def test_in_a_container_s_topmost_group_the_supervisor_steps_aside() -> None:
    """A control group namespace: its topmost group is an inner one of the machine's."""
    inside = f"""
    import ctypes, os, subprocess, sys
    from pathlib import Path
    top, group = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/{NAME}-container")
    before = (top / "cgroup.subtree_control").read_text().split()
    free = (top / "cgroup.controllers").read_text().split()
    if "hugetlb" in free:
        (top / "cgroup.subtree_control").write_text("+hugetlb")
    group.mkdir()
    (group / "cgroup.procs").write_text(str(os.getpid()))
    try:
        script = 'umount -l /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup && exec "$@"'
        subprocess.run(
            ["unshare", "--cgroup", "--mount", "sh", "-c", script, "sh", *sys.argv[1:]],
            check=True,
        )
    finally:
        (top / "cgroup.procs").write_text(str(os.getpid()))
        (group / "supervisor").rmdir()
        group.rmdir()
        if "hugetlb" in free and "hugetlb" not in before:
            (top / "cgroup.subtree_control").write_text("-hugetlb")
    """
    import textwrap

    program = [sys.executable, "-c", textwrap.dedent(CONTAINER), NAME]
    own, path, controllers = run_in_view("v2", inside, *program)
    assert own == "/supervisor"
    assert path == f"/acond-{NAME}/7"
    free = (TOP / "unified" / "cgroup.controllers").read_text().split()
    assert controllers == [name for name in free if name == "hugetlb"]
