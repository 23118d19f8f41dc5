"""Limits from configuration to a real container that meets them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import trio
from control_group_views import TOP, machine_is_hybrid
from oci_runtime_rig import Held, Rig, running_rig

from plugins.oci_runtime import OciRuntime
from plugins.oci_runtime.limits import (
    CPU_PERIOD_US,
    MEBIBYTE,
    SWAP_ACCOUNTING,
    Limits,
    limits_for,
    machine_memory_bytes,
    missing_controllers,
    missing_notes,
    resources,
)
from supervisor import ExitStatus

ALL = frozenset({"cpu", "memory", "pids", SWAP_ACCOUNTING})
LIMITS = Limits(memory_bytes=64 * MEBIBYTE, cpu_percent=150, pids=100)


def test_without_a_memory_limit_a_container_gets_half_of_the_machine() -> None:
    limits = limits_for(
        memory_limit_mib=None,
        cpu_limit_percent=None,
        pids_limit=1024,
        machine_memory_bytes=24 * 1024 * MEBIBYTE,
    )
    assert limits == Limits(memory_bytes=12 * 1024 * MEBIBYTE, cpu_percent=None, pids=1024)


def test_a_memory_limit_counts_in_mebibytes() -> None:
    limits = limits_for(
        memory_limit_mib=64, cpu_limit_percent=150, pids_limit=100, machine_memory_bytes=1
    )
    assert limits == LIMITS


def test_the_machine_s_memory_is_what_the_kernel_tells() -> None:
    with open("/proc/meminfo", encoding="ascii") as file:
        kibibytes = int(file.readline().split()[1])
    assert machine_memory_bytes() == kibibytes * 1024


def test_all_controllers_make_all_resources() -> None:
    assert resources(LIMITS, ALL) == {
        "memory": {"limit": 64 * MEBIBYTE, "swap": 64 * MEBIBYTE},
        "cpu": {"shares": 1024, "period": CPU_PERIOD_US, "quota": 150_000},
        "pids": {"limit": 100},
    }


def test_without_a_cap_neighbours_share_the_processors_equally() -> None:
    limits = Limits(memory_bytes=MEBIBYTE, cpu_percent=None, pids=1)
    assert resources(limits, frozenset({"cpu"})) == {"cpu": {"shares": 1024}}


@pytest.mark.parametrize(
    ("controllers", "members", "missing"),
    [
        (frozenset(), set(), ("cpu", "memory", "pids")),
        (frozenset({"memory"}), {"memory"}, ("cpu", SWAP_ACCOUNTING, "pids")),
        (frozenset({"cpu", "pids"}), {"cpu", "pids"}, ("memory",)),
        (ALL, {"cpu", "memory", "pids"}, ()),
    ],
)
def test_only_controllers_that_exist_are_asked_and_the_others_are_named(
    controllers: frozenset[str], members: set[str], missing: tuple[str, ...]
) -> None:
    found = resources(LIMITS, controllers)
    assert found.keys() == members
    assert "swap" not in str(found) or SWAP_ACCOUNTING in controllers
    assert missing_controllers(controllers) == tuple(sorted(missing))
    notes = missing_notes(controllers)
    assert len(notes) == len(missing)
    assert all(
        note.endswith(f"no {name}") for note, name in zip(notes, sorted(missing), strict=True)
    )


# --- real containers ------------------------------------------------------------------------

PATIENCE_S = 60
limited = pytest.mark.skipif(
    not machine_is_hybrid(), reason="looks into version 1's control groups"
)
HOG = "exec tail /dev/zero"  # keeps the last line in memory, and there is only one


def group_of(rig: Rig, container_id: int, controller: str) -> Path:
    return TOP / controller / f"acond-{rig.instance}" / str(container_id)


async def ended(container: Held) -> ExitStatus:
    with trio.fail_after(PATIENCE_S):
        status = await container.wait()
    await container.destroy()
    return status


@pytest.mark.root
@limited
@pytest.mark.parametrize(
    "script", [HOG, "exec dd if=/dev/zero of=/tmp/fill bs=1M count=200"], ids=["program", "/tmp"]
)
async def test_a_container_over_its_memory_limit_is_killed_alone_and_says_so(
    tmp_path: Path, script: str
) -> None:
    async with running_rig(tmp_path, OciRuntime.Config(memory_limit_mib=64)) as rig:
        neighbour = await rig.start(rig.spec("/bin/sh", "-c", "read x < /dev/zero"))
        hog = await rig.start(rig.spec("/bin/sh", "-c", script))
        assert await ended(hog) == ExitStatus(signal=signal.SIGKILL, out_of_memory=True)
        os.kill(neighbour.pid, 0)
        await neighbour.signal(signal.SIGKILL, whole_group=False)
        assert await ended(neighbour) == ExitStatus(signal=signal.SIGKILL, out_of_memory=False)
        assert rig.remains() == []


@pytest.mark.root
@limited
async def test_that_a_child_was_killed_for_memory_is_said_at_the_end(tmp_path: Path) -> None:
    async with running_rig(tmp_path, OciRuntime.Config(memory_limit_mib=64)) as rig:
        container = await rig.start(rig.spec("/bin/sh", "-c", "tail /dev/zero; exit 5"))
        assert await ended(container) == ExitStatus(exit_code=5, out_of_memory=True)


@pytest.mark.root
@limited
async def test_what_the_kernel_was_told_is_what_was_configured(tmp_path: Path) -> None:
    config = OciRuntime.Config(memory_limit_mib=64, cpu_limit_percent=150, pids_limit=77)
    async with running_rig(tmp_path, config) as rig:
        spec = rig.spec("/bin/sleep", "1000")
        container = await rig.start(spec)

        def told(controller: str, file: str) -> int:
            return int((group_of(rig, spec.container_id, controller) / file).read_text())

        assert told("memory", "memory.limit_in_bytes") == 64 * MEBIBYTE
        memsw = TOP / "memory" / "memory.memsw.limit_in_bytes"
        if memsw.exists():
            assert told("memory", memsw.name) == 64 * MEBIBYTE
        assert told("cpu", "cpu.cfs_quota_us") == 150_000
        assert told("cpu", "cpu.cfs_period_us") == CPU_PERIOD_US
        assert told("cpu", "cpu.shares") == 1024
        assert told("pids", "pids.max") == 77
        used = await rig.launcher.memory_bytes([spec.container_id, 4711])
        assert used.keys() == {spec.container_id}
        assert 0 < used[spec.container_id] <= 64 * MEBIBYTE
        await container.destroy()
        assert await rig.launcher.memory_bytes([spec.container_id]) == {}


@pytest.mark.root
@limited
async def test_without_settings_a_container_may_use_half_of_the_memory(tmp_path: Path) -> None:
    async with running_rig(tmp_path) as rig:
        spec = rig.spec("/bin/sleep", "1000")
        container = await rig.start(spec)
        limit = int(
            (group_of(rig, spec.container_id, "memory") / "memory.limit_in_bytes").read_text()
        )
        quota = int((group_of(rig, spec.container_id, "cpu") / "cpu.cfs_quota_us").read_text())
        await container.destroy()
    page = os.sysconf("SC_PAGE_SIZE")
    assert limit == machine_memory_bytes() // 2 // page * page
    assert quota == -1
    assert rig.launcher.notes == ()


@pytest.mark.root
@limited
async def test_a_fork_bomb_stops_at_its_limit_and_ends_with_its_container(tmp_path: Path) -> None:
    limit = 60
    async with running_rig(tmp_path, OciRuntime.Config(pids_limit=limit)) as rig:
        # Each of them goes on when it could not fork.
        bomb = "bomb() { while :; do bomb & sleep 1000 & wait $!; done; }; bomb 2>/dev/null"
        spec = rig.spec("/bin/sh", "-c", f"trap '' HUP; {bomb}; exec sleep 1000")
        container = await rig.start(spec)
        group = group_of(rig, spec.container_id, "pids")
        with trio.fail_after(PATIENCE_S):
            while not was_refused(group):  # noqa: ASYNC110 - another process's doing
                await trio.sleep(0.01)
        assert int((group / "pids.current").read_text()) <= limit
        # Neighbours and the machine fork as before.
        assert await rig.shell("for i in 1 2 3 4 5; do sleep 0 & done; wait; echo fine") == "fine\n"
        with trio.fail_after(PATIENCE_S):
            await container.destroy()
        assert rig.remains() == []


def was_refused(group: Path) -> bool:
    """Whether a fork failed for the limit, from "max N" in pids.events."""
    return int((group / "pids.events").read_text().split()[1]) > 0


@pytest.mark.root
@limited
async def test_a_container_over_its_share_of_the_processors_is_throttled(tmp_path: Path) -> None:
    async with running_rig(tmp_path, OciRuntime.Config(cpu_limit_percent=20)) as rig:
        idle = rig.spec("/bin/sleep", "1000")
        busy = rig.spec("/bin/sh", "-c", "while :; do :; done")
        containers = [await rig.start(spec) for spec in (idle, busy)]
        begun = throttled(rig, busy.container_id)
        with trio.fail_after(PATIENCE_S):
            while throttled(rig, busy.container_id) < begun + 3:  # noqa: ASYNC110 - the kernel's
                await trio.sleep(0.01)
        # Starting takes more than a fifth of a processor too; sleeping does not.
        settled = throttled(rig, idle.container_id)
        await trio.sleep(0.3)
        assert throttled(rig, idle.container_id) == settled
        for container in containers:
            await container.destroy()


def throttled(rig: Rig, container_id: int) -> int:
    """In how many periods it had to wait."""
    stat = (group_of(rig, container_id, "cpu") / "cpu.stat").read_text()
    return int(dict(line.split() for line in stat.splitlines())["nr_throttled"])
