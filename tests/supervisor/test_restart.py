"""A restart: the same root, scratch, ids and measurement, a new run, and nothing in between."""

from __future__ import annotations

import itertools
import math
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
from container_machines import Machine, containing
from trio.testing import wait_all_tasks_blocked

from supervisor import (
    Busy,
    Conflict,
    ContainerSignalled,
    ContainerStarted,
    DeadlineExceeded,
    ExitStatus,
    FormatError,
    MeasurementHalted,
    PolicyDenied,
    Refusal,
    RuntimeFailed,
    UnknownItem,
)
from supervisor.formats.status import AttestationData, decode_status
from supervisor.testing import MemoryProcess, MemoryRuntime

DONE = ExitStatus(exit_code=0)


async def gather(*calls: Callable[[], Awaitable[None]]) -> None:
    async with trio.open_nursery() as nursery:
        for call in calls:
            nursery.start_soon(call)


def log_length(machine: Machine) -> int:
    return len(machine.supervisor._measurement.records)


# --- of a running container ------------------------------------------------------------------


@pytest.mark.parametrize("signum", [15, -10])
async def test_a_running_container_is_sent_its_first_signal_and_runs_again(
    tmp_path: Path, signum: int
) -> None:
    async with containing(tmp_path) as machine:
        container_id = await machine.start(signals=[signum, 9])
        old, measured = machine.process(container_id), log_length(machine)
        machine.runtime.prepared[container_id].files["/tmp/note"] = b"kept"
        await machine.supervisor.restart(container_id, timeout_s=30)
        new = machine.process(container_id)
        assert old.signals == [signum] and old.has_ended
        assert new is not old and new.pid != old.pid
        # What it had: root, scratch, ids, receipt, the path of its socket, its log.
        assert new.spec is old.spec and new.receipt is old.receipt and new.log is old.log
        assert machine.runtime.prepared[container_id].files == {"/tmp/note": b"kept"}
        assert new.spec.socket_path.is_socket()
        assert log_length(machine) == measured
        view = machine.view(container_id)
        assert (view.state, view.restarts, view.pid) == ("running", 1, new.pid)
        assert (view.exit_code, view.signal, view.restartable) == (None, None, True)
        await wait_all_tasks_blocked()
        assert machine.told(container_id) == [
            "ContainerStarted",
            "ContainerSignalled",
            "ContainerExited",
            "ContainerStarted",
        ]
        signalled = [one for one in machine.events if isinstance(one, ContainerSignalled)]
        assert [one.signal for one in signalled] == [signum]
        starts = [one for one in machine.events if isinstance(one, ContainerStarted)]
        assert [(one.restarts, one.pid) for one in starts] == [(0, old.pid), (1, new.pid)]
    assert machine.is_empty


@pytest.mark.parametrize("signals", [[], [0, 15]])
async def test_without_a_first_signal_it_waits_for_the_end_and_sends_nothing(
    tmp_path: Path, signals: list[int], autojump_clock: object
) -> None:
    async with containing(tmp_path) as machine:
        container_id = await machine.start(signals=signals)
        old = machine.process(container_id)

        async def end() -> None:
            await trio.sleep(20)
            old.end(DONE)

        await gather(end, lambda: machine.supervisor.restart(container_id, timeout_s=30))
        assert old.signals == []
        assert machine.process(container_id) is not old
        assert "ContainerSignalled" not in machine.told(container_id)


async def test_a_container_that_does_not_end_goes_on_and_is_never_restarted_later(
    tmp_path: Path, autojump_clock: object
) -> None:
    async with containing(tmp_path) as machine:
        container_id = await machine.start(signals=[15])
        process = machine.process(container_id)
        process.is_deaf = True
        with pytest.raises(DeadlineExceeded, match="did not end in time") as caught:
            await machine.supervisor.restart(container_id, timeout_s=7)
        assert caught.value.expected == "within 7 s"
        assert caught.value.actual == "its manifest allows signal 15"
        assert machine.process(container_id) is process and not process.has_ended
        assert machine.view(container_id).state == "running"
        process.end(DONE)
        await wait_all_tasks_blocked()
        assert (machine.view(container_id).state, machine.runtime.running) == ("exited", {})
        # Yet its files are kept like those of any other that ended: another may be asked for.
        await machine.supervisor.restart(container_id, timeout_s=7)
        assert machine.view(container_id).restarts == 1


