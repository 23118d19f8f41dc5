"""What an ended container had is kept for a restart: invisibly, for a while, not too much."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from container_machines import Machine, containing
from trio.testing import wait_all_tasks_blocked

from supervisor import Conflict, ExitStatus, UnknownItem

DONE = ExitStatus(exit_code=0)


async def ended(machine: Machine, **fields: object) -> int:
    container_id = await machine.start(**{"maxInstances": 0, **fields})
    machine.process(container_id).end(DONE)
    await wait_all_tasks_blocked()
    return container_id


def restartable(machine: Machine) -> list[int]:
    return [one.container_id for one in machine.supervisor.containers() if one.restartable]


async def test_it_is_kept_for_as_long_as_configured_and_then_freed(
    tmp_path: Path, autojump_clock: object
) -> None:
    async with containing(tmp_path, keep_exited_s=50) as machine:
        container_id = await ended(machine)
        await trio.sleep(49)
        assert machine.view(container_id).restartable and not machine.is_empty
        await trio.sleep(2)
        assert not machine.view(container_id).restartable and machine.is_empty
        with pytest.raises(Conflict, match="not kept any more"):
            await machine.supervisor.restart(container_id, timeout_s=30)
        # What is known of it stays.
        assert machine.view(container_id).exit_code == 0


async def test_the_time_counts_from_the_last_end(tmp_path: Path, autojump_clock: object) -> None:
    async with containing(tmp_path, keep_exited_s=50) as machine:
        container_id = await ended(machine)
        await trio.sleep(49)
        await machine.supervisor.restart(container_id, timeout_s=30)
        await trio.sleep(100)
        assert machine.view(container_id).state == "running"
        machine.process(container_id).end(DONE)
        await trio.sleep(49)
        assert machine.view(container_id).restartable
        await trio.sleep(2)
        assert machine.is_empty


async def test_clearing_a_run_away_prolongs_nothing(
    tmp_path: Path, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with containing(tmp_path, keep_exited_s=30) as machine:
        container_id = await machine.start()
        process = machine.process(container_id)
        genuine = process.destroy

        async def destroy() -> None:
            await trio.sleep(20)
            await genuine()

        monkeypatch.setattr(process, "destroy", destroy)
        process.end(DONE)
        await trio.sleep(29)
        assert machine.view(container_id).restartable
        await trio.sleep(2)
        assert machine.is_empty


@pytest.mark.parametrize(
    "settings", [{"keep_exited_s": 0}, {"max_kept_exited": 0}], ids=["no time", "no room"]
)
async def test_nothing_is_kept_where_the_configuration_says_so(
    tmp_path: Path, settings: dict[str, int]
) -> None:
    async with containing(tmp_path, **settings) as machine:
        container_id = await ended(machine)
        assert machine.is_empty
        assert not machine.view(container_id).restartable


async def test_nothing_is_kept_of_what_may_never_be_restarted(tmp_path: Path) -> None:
    async with containing(tmp_path, max_kept_exited=1) as machine:
        kept = await ended(machine)
        await ended(machine, name="once:1", noRestart=True)
        assert set(machine.runtime.prepared) == {kept}
        assert restartable(machine) == [kept]


async def test_one_too_many_costs_the_one_that_ended_first_its_files(tmp_path: Path) -> None:
    async with containing(tmp_path, max_kept_exited=2) as machine:
        first, second, third = [await machine.start(maxInstances=0) for _ in range(3)]
        for container_id in (second, first, third):
            machine.process(container_id).end(DONE)
            await wait_all_tasks_blocked()
        assert restartable(machine) == [first, third]
        assert set(machine.runtime.prepared) == set(machine.memory.layers.mounted) == {first, third}
        # One that runs again makes room.
        await machine.supervisor.restart(first, timeout_s=30)
        fourth = await ended(machine)
        assert restartable(machine) == [first, third, fourth]


async def test_a_kept_container_counts_neither_as_instance_nor_as_running(tmp_path: Path) -> None:
    async with containing(tmp_path, max_running=1) as machine:
        for _ in range(3):
            await ended(machine, maxInstances=1)
        assert len(restartable(machine)) == 3


async def test_an_instance_is_given_back_when_its_end_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever sees that it ended may start another, however long the old one's remains take."""
    async with containing(tmp_path) as machine:
        container_id = await machine.start(maxInstances=1)
        image_id = machine.view(container_id).image_id
        process, go_on = machine.process(container_id), trio.Event()
        genuine = process.destroy

        async def slowly() -> None:
            await go_on.wait()
            await genuine()

        monkeypatch.setattr(process, "destroy", slowly)
        process.end(DONE)
        await wait_all_tasks_blocked()
        assert machine.view(container_id).state == "exited"
        await machine.supervisor.start(image_id, [])
        with pytest.raises(Conflict, match="maxInstances"):
            await machine.supervisor.start(image_id, [])
        go_on.set()


async def test_a_stop_frees_what_is_kept_and_keeps_nothing_more(
    tmp_path: Path, autojump_clock: object
) -> None:
    async with containing(tmp_path, keep_exited_s=3600, stop_timeout_s=10) as machine:
        await ended(machine)
        deaf, polite = [await machine.start(maxInstances=0) for _ in range(2)]
        machine.process(deaf).is_deaf = True
        before = trio.current_time()
    assert trio.current_time() - before == pytest.approx(10, abs=0.5)  # for the deaf one alone
    assert machine.is_empty
    assert [machine.view(one).signal for one in (deaf, polite)] == [9, 15]
    assert restartable(machine) == []


async def test_a_stop_with_only_kept_containers_does_not_wait(
    tmp_path: Path, autojump_clock: object
) -> None:
    async with containing(tmp_path, keep_exited_s=3600, stop_timeout_s=10) as machine:
        await ended(machine)
        before = trio.current_time()
    assert trio.current_time() - before < 1
    assert machine.is_empty


async def test_a_container_that_is_forgotten_gives_up_its_files(tmp_path: Path) -> None:
    async with containing(tmp_path, max_remembered=1) as machine:
        first, second = await ended(machine), await ended(machine)
        third = await machine.start(maxInstances=0)
        await wait_all_tasks_blocked()
        assert [one.container_id for one in machine.supervisor.containers()] == [second, third]
        assert set(machine.runtime.prepared) == {second, third}
        with pytest.raises(UnknownItem):
            await machine.supervisor.restart(first, timeout_s=30)


async def test_one_that_is_being_restarted_is_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with containing(tmp_path, max_remembered=1) as machine:
        container_id = await machine.start(maxInstances=0)
        image_id = machine.view(container_id).image_id
        process, go_on = machine.process(container_id), trio.Event()
        genuine = process.destroy

        async def slowly() -> None:
            await go_on.wait()
            await genuine()

        monkeypatch.setattr(process, "destroy", slowly)
        async with trio.open_nursery() as nursery:
            process.end(DONE)
            await wait_all_tasks_blocked()
            nursery.start_soon(lambda: machine.supervisor.restart(container_id, timeout_s=30))
            await wait_all_tasks_blocked()
            for _ in range(2):
                await ended(machine)
            await machine.supervisor.start(image_id, [])
            go_on.set()
        assert machine.view(container_id).state == "running"
