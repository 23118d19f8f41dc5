"""With ordinary processes, in the namespace of the tests: no runtime, no root."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import trio
from oci_runtime_rig import children

from plugins.oci_runtime.strays import Strays


class Processes:
    """Starts processes that only their creator knows of, and ends those that are left."""

    def __init__(self) -> None:
        self.pids: list[int] = []

    def start(self) -> int:
        pid = os.posix_spawn("/bin/sleep", ["sleep", "777"], {})
        self.pids.append(pid)
        return pid

    def kill(self, pid: int, *, reap: bool) -> None:
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | (0 if reap else os.WNOWAIT))

    def alive(self) -> list[int]:
        """Children of ours still, be it dead ones."""
        return [pid for pid in self.pids if str(pid) in children()]


@pytest.fixture
def processes() -> Iterator[Processes]:
    made = Processes()
    yield made
    for pid in made.alive():
        made.kill(pid, reap=True)


@pytest.fixture
def strays() -> Strays:
    found = Strays(os.getpid())
    found.owned.update(map(int, children()))
    return found


class StartFailed(Exception):
    pass


async def test_what_a_failed_start_left_is_ended_and_nothing_else(
    processes: Processes, strays: Strays
) -> None:
    owned = processes.start()
    strays.owned.add(owned)
    with pytest.raises(StartFailed):
        async with strays.start():
            processes.start()
            processes.start()
            raise StartFailed
    assert processes.alive() == [owned]


async def test_a_dead_stray_is_reaped(processes: Processes, strays: Strays) -> None:
    stray = processes.start()
    processes.kill(stray, reap=False)
    assert processes.alive() == [stray]
    with pytest.raises(StartFailed):
        async with strays.start():
            raise StartFailed
    assert processes.alive() == []


async def test_after_starts_that_went_well_nobody_is_looked_for(
    processes: Processes, strays: Strays
) -> None:
    async with strays.start():
        pid = processes.start()
    assert processes.alive() == [pid]


async def test_a_cancelled_start_is_a_failed_one(processes: Processes, strays: Strays) -> None:
    with trio.CancelScope() as scope:
        async with strays.start():
            processes.start()
            scope.cancel()
            await trio.sleep_forever()
    assert processes.alive() == []


async def test_while_another_start_is_under_way_nobody_is_looked_for(
    processes: Processes, strays: Strays
) -> None:
    async with strays.start():
        with pytest.raises(StartFailed):
            async with strays.start():
                stray = processes.start()
                raise StartFailed
        handed_over = processes.start()
        assert processes.alive() == [stray, handed_over]
        strays.owned.add(handed_over)
    assert processes.alive() == [handed_over]


async def test_without_a_first_process_there_is_nobody_to_look_for(processes: Processes) -> None:
    gone = processes.start()
    processes.kill(gone, reap=True)
    other = processes.start()
    with pytest.raises(StartFailed):
        async with Strays(gone).start():
            raise StartFailed
    assert processes.alive() == [other]