async def test_a_restart_of_a_running_container_does_not_need_anything_to_be_kept(
    tmp_path: Path,
) -> None:
    async with containing(tmp_path, keep_exited_s=0, max_kept_exited=0) as machine:
        container_id = await machine.start(signals=[15])
        await machine.supervisor.restart(container_id, timeout_s=30)
        assert machine.view(container_id).restarts == 1


async def test_nobody_else_gets_the_place_of_a_container_that_is_being_restarted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with containing(tmp_path) as machine:
        container_id = await machine.start(signals=[15], maxInstances=1)
        image_id = machine.view(container_id).image_id
        refused = 0
        genuine = MemoryRuntime.start

        async def start(self: MemoryRuntime, *args: object) -> object:
            nonlocal refused
            with pytest.raises(Conflict, match="maxInstances"):
                await machine.supervisor.start(image_id, [])
            refused += 1
            return await genuine(self, *args)  # type: ignore[arg-type]  # passed on as they came

        monkeypatch.setattr(MemoryRuntime, "start", start)
        await machine.supervisor.restart(container_id, timeout_s=30)
        assert refused == 1


async def test_a_signal_that_fails_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with containing(tmp_path) as machine:
        container_id = await machine.start(signals=[15])
        process = machine.process(container_id)

        async def fail(signum: int, *, whole_group: bool) -> None:
            raise RuntimeFailed("kernel", "said no")

        monkeypatch.setattr(process, "signal", fail)
        with pytest.raises(RuntimeFailed, match="said no"):
            await machine.supervisor.restart(container_id, timeout_s=30)
        assert machine.process(container_id) is process
        monkeypatch.undo()
        await machine.supervisor.restart(container_id, timeout_s=30)


# --- of one that ended ----------------------------------------------------------------------------


async def test_an_ended_container_runs_again_with_what_it_had(tmp_path: Path) -> None:
    async with containing(tmp_path) as machine:
        container_id = await machine.start()
        old = machine.process(container_id)
        prepared, mounted = dict(machine.runtime.prepared), dict(machine.memory.layers.mounted)
        old.end(ExitStatus(exit_code=3))
        await wait_all_tasks_blocked()
        view = machine.view(container_id)
        assert (view.state, view.exit_code, view.restartable) == ("exited", 3, True)
        # Between the runs nothing of it can be reached.
        assert machine.runtime.running == {}
        assert not old.spec.socket_path.exists()
        await machine.supervisor.restart(container_id, timeout_s=30)
        new = machine.process(container_id)
        assert new.spec is old.spec and new.receipt is old.receipt and old.signals == []
        assert machine.runtime.prepared == prepared
        assert machine.memory.layers.mounted == mounted
        assert machine.view(container_id).state == "running"


async def test_max_instances_hold_for_the_restart_of_an_ended_container(tmp_path: Path) -> None:
    async with containing(tmp_path) as machine:
        first = await machine.start(maxInstances=1)
        machine.process(first).end(DONE)
        await wait_all_tasks_blocked()
        second = await machine.start(maxInstances=1)
        with pytest.raises(Conflict, match="maxInstances"):
            await machine.supervisor.restart(first, timeout_s=30)
        assert machine.view(first).restartable
        machine.process(second).end(DONE)
        await wait_all_tasks_blocked()
        await machine.supervisor.restart(first, timeout_s=30)
        with pytest.raises(Conflict, match="maxInstances"):
            await machine.supervisor.restart(second, timeout_s=30)


