"""What clients may do to a container beside starting it, and what they are shown."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import trio
from container_machines import containing, invocation
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from supervisor import (
    Conflict,
    ContainerExited,
    ContainerInvoked,
    ContainerSignalled,
    DeadlineExceeded,
    ExitStatus,
    FormatError,
    Invocation,
    PolicyDenied,
    Refusal,
    RuntimeFailed,
    UnknownItem,
)
from supervisor.formats.status import decode_status
from supervisor.invocation_rules import MAX_CAPTURE_BYTES, check_invocation
from supervisor.testing import InMemory, in_memory_plugin, running

DONE = ExitStatus(exit_code=0)

# --- signals ----------------------------------------------------------------------------------


async def test_a_sent_signal_is_told_with_its_sign(tmp_path: Path, autojump_clock: object) -> None:
    async with containing(tmp_path) as machine:
        container_id = await machine.start(signals=[-10, 12])
        machine.process(container_id).is_deaf = True
        for signum in (-10, 12):
            await machine.supervisor.signal(container_id, signum)
        assert machine.process(container_id).signals == [-10, 12]
        await wait_all_tasks_blocked()
        told = [one for one in machine.events if isinstance(one, ContainerSignalled)]
        assert [one.signal for one in told] == [-10, 12]


async def test_a_refused_signal_is_not_told_and_one_after_the_end_is_refused(
    tmp_path: Path,
) -> None:
    async with containing(tmp_path) as machine:
        container_id = await machine.start(signals=[15])
        with pytest.raises(PolicyDenied):
            await machine.supervisor.signal(container_id, 9)
        machine.process(container_id).end(DONE)
        # Before the supervisor has noticed, the runtime refuses; afterwards it does.
        with pytest.raises(Conflict):
            await machine.supervisor.signal(container_id, 15)
        await wait_all_tasks_blocked()
        with pytest.raises(Conflict, match="does not run") as caught:
            await machine.supervisor.signal(container_id, 15)
        assert caught.value.actual == "exited"
        assert "ContainerSignalled" not in machine.told(container_id)


# --- additional entry points ----------------------------------------------------------------------


async def test_an_entry_point_gets_what_was_asked_and_its_end_is_told(tmp_path: Path) -> None:
    async with containing(tmp_path) as machine:
        container_id = await machine.start()
        asked = invocation(
            "Rotate", arguments=("now",), environment=("A=1", "B="), stdin=b"x" * 150
        )
        result = await machine.supervisor.invoke(container_id, asked)
        assert machine.process(container_id).invoked == [asked]
        assert (result.stdout, result.stdout_cut) == (b"x" * 100, True)
        await wait_all_tasks_blocked()
        (told,) = [one for one in machine.events if isinstance(one, ContainerInvoked)]
        assert (told.container_id, told.entry_point) == (container_id, "Rotate")
        assert (told.exit_code, told.signal) == (0, None)


async def test_an_entry_point_that_is_late_is_told_as_killed(
    tmp_path: Path, autojump_clock: object
) -> None:
    async with containing(tmp_path) as machine:
        container_id = await machine.start()
        machine.process(container_id).invocations_hang = True
        with pytest.raises(DeadlineExceeded, match="must end in time"):
            await machine.supervisor.invoke(container_id, invocation(timeout_s=5.0))
        await wait_all_tasks_blocked()
        (told,) = [one for one in machine.events if isinstance(one, ContainerInvoked)]
        assert (told.exit_code, told.signal) == (None, None)


async def test_a_runtime_that_forgets_an_invocations_deadline_is_given_up(
    tmp_path: Path, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with containing(tmp_path) as machine:
        container_id = await machine.start()

        async def forget(invocation: Invocation) -> None:
            await trio.sleep_forever()

        monkeypatch.setattr(machine.process(container_id), "invoke", forget)
        with trio.fail_after(100), pytest.raises(DeadlineExceeded, match="the runtime must end"):
            await machine.supervisor.invoke(container_id, invocation(timeout_s=5.0))


async def test_a_cancelled_invocation_is_told_as_killed(tmp_path: Path) -> None:
    async with containing(tmp_path) as machine:
        container_id = await machine.start()
        machine.process(container_id).invocations_hang = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(machine.supervisor.invoke, container_id, invocation())
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        await wait_all_tasks_blocked()
        assert machine.told(container_id)[-1] == "ContainerInvoked"


async def test_an_invocation_in_a_container_that_ends_is_refused_and_delays_nothing(
    tmp_path: Path,
) -> None:
    async with containing(tmp_path) as machine:
        container_id = await machine.start()
        process = machine.process(container_id)
        process.invocations_hang = True

        async def invoke() -> None:
            with pytest.raises(Conflict, match="has ended"):
                await machine.supervisor.invoke(container_id, invocation())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(invoke)
            await wait_all_tasks_blocked()
            process.end(DONE)
        with pytest.raises(Conflict, match="does not run"):
            await machine.supervisor.invoke(container_id, invocation())
        with pytest.raises(UnknownItem):
            await machine.supervisor.invoke(99, invocation())


@pytest.mark.parametrize("answer", [None, b"bytes"])
async def test_a_runtime_that_answers_an_invocation_wrongly_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: object
) -> None:
    async with containing(tmp_path) as machine:
        container_id = await machine.start()

        async def wrong(invocation: Invocation) -> object:
            return answer

        monkeypatch.setattr(machine.process(container_id), "invoke", wrong)
        with pytest.raises(RuntimeFailed, match="one type"):
            await machine.supervisor.invoke(container_id, invocation())


@pytest.mark.parametrize(
    ("wrong", "refusal", "words"),
    [
        (invocation("run"), PolicyDenied, "begin with A to Z"),
        (invocation("_Run"), PolicyDenied, "begin with A to Z"),
        (invocation("Ärun"), PolicyDenied, "begin with A to Z"),
        (invocation("..", timeout_s=1.0), PolicyDenied, "begin with A to Z"),
        (invocation(""), FormatError, "name of a file"),
        (invocation("A/../../bin/sh"), FormatError, "name of a file"),
        (invocation("A" * 256), FormatError, "name of a file"),
        (invocation("A\0"), FormatError, "NUL"),
        (invocation("A\ud800"), FormatError, "Unicode"),
        (invocation(arguments=("a", "b\0c")), FormatError, r"arguments\[1\]"),
        (invocation(environment=("A=1", "B")), FormatError, r"environment\[1\]"),
        (invocation(environment=("=1",)), FormatError, r"environment\[0\]"),
        (invocation(environment=("A=\0",)), FormatError, r"environment\[0\]"),
        (invocation(timeout_s=0.0), FormatError, "timeout_s"),
        (invocation(timeout_s=math.nan), FormatError, "timeout_s"),
        (invocation(timeout_s=math.inf), FormatError, "timeout_s"),
        (invocation(capture_bytes=-1), FormatError, "capture_bytes"),
        (invocation(capture_bytes=MAX_CAPTURE_BYTES + 1), FormatError, "capture_bytes"),
    ],
)
async def test_a_wrong_invocation_never_reaches_the_runtime(
    tmp_path: Path, wrong: Invocation, refusal: type[Refusal], words: str
) -> None:
    async with containing(tmp_path) as machine:
        container_id = await machine.start()
        with pytest.raises(refusal, match=words):
            await machine.supervisor.invoke(container_id, wrong)
        assert machine.process(container_id).invoked == []
        assert "ContainerInvoked" not in machine.told(container_id)


@given(st.text(max_size=300))
def test_only_names_of_files_that_begin_with_a_to_z_pass(name: str) -> None:
    is_encodable = not any("\ud800" <= letter <= "\udfff" for letter in name)
    right = (
        re.fullmatch(r"[A-Z][^/\0]*", name, re.DOTALL) is not None
        and is_encodable
        and len(name.encode()) <= 255
    )
    if right:
        check_invocation(invocation(name))
    else:
        with pytest.raises((FormatError, PolicyDenied)):
            check_invocation(invocation(name))


# --- output -------------------------------------------------------------------------------------


async def test_the_log_outlives_runs_and_the_container_until_it_is_forgotten(
    tmp_path: Path,
) -> None:
    async with containing(tmp_path, max_remembered=1) as machine:
        container_id = await machine.start(signals=[15], logFDs=[1], maxInstances=0)

        def texts() -> list[bytes]:
            page = machine.supervisor.log_page(container_id, after=0, max_lines=100)
            return [line.text for line in page.lines]

        def is_at_end() -> bool:
            return machine.supervisor.log_page(container_id, after=0, max_lines=100).ended

        machine.process(container_id).log.write(1, b"one\nunfin")
        assert texts() == [b"one"] and not is_at_end()
        await machine.supervisor.restart(container_id, timeout_s=30)
        machine.process(container_id).log.write(1, b"two\n")
        assert texts() == [b"one", b"unfin", b"two"] and not is_at_end()
        machine.process(container_id).end(DONE)
        await wait_all_tasks_blocked()
        assert texts() == [b"one", b"unfin", b"two"] and is_at_end()
        with trio.fail_after(5):
            await machine.supervisor.wait_for_log(container_id, after=3)
        other = await machine.start(maxInstances=0)
        machine.process(other).end(DONE)
        await wait_all_tasks_blocked()
        await machine.start(maxInstances=0)
        with pytest.raises(UnknownItem):
            texts()
        with pytest.raises(UnknownItem):
            await machine.supervisor.wait_for_log(container_id, after=0)


async def test_who_waits_for_a_line_is_woken_by_it(tmp_path: Path) -> None:
    async with containing(tmp_path) as machine:
        container_id = await machine.start(logFDs=[1])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: machine.supervisor.wait_for_log(container_id, after=0))
            await wait_all_tasks_blocked()
            assert len(nursery.child_tasks) == 1
            machine.process(container_id).log.write(1, b"line\n")


# --- what is shown ------------------------------------------------------------------------------


async def test_a_view_shows_the_manifest_and_the_moment_its_state_began(tmp_path: Path) -> None:
    async with containing(tmp_path) as machine:
        container_id = await machine.start(
            entrypoint=["/app", "x"], env=["A=1"], signals=[-15, 9], logFDs=[1, 2]
        )
        view = machine.view(container_id)
        assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", view.since)
        assert (view.argv, view.environment) == (("/app", "x"), ("A=1",))
        assert (view.signals, view.log_fds) == ((-15, 9), (1, 2))
        process = machine.process(container_id)
        assert (view.pid, view.restarts, view.out_of_memory) == (process.pid, 0, False)
        process.end(ExitStatus(signal=9, out_of_memory=True))
        await wait_all_tasks_blocked()
        after = machine.view(container_id)
        assert (after.signal, after.out_of_memory, after.pid) == (9, True, None)
        assert after.since >= view.since
        (told,) = [one for one in machine.events if isinstance(one, ContainerExited)]
        assert (told.signal, told.exit_code, told.out_of_memory) == (9, None, True)


async def test_the_status_carries_the_notes_of_the_runtime(tmp_path: Path) -> None:
    machine = in_memory_plugin(tmp_path)
    assert isinstance(machine.plugin, InMemory)
    machine.plugin.runtime.notes = ("this machine cannot bound memory",)
    async with running([machine], tmp_path) as supervisor:
        assert decode_status(supervisor.status()).notes == ("this machine cannot bound memory",)


async def test_a_status_that_no_verifier_could_read_is_our_fault_and_not_the_askers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with containing(tmp_path) as machine:
        monkeypatch.setattr("supervisor.formats.status.MAX_STATUS_BYTES", 10)
        with pytest.raises(RuntimeFailed, match="status: cannot be written"):
            machine.supervisor.status()
        with pytest.raises(RuntimeFailed, match="status: cannot be written"):
            await machine.supervisor.evidence(bytes(16))


@pytest.mark.parametrize("wrong", ["a sentence", None, (None,)])
async def test_a_runtime_with_wrong_notes_fails_the_start(tmp_path: Path, wrong: object) -> None:
    machine = in_memory_plugin(tmp_path)
    assert isinstance(machine.plugin, InMemory)
    machine.plugin.runtime.notes = wrong  # type: ignore[assignment]  # that is the point
    with pytest.RaisesGroup(
        pytest.RaisesExc(RuntimeFailed, match="one type"), flatten_subgroups=True
    ):
        async with running([machine], tmp_path):
            raise AssertionError("must not be reached")


async def test_memory_is_told_of_what_runs_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    async with containing(tmp_path) as machine:
        first, second = [await machine.start(maxInstances=0) for _ in range(2)]
        assert set(await machine.supervisor.memory_bytes()) == {first, second}
        machine.process(first).end(DONE)
        await wait_all_tasks_blocked()
        assert set(await machine.supervisor.memory_bytes()) == {second}

        async def gossip(_: object) -> dict[int, int]:
            return {first: 1, second: 2, 99: 3}

        monkeypatch.setattr(machine.runtime, "memory_bytes", gossip)
        assert await machine.supervisor.memory_bytes() == {second: 2}

        async def hang(_: object) -> None:
            await trio.sleep_forever()

        monkeypatch.setattr(machine.runtime, "memory_bytes", hang)
        with pytest.raises(DeadlineExceeded):
            await machine.supervisor.memory_bytes()


@pytest.mark.parametrize(("signals", "sent"), [([], 15), ([0, 9], 15), ([10, 9], 10), ([-2], -2)])
async def test_a_stop_sends_the_first_signal_or_sigterm(
    tmp_path: Path, signals: list[int], sent: int
) -> None:
    async with containing(tmp_path) as machine:
        process = machine.process(await machine.start(signals=signals))
    assert process.signals == [sent]


async def test_a_stop_asks_the_latest_first_and_one_that_hangs_keeps_no_other_from_being_asked(
    tmp_path: Path, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    async with containing(tmp_path, stop_timeout_s=60) as machine:
        ids = [await machine.start(maxInstances=0) for _ in range(4)]
        for container_id in ids:
            process = machine.process(container_id)

            async def signal(signum: int, *, whole_group: bool, number: int = container_id) -> None:
                asked.append(number)
                if number == ids[2]:
                    await trio.sleep_forever()
                machine.process(number).end(ExitStatus(signal=signum))

            monkeypatch.setattr(process, "signal", signal)
    assert asked == ids[::-1]
    assert machine.is_empty


async def test_nothing_starts_once_the_supervisor_stops(
    tmp_path: Path, autojump_clock: object
) -> None:
    async with containing(tmp_path) as machine:
        container_id = await machine.start(maxInstances=0)
        image_id = machine.view(container_id).image_id
        machine.process(container_id).is_deaf = True

        async def start_while_stopping() -> None:
            await trio.sleep(5)  # of the ten that the deaf one has
            with pytest.raises(Conflict, match="shutting down"):
                await machine.supervisor.start(image_id, [])

        stopping = machine.supervisor._containers.stop_all
        async with trio.open_nursery() as nursery:
            nursery.start_soon(start_while_stopping)
            await stopping()
    assert machine.runtime.started == 1
