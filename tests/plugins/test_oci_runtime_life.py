"""Containers from birth to death, with a real runtime; and nothing of them afterwards."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import trio
from cancel_sweep import CancelAtStep
from control_group_views import groups_called
from oci_runtime_rig import (
    Held,
    MemoryLog,
    Rig,
    children,
    make_plugin,
    open_fds,
    receipt_for,
    running_rig,
    traces_of,
)

from plugins.oci_runtime import OciRuntime, spawn
from supervisor import ConfigError, Conflict, ExitStatus, RuntimeFailed, StartReceipt

pytestmark = pytest.mark.root


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with running_rig(tmp_path) as rig:
        yield rig
        assert rig.remains() == []


async def ended(container: Held) -> ExitStatus:
    with trio.fail_after(10):
        status = await container.wait()
    await container.destroy()
    return status


async def until_logged(container: Held, word: bytes) -> None:
    with trio.fail_after(10):
        while word not in container.logs():  # noqa: ASYNC110 - another process's doing
            await trio.sleep(0.01)


@pytest.mark.parametrize("code", [0, 1, 42, 255])
async def test_an_exit_code_is_told(rig: Rig, code: int) -> None:
    container = await rig.start(rig.spec("/bin/sh", "-c", f"exit {code}"))
    assert await ended(container) == ExitStatus(exit_code=code)


async def test_a_deadly_signal_is_told(rig: Rig) -> None:
    container = await rig.start(rig.spec("/bin/sleep", "60"))
    await container.signal(signal.SIGKILL, whole_group=False)
    assert await ended(container) == ExitStatus(signal=signal.SIGKILL)


async def test_a_handled_signal_reaches_the_first_process(rig: Rig) -> None:
    script = "trap 'exit 7' TERM; echo ready; while true; do sleep 0.01; done"
    container = await rig.start(rig.spec("/bin/sh", "-c", script))
    await until_logged(container, b"ready")
    await container.signal(signal.SIGTERM, whole_group=False)
    assert await ended(container) == ExitStatus(exit_code=7)


async def test_a_group_signal_reaches_the_children_and_a_plain_one_does_not(rig: Rig) -> None:
    child = "trap 'echo child got it' USR1; echo ready; while true; do sleep 0.01; done"
    script = f'trap "" USR2; trap true USR1; sh -c "{child}" & while true; do wait; done'
    container = await rig.start(rig.spec("/bin/sh", "-c", script))
    await until_logged(container, b"ready")
    await container.signal(signal.SIGUSR1, whole_group=False)
    await trio.sleep(0.2)
    assert b"child got it" not in container.logs()
    await container.signal(signal.SIGUSR1, whole_group=True)
    await until_logged(container, b"child got it")
    await container.destroy()


async def test_signals_after_the_end_are_refused(rig: Rig) -> None:
    container = await rig.start(rig.spec("/bin/true"))
    await container.wait()
    for whole_group in (False, True):
        with pytest.raises(Conflict):
            await container.signal(signal.SIGTERM, whole_group=whole_group)
    await container.destroy()


async def test_a_signal_that_does_not_exist_is_refused(rig: Rig) -> None:
    container = await rig.start(rig.spec("/bin/sleep", "60"))
    with pytest.raises(RuntimeFailed):
        await container.signal(4711, whole_group=False)
    await container.destroy()


async def test_any_number_of_waiters_learn_the_same_end(rig: Rig) -> None:
    container = await rig.start(rig.spec("/bin/sh", "-c", "sleep 0.2; exit 3"))
    statuses: list[ExitStatus] = []

    async def wait() -> None:
        statuses.append(await container.wait())

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(wait)
            with trio.move_on_after(0.05):
                await container.wait()
    await container.destroy()
    statuses.append(await container.wait())
    assert statuses == [ExitStatus(exit_code=3)] * 4


async def test_the_end_is_noticed_at_once(rig: Rig) -> None:
    container = await rig.start(rig.spec("/bin/sleep", "60"))
    noticed: list[float] = []

    async def wait() -> None:
        await container.wait()
        noticed.append(time.perf_counter())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        begun = time.perf_counter()
        os.kill(container.pid, signal.SIGKILL)
    await container.destroy()
    assert noticed[0] - begun < 0.5


async def test_destroy_ends_a_running_container_with_all_its_processes(rig: Rig) -> None:
    script = "(setsid sleep 61 &) ; (sleep 62 &) ; echo ready; exec sleep 63"
    container = await rig.start(rig.spec("/bin/sh", "-c", script))
    await until_logged(container, b"ready")
    namespace = os.readlink(f"/proc/{container.pid}/ns/pid")
    assert len(processes_in(namespace)) == 3
    async with trio.open_nursery() as nursery:
        nursery.start_soon(container.destroy)
        nursery.start_soon(container.destroy)
    await container.destroy()
    assert processes_in(namespace) == []
    assert await container.wait() == ExitStatus(signal=signal.SIGKILL)
    assert rig.remains() == []


async def test_orphans_end_with_the_first_process(rig: Rig) -> None:
    script = "(setsid sleep 61 &) ; echo ready; read -t 1 x < /dev/zero; exit 5"
    container = await rig.start(rig.spec("/bin/sh", "-c", script))
    namespace = os.readlink(f"/proc/{container.pid}/ns/pid")
    with trio.fail_after(10):
        assert await container.wait() == ExitStatus(exit_code=5)
    assert processes_in(namespace) == []
    await container.destroy()


def processes_in(namespace: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # A dead one that its new parent has not reaped yet is no process any more.
                dead = "\nState:\tZ" in (entry / "status").read_text()
                if not dead and os.readlink(entry / "ns" / "pid") == namespace:
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


async def test_a_missing_root_is_refused(rig: Rig) -> None:
    nowhere = rig.folder / "nowhere"
    with pytest.raises(RuntimeFailed) as caught:
        await rig.start(rig.spec("/bin/true", root=nowhere))
    assert caught.value.actual is not None
    assert "No such file" in caught.value.actual
    assert rig.remains() == []


async def test_an_id_that_runs_already_is_refused_and_goes_on_running(rig: Rig) -> None:
    spec = rig.spec("/bin/sleep", "60")
    container = await rig.start(spec)
    with pytest.raises(Conflict):
        await rig.start(spec)
    os.kill(container.pid, 0)
    await container.destroy()


async def test_only_what_was_measured_is_started(rig: Rig) -> None:
    spec = rig.spec("/bin/true")
    other_specs = (
        msgspec.structs.replace(spec, argv=("/bin/false",)),
        msgspec.structs.replace(spec, environment=("PATH=/evil",)),
        msgspec.structs.replace(spec, image_id="sha384/x/y"),
    )
    prepared = await rig.launcher.prepare(spec)
    for other, field in zip(other_specs, ("argv", "environment", "image_id"), strict=True):
        with pytest.raises(RuntimeFailed) as caught:
            await prepared.start(receipt_for(other), MemoryLog())
        assert caught.value.rule.startswith(field)
    await prepared.close()
    with pytest.raises(TypeError):
        StartReceipt("00" * 48, receipt_for(spec).event)


async def test_a_receipt_of_another_type_is_refused(rig: Rig) -> None:
    class Forged:
        digest_sha384 = "00" * 48
        event = receipt_for(rig.spec("/bin/true")).event

    prepared = await rig.launcher.prepare(rig.spec("/bin/true"))
    with pytest.raises(RuntimeFailed):
        await prepared.start(Forged(), MemoryLog())  # type: ignore[arg-type]  # forged
    await prepared.close()


async def test_twenty_containers_start_at_once_and_share_no_user(rig: Rig) -> None:
    texts: list[str] = []

    async def one(number: int) -> None:
        script = f"exec cat /proc/self/uid_map - <<E\n{number}\nE"
        texts.append(await rig.shell(script))

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(one, number)
    assert sorted(int(text.split()[-1]) for text in texts) == list(range(20))
    assert len({text.split()[1] for text in texts}) == 20


# --- output ---------------------------------------------------------------------------------


async def test_only_descriptors_in_log_fds_are_kept(rig: Rig) -> None:
    script = "echo to-stdout; echo to-stderr >&2"
    seen = {}
    for log_fds in ((), (1,), (2,), (1, 2)):
        container = await rig.start(rig.spec("/bin/sh", "-c", script, log_fds=log_fds))
        assert await ended(container) == ExitStatus(exit_code=0)
        seen[log_fds] = set(container.logs().split())
    assert seen == {
        (): set(),
        (1,): {b"to-stdout"},
        (2,): {b"to-stderr"},
        (1, 2): {b"to-stdout", b"to-stderr"},
    }


async def test_the_last_words_before_the_end_are_kept(rig: Rig) -> None:
    script = "i=0; while [ $i -lt 3000 ]; do echo line $i; i=$((i+1)); done; echo last words"
    assert (await rig.shell(script)).endswith("line 2999\nlast words\n")


# --- cancelled, crashed, refused ------------------------------------------------------------


# One that lives on, and one that may be over before anybody knows its pid.
PROGRAMS = pytest.mark.parametrize("argv", [("/bin/sleep", "60"), ("/bin/true",)])


@PROGRAMS
def test_a_start_cancelled_at_any_step_leaves_nothing(
    tmp_path: Path, argv: tuple[str, ...]
) -> None:
    finished_at = None
    for step in range(1, 400):
        instrument = CancelAtStep(step)

        async def one_round(tool: CancelAtStep = instrument) -> bool:
            started = False
            async with running_rig(tmp_path) as rig:
                fds = open_fds()
                spec = rig.spec(*argv)
                with trio.CancelScope() as scope:
                    tool.arm(scope)
                    container = await rig.start(spec)
                    started = True
                    tool.disarm()
                    await container.destroy()
                for listener in rig.sockets.values():
                    listener.close()
                assert rig.remains() == []
                assert open_fds() == fds
            spec.socket_path.unlink()
            return started

        started = trio.run(one_round, instruments=[instrument])
        assert started or instrument.fired
        if not instrument.fired:
            finished_at = step
            break
    assert finished_at is not None
    assert finished_at > 8


@PROGRAMS
async def test_a_start_cancelled_at_any_moment_of_the_runtime_s_work_leaves_nothing(
    rig: Rig, argv: tuple[str, ...]
) -> None:
    # The sweep above cancels between steps of ours; this one while the runtime works.
    started = 0
    fds = None
    for delay_ms in range(0, 80, 2):
        spec = rig.spec(*argv)
        rig.sockets.pop(spec.container_id).close()
        fds = fds or open_fds()
        with trio.move_on_after(delay_ms / 1000):
            container = await rig.start(spec)
            started += 1
            await container.destroy()
        assert rig.remains() == []
        assert open_fds() == fds
    assert started < 40


async def test_a_supervisor_that_stops_leaves_nothing(tmp_path: Path) -> None:
    async with running_rig(tmp_path) as rig:
        instance = rig.instance
        container = await rig.start(rig.spec("/bin/sleep", "60"))
    assert await container.wait() == ExitStatus(signal=signal.SIGKILL)
    assert traces_of(instance, with_gateway=True) == []
    assert groups_called(f"acond-{instance}") == []
    assert children() == []


async def test_what_the_supervisor_was_started_with_is_for_none_of_its_children(
    tmp_path: Path,
) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        os.set_inheritable(fd, True)
        async with running_rig(tmp_path):
            assert not os.get_inheritable(fd)
    finally:
        os.close(fd)


async def test_a_second_supervisor_in_the_same_folder_is_refused(rig: Rig) -> None:
    container = await rig.start(rig.spec("/bin/sleep", "60"))
    with pytest.raises(ExceptionGroup) as caught:
        async with trio.open_nursery() as nursery:
            await nursery.start(make_plugin(rig.folder).lifespan)
    assert caught.group_contains(Conflict)
    os.kill(container.pid, 0)
    await container.destroy()


async def test_containers_are_provided_only_while_the_lifespan_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        await make_plugin(tmp_path).container_runtime()


@pytest.mark.parametrize(
    ("runtime", "reason"),
    [
        ("/nonexistent/runc", "must be executable"),
        ("/bin/false", "must tell its version"),
        ("/bin/true", "was never reached by the runtime"),
    ],
)
async def test_a_runtime_that_does_not_work_is_refused_with_its_reason(
    tmp_path: Path, runtime: str, reason: str
) -> None:
    plugin = make_plugin(tmp_path, OciRuntime.Config(runtime=runtime))
    with pytest.raises(ExceptionGroup) as caught:
        async with trio.open_nursery() as nursery:
            await nursery.start(plugin.lifespan)
    assert caught.group_contains(RuntimeFailed, match="container runtime")
    assert reason in repr(flatten(caught.value)[0].actual)
    assert [name for name in os.listdir(tmp_path) if "acond" in name] == []


def flatten(group: BaseException) -> list[RuntimeFailed]:
    if isinstance(group, BaseExceptionGroup):
        return [one for inner in group.exceptions for one in flatten(inner)]
    assert isinstance(group, RuntimeFailed)
    return [group]


async def test_a_runtime_that_hangs_is_killed_at_its_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spawn, "GRACE_S", 0.01)
    hanging = tmp_path / "hanging"
    hanging.write_text(
        '#!/bin/sh\nif [ "$1" = --version ]; then echo hanging 1.0; exit; fi\nsleep 1000\n'
    )
    hanging.chmod(0o755)
    config = OciRuntime.Config(runtime=str(hanging), start_timeout_s=1)
    with pytest.raises(ExceptionGroup) as caught, trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            await nursery.start(make_plugin(tmp_path, config).lifespan)
    assert "must finish in time" in repr(flatten(caught.value)[0].actual)
    assert children() == []