async def test_more_containers_than_configured_hold_for_restarts_too(tmp_path: Path) -> None:
    async with containing(tmp_path, max_running=1) as machine:
        first = await machine.start(maxInstances=0)
        machine.process(first).end(DONE)
        await wait_all_tasks_blocked()
        await machine.start(maxInstances=0)
        with pytest.raises(Busy, match=r"containers\.max_running"):
            await machine.supervisor.restart(first, timeout_s=30)


async def test_a_restart_that_is_asked_for_while_the_run_is_cleared_away_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with containing(tmp_path, max_running=2) as machine:
        container_id = await machine.start(maxInstances=0)
        image_id = machine.view(container_id).image_id
        old, go_on = machine.process(container_id), trio.Event()
        genuine = old.destroy

        async def slowly() -> None:
            await go_on.wait()
            await genuine()

        monkeypatch.setattr(old, "destroy", slowly)
        old.end(DONE)
        await wait_all_tasks_blocked()
        assert machine.view(container_id).state == "exited"

        async def release() -> None:
            await wait_all_tasks_blocked()
            assert machine.runtime.started == 1
            go_on.set()

        await gather(release, lambda: machine.supervisor.restart(container_id, timeout_s=30))
        assert machine.process(container_id) is not old
        # It takes one place, not also that of the run before.
        await machine.supervisor.start(image_id, [])
        with pytest.raises(Busy):
            await machine.supervisor.start(image_id, [])


async def test_restarts_are_counted_and_ids_stay(tmp_path: Path) -> None:
    async with containing(tmp_path) as machine:
        container_id = await machine.start(signals=[15])
        ids = machine.process(container_id).spec.id_map
        for count in range(1, 6):
            await machine.supervisor.restart(container_id, timeout_s=30)
            assert machine.view(container_id).restarts == count
            assert machine.process(container_id).spec.id_map == ids
        (status,) = decode_status(machine.supervisor.status()).containers
        assert (status.restarts, status.state) == (5, "running")


async def test_what_a_run_said_of_itself_is_forgotten_at_its_end(tmp_path: Path) -> None:
    said = AttestationData(kind="text", data="aGVsbG8=")
    async with containing(tmp_path) as machine:
        container_id = await machine.start(signals=[15])
        container = machine.supervisor._containers.require(container_id)

        def shown() -> AttestationData | None:
            (status,) = decode_status(machine.supervisor.status()).containers
            return status.attestation_data

        container.attestation_data = said
        assert shown() == said
        await machine.supervisor.restart(container_id, timeout_s=30)
        assert shown() is None
        container.attestation_data = said
        machine.process(container_id).end(DONE)
        await wait_all_tasks_blocked()
        assert shown() is None and container.attestation_data is None


# --- refused ----------------------------------------------------------------------------------


async def test_what_may_not_be_restarted_says_why_and_goes_on(tmp_path: Path) -> None:
    async with containing(tmp_path) as machine:
        forbidden = await machine.start(noRestart=True, signals=[15])
        process = machine.process(forbidden)
        assert not machine.view(forbidden).restartable
        with pytest.raises(PolicyDenied, match="noRestart"):
            await machine.supervisor.restart(forbidden, timeout_s=30)
        with pytest.raises(UnknownItem, match="no such container"):
            await machine.supervisor.restart(99, timeout_s=30)
        for wrong in (0, -1, math.nan, math.inf, 1e9):
            with pytest.raises(FormatError, match="timeout_s"):
                await machine.supervisor.restart(forbidden, timeout_s=wrong)
        assert process.signals == []


async def test_a_halted_supervisor_restarts_nothing(tmp_path: Path) -> None:
    async with containing(tmp_path) as machine:
        container_id = await machine.start(signals=[15])
        machine.supervisor._measurement.halt("doubt")
        with pytest.raises(MeasurementHalted):
            await machine.supervisor.restart(container_id, timeout_s=30)
        assert machine.process(container_id).signals == []
        machine.process(container_id).end(DONE)
        await wait_all_tasks_blocked()
        with pytest.raises(MeasurementHalted):
            await machine.supervisor.restart(container_id, timeout_s=30)


async def test_measurement_that_halts_while_the_old_run_ends_keeps_the_new_one_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with containing(tmp_path) as machine:
        container_id = await machine.start(signals=[15])
        process = machine.process(container_id)
        genuine = process.destroy

        async def halting() -> None:
            machine.supervisor._measurement.halt("doubt")
            await genuine()

        monkeypatch.setattr(process, "destroy", halting)
        with pytest.raises(MeasurementHalted):
            await machine.supervisor.restart(container_id, timeout_s=30)
        assert machine.runtime.started == 1
        assert machine.is_empty


async def test_two_restarts_at_once_are_one(tmp_path: Path) -> None:
    async with containing(tmp_path) as machine:
        container_id = await machine.start(signals=[15])
        refused = []

        async def restart() -> None:
            try:
                await machine.supervisor.restart(container_id, timeout_s=30)
            except Conflict as error:
                refused.append(error.rule)

        await gather(restart, restart, restart)
        assert refused == ["is being restarted already"] * 2
        assert machine.view(container_id).restarts == 1
        machine.process(container_id).end(DONE)
        await wait_all_tasks_blocked()
        refused.clear()
        await gather(restart, restart)
        assert refused == ["is being restarted already"]
        assert machine.view(container_id).restarts == 2


# --- failed and given up ------------------------------------------------------------------------


@pytest.mark.parametrize("ended_before", [True, False])
@pytest.mark.parametrize("how", ["refuses", "raises", "hangs", "answers wrongly"])
async def test_a_restart_that_fails_leaves_a_container_that_ended_and_is_freed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: object,
    ended_before: bool,
    how: str,
) -> None:
    async def fail(*_: object) -> object:
        if how == "refuses":
            raise RuntimeFailed("runc", "said no")
        if how == "raises":
            raise KeyError("a bug of the runtime")
        if how == "hangs":
            await trio.sleep_forever()
        return None

    # The TD's clock, on which a second passes whenever it is looked at.
    seconds = itertools.count(1_900_000_000)
    monkeypatch.setattr("supervisor.container.time.time_ns", lambda: next(seconds) * 10**9)
    async with containing(tmp_path, start_timeout_s=5) as machine:
        container_id = await machine.start(signals=[15], maxInstances=1)
        image_id = machine.view(container_id).image_id
        if ended_before:
            machine.process(container_id).end(ExitStatus(signal=15))
            await wait_all_tasks_blocked()
        before = machine.view(container_id)
        monkeypatch.setattr(machine.runtime, "start", fail)
        expected = DeadlineExceeded if how == "hangs" else RuntimeFailed
        with pytest.raises(expected):
            await machine.supervisor.restart(container_id, timeout_s=30)
        assert machine.is_empty
        view = machine.view(container_id)
        assert (view.state, view.signal, view.restartable) == ("exited", 15, False)
        assert view.restarts == 0
        if ended_before:
            assert view.since == before.since  # it has not run since
        with pytest.raises(Conflict, match="not kept any more"):
            await machine.supervisor.restart(container_id, timeout_s=30)
        monkeypatch.undo()
        await machine.supervisor.start(image_id, [])  # its place is free


@pytest.mark.parametrize("ended_before", [True, False])
async def test_a_restart_given_up_while_the_new_run_starts_frees_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: object, ended_before: bool
) -> None:
    async with containing(tmp_path) as machine:
        container_id = await machine.start(signals=[15])
        if ended_before:
            machine.process(container_id).end(DONE)
            await wait_all_tasks_blocked()

        async def hang(*_: object) -> object:
            await trio.sleep_forever()
            return None

        monkeypatch.setattr(machine.runtime, "start", hang)
        before = trio.current_time()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: machine.supervisor.restart(container_id, timeout_s=30))
                await wait_all_tasks_blocked()
                view = machine.view(container_id)
                assert (view.state, view.exit_code, view.signal) == ("starting", None, None)
                (status,) = decode_status(machine.supervisor.status()).containers
                assert (status.state, status.exit_code, status.signal) == ("starting", None, None)
                scope.cancel()
        assert machine.view(container_id).state == "exited"
        assert machine.is_empty
        assert trio.current_time() - before < 1  # nobody waited for the start's own deadline


async def test_a_run_that_starts_although_its_restart_was_given_up_is_ended_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with containing(tmp_path) as machine:
        container_id = await machine.start(signals=[15])
        genuine, go_on = machine.runtime.start, trio.Event()

        async def start(*args: object) -> object:
            with trio.CancelScope(shield=True):
                await go_on.wait()
                return await genuine(*args)  # type: ignore[arg-type]  # passed on as they came
            raise AssertionError("unreachable")

        monkeypatch.setattr(machine.runtime, "start", start)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: machine.supervisor.restart(container_id, timeout_s=30))
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
            go_on.set()
        assert machine.runtime.started == 2
        assert machine.is_empty
        assert machine.view(container_id).restarts == 0
        await wait_all_tasks_blocked()
        assert machine.told(container_id).count("ContainerStarted") == 1


async def test_a_restart_given_up_while_the_old_run_goes_on_changes_nothing(
    tmp_path: Path,
) -> None:
    async with containing(tmp_path) as machine:
        container_id = await machine.start()
        process = machine.process(container_id)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: machine.supervisor.restart(container_id, timeout_s=30))
                await wait_all_tasks_blocked()
                scope.cancel()
        assert machine.process(container_id) is process
        process.end(DONE)
        await wait_all_tasks_blocked()
        assert machine.runtime.started == 1
        assert machine.view(container_id).restartable


async def test_what_was_killed_cannot_be_restarted_while_it_is_cleared_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with containing(tmp_path) as machine:
        lost, go_on = trio.Event(), trio.Event()

        async def lose() -> ExitStatus:
            await lost.wait()
            raise KeyError("status")

        monkeypatch.setattr("supervisor.testing.MemoryProcess.wait", lambda self: lose())
        container_id = await machine.start()
        prepared = machine.runtime.prepared[container_id]
        genuine = prepared.close

        async def slowly() -> None:
            await go_on.wait()
            await genuine()

        monkeypatch.setattr(prepared, "close", slowly)
        lost.set()
        await wait_all_tasks_blocked()
        assert (machine.view(container_id).signal, machine.runtime.running) == (9, {})
        with pytest.raises(Conflict, match="not kept any more"):
            await machine.supervisor.restart(container_id, timeout_s=30)
        go_on.set()
        await wait_all_tasks_blocked()
        assert machine.is_empty


async def test_a_run_whose_end_is_lost_fails_the_restart_that_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with containing(tmp_path) as machine:
        failing = trio.Event()

        async def lose() -> ExitStatus:
            await failing.wait()
            raise KeyError("status")

        monkeypatch.setattr("supervisor.testing.MemoryProcess.wait", lambda self: lose())
        container_id = await machine.start()

        async def fail() -> None:
            await wait_all_tasks_blocked()
            failing.set()

        async def restart() -> None:
            with pytest.raises(RuntimeFailed, match="the runtime's wait failed"):
                await machine.supervisor.restart(container_id, timeout_s=30)

        await gather(fail, restart)
        assert machine.view(container_id).signal == 9
        assert machine.is_empty


# --- races ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rest_s", [-0.001, 0, 0.001])
async def test_an_end_in_the_moment_of_the_deadline_is_either_restarted_or_not(
    tmp_path: Path, autojump_clock: object, rest_s: float
) -> None:
    async with containing(tmp_path) as machine:
        container_id = await machine.start()
        process = machine.process(container_id)
        outcome: list[Refusal | None] = []

        async def end() -> None:
            await trio.sleep(10 + rest_s)
            process.end(DONE)

        async def restart() -> None:
            try:
                await machine.supervisor.restart(container_id, timeout_s=10)
            except DeadlineExceeded as error:
                outcome.append(error)
            else:
                outcome.append(None)

        await gather(end, restart)
        await wait_all_tasks_blocked()
        view = machine.view(container_id)
        if outcome == [None]:
            assert (view.state, view.restarts) == ("running", 1)
        else:
            assert (view.state, view.restarts) == ("exited", 0)
        assert machine.runtime.started == 1 + view.restarts
        if rest_s:
            assert (outcome == [None]) == (rest_s < 0)


async def test_what_has_ended_when_the_deadline_is_looked_at_is_restarted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    async with containing(tmp_path) as machine:
        container_id = await machine.start(signals=[15])
        process = machine.process(container_id)

        async def slow_signal(signum: int, *, whole_group: bool) -> None:
            process.end(DONE)
            with trio.CancelScope(shield=True):
                await trio.sleep(20)

        monkeypatch.setattr(process, "signal", slow_signal)
        await machine.supervisor.restart(container_id, timeout_s=10)
        assert (machine.view(container_id).state, machine.runtime.started) == ("running", 2)


async def test_who_is_cancelled_already_asks_for_nothing(tmp_path: Path) -> None:
    async with containing(tmp_path) as machine:
        container_id = await machine.start(signals=[15])
        with trio.CancelScope() as scope:
            scope.cancel()
            await machine.supervisor.restart(container_id, timeout_s=10)
        await wait_all_tasks_blocked()
        assert machine.process(container_id).signals == []
        machine.process(container_id).end(DONE)
        await wait_all_tasks_blocked()
        with trio.CancelScope() as scope:
            scope.cancel()
            await machine.supervisor.restart(container_id, timeout_s=10)
        await wait_all_tasks_blocked()
        assert machine.view(container_id).restartable


async def end_after(process: MemoryProcess, steps: int) -> None:
    for _ in range(steps):
        await trio.lowlevel.checkpoint()
    process.end(DONE)


async def test_a_restart_in_the_moment_of_the_exit_starts_one_new_run(tmp_path: Path) -> None:
    async with containing(tmp_path) as machine:
        for delay in range(12):
            container_id = await machine.start(name=f"app-{delay}:1", signals=[15])
            process = machine.process(container_id)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(end_after, process, delay)
                await machine.supervisor.restart(container_id, timeout_s=30)
            view = machine.view(container_id)
            assert (view.state, view.restarts) == ("running", 1)
            assert machine.process(container_id) is not process


async def test_a_restart_while_stopping_is_refused_and_starts_nothing(
    tmp_path: Path, autojump_clock: object
) -> None:
    rules: list[str] = []

    async def restart(machine: Machine, container_id: int) -> None:
        try:
            await machine.supervisor.restart(container_id, timeout_s=3600)
        except Conflict as error:
            rules.append(error.rule)

    async with trio.open_nursery() as nursery:
        async with containing(tmp_path, stop_timeout_s=5) as machine:
            waiting = await machine.start(name="waiting:1")
            starting = await machine.start(name="starting:1")
            machine.process(waiting).is_deaf = True
            nursery.start_soon(restart, machine, waiting)

            async def hang(*_: object) -> object:
                await trio.sleep_forever()
                return None

            machine.process(starting).end(DONE)
            await wait_all_tasks_blocked()
            machine.runtime.start = hang  # type: ignore[method-assign,assignment]  # for the rest of it
            nursery.start_soon(restart, machine, starting)
            await wait_all_tasks_blocked()
            assert rules == []
        await restart(machine, waiting)
    assert rules == ["the supervisor is shutting down"] * 3
    assert machine.runtime.started == 2
    assert machine.is_empty
