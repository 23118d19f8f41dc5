"""Commands beside a container's program, seen from inside a container of the real runtime."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import pytest
import trio
import trio.testing
from cancel_sweep import CancelAtStep
from oci_runtime_rig import Held, Rig, children, open_fds, running_rig

from plugins.oci_runtime import OciRuntime, spawn
from plugins.oci_runtime.exchange import exchange_pace
from plugins.oci_runtime.invocation import Invocations
from plugins.oci_runtime.runtime import OciCommand
from supervisor import (
    Busy,
    Conflict,
    DeadlineExceeded,
    ExitStatus,
    Invocation,
    InvocationResult,
    RuntimeFailed,
    UnknownItem,
)

pytestmark = pytest.mark.root

# Takes over orphans, as a container's first process should.
IDLE = ("/bin/sh", "-c", "while :; do sleep 1000 & wait; done")
MAX_AT_ONCE = 3
TIMEOUT_S = 30
# What is not one process's own business.
CONFINEMENT = (
    *("Umask", "Uid", "Gid", "Groups", "NoNewPrivs", "Seccomp", "Seccomp_filters"),
    *("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "SigBlk", "SigIgn", "Cpus_allowed"),
)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    config = OciRuntime.Config(max_invocations=MAX_AT_ONCE)
    async with running_rig(tmp_path, config) as rig:
        add_entry_points(rig.rootfs)
        yield rig
        assert rig.remains() == []


def add_entry_points(rootfs: Path) -> None:
    folder = rootfs / "lib/acon/entrypoint.d"
    folder.mkdir(parents=True)
    for above in (folder, *folder.parents[:2]):
        above.chmod(0o755)
    for name, text, mode in (
        ("Run", '#!/bin/sh\nexec "$@"\n', 0o755),
        ("Plain", "neither ELF nor a script", 0o644),
        ("Text", "neither ELF nor a script", 0o755),
        ("Lost", "#!/bin/missing\n", 0o755),
    ):
        (folder / name).write_text(text)
        (folder / name).chmod(mode)
    # busybox goes by the name that it is called; which names may be asked for is not judged here.
    (folder / "cat").symlink_to("/bin/busybox")


@asynccontextmanager
async def idle(rig: Rig, *argv: str, uids: tuple[int, ...] = ()) -> AsyncIterator[Held]:
    container = await rig.start(rig.spec(*(argv or IDLE), uids=uids))
    try:
        with trio.fail_after(TIMEOUT_S):
            yield container
    finally:
        await container.destroy()


def call(
    *argv: str,
    entry_point: str = "Run",
    environment: tuple[str, ...] = ("PATH=/bin",),
    stdin: bytes = b"",
    capture_bytes: int = 64 * 1024,
    timeout_s: float = 20,
) -> Invocation:
    return Invocation(
        entry_point=entry_point,
        arguments=argv,
        environment=environment,
        stdin=stdin,
        capture_bytes=capture_bytes,
        timeout_s=timeout_s,
    )


async def until(holds: Callable[[], bool]) -> None:
    """For what only the kernel or another process brings about; the caller has a deadline."""
    while not holds():  # noqa: ASYNC110
        await trio.sleep(0.002)


async def shell(container: Held, script: str, *, stdin: bytes = b"") -> str:
    """What a script printed that ended with exit code 0."""
    result = await container.run.invoke(call("/bin/sh", "-c", script, stdin=stdin))
    assert result.status == ExitStatus(exit_code=0), result
    return result.stdout.decode()


def command_line(pid: str) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().replace("\0", " ").strip()


def members(container: Held) -> list[str]:
    """The command lines in a container's pid namespace, but for the first process's own."""
    namespace = os.readlink(f"/proc/{container.pid}/ns/pid")
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.readlink(folder / "ns/pid") == namespace:
                found.append(command_line(folder.name))
    return sorted(set(found) - {" ".join(IDLE), "sleep 1000"})


async def test_a_command_gets_exactly_its_arguments_environment_and_input(rig: Rig) -> None:
    async with idle(rig) as container:
        arguments = ("two words", "", "ü", "$HOME")
        result = await container.run.invoke(call("/bin/printf", "%s|", *arguments, environment=()))
        assert result.stdout.decode() == "".join(f"{word}|" for word in arguments)
        environment = ("ONE=1", "HOME=/x", "NO_EQUALS_SIGN", "EMPTY=")
        result = await container.run.invoke(
            call("/proc/self/environ", entry_point="cat", environment=environment)
        )
        assert result.stdout.decode().split("\0")[:-1] == list(environment)
        result = await container.run.invoke(
            call("/proc/self/environ", entry_point="cat", environment=())
        )
        assert result.stdout == b""
        assert await shell(container, "cat", stdin=b"said\0this") == "said\0this"


async def test_outputs_and_exit_code_are_told_apart(rig: Rig) -> None:
    async with idle(rig) as container:
        script = "echo out; echo err >&2; exit 42"
        assert await container.run.invoke(call("/bin/sh", "-c", script)) == InvocationResult(
            status=ExitStatus(exit_code=42),
            stdout=b"out\n",
            stderr=b"err\n",
            stdout_cut=False,
            stderr_cut=False,
        )
        result = await container.run.invoke(call("/bin/sh", "-c", "kill -USR1 $$"))
        assert result.status == ExitStatus(signal=signal.SIGUSR1)
        assert container.logs() == b""


@pytest.mark.parametrize("uids", [(), (1000,)])
async def test_a_command_is_confined_exactly_as_the_first_process_is(
    rig: Rig, uids: tuple[int, ...]
) -> None:
    # Not a shell, which would have signal settings of its own.
    async with idle(rig, "/bin/sleep", "1000", uids=uids) as container:

        async def both(path: str, tool: str = "cat") -> tuple[str, str]:
            texts = []
            for who in ("self", "1"):
                result = await container.run.invoke(call(f"/bin/{tool}", f"/proc/{who}/{path}"))
                assert result.status == ExitStatus(exit_code=0), result
                texts.append(result.stdout.decode())
            return texts[0], texts[1]

        statuses = []
        for text in await both("status"):
            fields = dict(line.split(":", 1) for line in text.splitlines())
            statuses.append({name: fields[name].split() for name in CONFINEMENT})
        own, first = statuses
        assert own == first
        assert own["NoNewPrivs"] == ["0" if uids else "1"]
        assert own["Seccomp"] == ["2"]
        assert own["Umask"] == ["0077"]
        for path in ("cgroup", "limits", "oom_score_adj", "uid_map", "gid_map", "mountinfo"):
            own_text, first_text = await both(path)
            assert own_text == first_text, path
            assert own_text, path
        for name in ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"):
            own_text, first_text = await both(f"ns/{name}", "readlink")
            assert own_text == first_text, name


async def test_a_command_is_in_every_control_group_of_its_container(rig: Rig) -> None:
    # As the machine sees it: inside, every group is "/".
    async with idle(rig) as container, trio.open_nursery() as nursery:
        nursery.start_soon(container.run.invoke, call("/bin/sleep", "777"))

        def given_over() -> list[str]:
            others = [child for child in children() if child != str(container.pid)]
            return [child for child in others if command_line(child) == "/bin/sleep 777"]

        await until(lambda: given_over() != [])
        (pid,) = given_over()
        own = Path(f"/proc/{pid}/cgroup").read_text()
        assert own == Path(f"/proc/{container.pid}/cgroup").read_text()
        assert rig.instance in own
        assert Path(f"/proc/{pid}/stat").read_text().split()[4:6] == [pid, pid]
        nursery.cancel_scope.cancel()


async def test_what_the_seccomp_profile_denies_is_denied_to_a_command_too(rig: Rig) -> None:
    async with idle(rig) as container:
        for words in (("unshare", "-U", "true"), ("mount", "-t", "tmpfs", "none", "/tmp")):
            result = await container.run.invoke(call(*(f"/bin/{words[0]}", *words[1:])))
            assert result.status.exit_code != 0
            assert b"not permitted" in result.stderr or b"permission denied" in result.stderr


async def test_a_command_starts_in_the_root_folder_with_three_descriptors(rig: Rig) -> None:
    async with idle(rig) as container:
        assert await shell(container, "pwd") == "/\n"
        result = await container.run.invoke(call("/bin/ls", "/proc/1/fd", "/proc/self/fd"))
        # `ls` holds the folder that it lists as 3.
        assert result.stdout.split() == [
            *(b"/proc/1/fd:", b"0", b"1", b"2"),
            *(b"/proc/self/fd:", b"0", b"1", b"2", b"3"),
        ]


async def test_a_file_that_a_command_makes_is_its_own(rig: Rig) -> None:
    async with idle(rig) as container:
        assert await shell(container, "touch /tmp/x; stat -c %a:%u /tmp/x") == "600:0\n"


async def test_a_command_may_open_its_descriptors_anew(rig: Rig) -> None:
    async with idle(rig) as container:
        script = "echo out > /dev/stdout; cat < /dev/stdin; echo err > /dev/stderr"
        result = await container.run.invoke(call("/bin/sh", "-c", script, stdin=b"in\n"))
        assert (result.stdout, result.stderr) == (b"out\nin\n", b"err\n")


async def test_input_that_nobody_reads_and_output_without_end_stop_nothing(rig: Rig) -> None:
    much = os.urandom(10_000_000)
    async with idle(rig) as container:
        for script in ("exit 0", "exec <&-; sleep 0.2", "head -c 10 > /dev/null"):
            result = await container.run.invoke(call("/bin/sh", "-c", script, stdin=much))
            assert result.status == ExitStatus(exit_code=0)
        result = await container.run.invoke(call("/bin/cat", stdin=much, capture_bytes=len(much)))
        assert result.stdout == much
        assert not result.stdout_cut
        script = "head -c 100000000 /dev/zero; head -c 3000 /dev/zero >&2"
        result = await container.run.invoke(call("/bin/sh", "-c", script, capture_bytes=3000))
        assert result.status == ExitStatus(exit_code=0)
        assert result.stdout == result.stderr == bytes(3000)
        assert result.stdout_cut
        assert not result.stderr_cut


@pytest.mark.parametrize(
    "script",
    [
        "sleep 777",
        "trap '' TERM INT HUP; sleep 777",
        "kill -STOP $$",
        "sleep 777 & sleep 777 & (sleep 777 & sleep 777)",
        "yes",
        "while :; do sleep 777 & sleep 0.01; done",
    ],
)
async def test_at_the_deadline_the_whole_process_group_is_gone(rig: Rig, script: str) -> None:
    async with idle(rig) as container:
        with pytest.raises(DeadlineExceeded) as caught:
            await container.run.invoke(call("/bin/sh", "-c", script, timeout_s=0.3))
        assert caught.value.expected == "0.3 s"
        # Those that died as orphans are the first process's to reap.
        await until(lambda: members(container) == [])
        assert children() == [str(container.pid)]


async def test_a_command_that_ended_is_told_although_a_child_has_its_outputs(rig: Rig) -> None:
    async with idle(rig) as container:
        assert await shell(container, "sleep 777 & echo done") == "done\n"
        # It is the first process's child now, and goes on, once it has become `sleep`.
        with trio.fail_after(20):
            await until(lambda: members(container) == ["sleep 777"])
        assert children() == [str(container.pid)]
        assert await shell(container, "ps -o ppid,args | grep '[s]leep 777'") == (
            "    1 sleep 777\n"
        )


async def test_commands_at_once_do_not_hear_each_other(rig: Rig) -> None:
    heard: dict[str, str] = {}
    async with idle(rig) as container:

        async def ask(word: str) -> None:
            script = "sleep 0.1; cat; sleep 0.1; cat"
            heard[word] = await shell(container, script, stdin=word.encode())

        async with trio.open_nursery() as nursery:
            for number in range(MAX_AT_ONCE):
                nursery.start_soon(ask, f"word {number}")
    assert heard == {word: word for word in heard}
    assert len(heard) == MAX_AT_ONCE


async def test_only_so_many_commands_are_under_way_at_once(rig: Rig) -> None:
    async with idle(rig) as container:
        async with trio.open_nursery() as nursery:
            for _ in range(MAX_AT_ONCE):
                nursery.start_soon(container.run.invoke, call("/bin/sleep", "777"))
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(Busy) as caught:
                await container.run.invoke(call("/bin/true"))
            assert caught.value.expected == str(MAX_AT_ONCE)
            nursery.cancel_scope.cancel()
        assert await shell(container, "echo again") == "again\n"


@pytest.mark.parametrize(
    ("entry_point", "reason"),
    [
        ("Missing", "ENOENT: No such file or directory"),
        ("Lost", "ENOENT: No such file or directory"),
        ("Plain", "EACCES: Permission denied"),
        ("Text", "ENOEXEC: Exec format error"),
    ],
)
async def test_an_entry_point_that_is_no_program_is_unknown(
    rig: Rig, entry_point: str, reason: str
) -> None:
    async with idle(rig) as container:
        with pytest.raises(UnknownItem) as caught:
            await container.run.invoke(call(entry_point=entry_point))
        assert caught.value.item == f"entry point /lib/acon/entrypoint.d/{entry_point}"
        assert caught.value.actual == reason
        assert children() == [str(container.pid)]


async def test_arguments_that_are_too_long_are_refused_with_the_reason(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plugins.oci_runtime.container.ENDING_S", 0.01)
    async with idle(rig) as container:
        with pytest.raises(RuntimeFailed) as caught:
            await container.run.invoke(call("x" * 200_000))
        assert caught.value.actual == "E2BIG: Argument list too long"
        assert children() == [str(container.pid)]


async def test_a_word_that_no_program_can_be_given_is_refused(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plugins.oci_runtime.container.ENDING_S", 0.01)
    async with idle(rig) as container:
        for bad in (call("a\0b"), call(environment=("A=\0",))):
            with pytest.raises(RuntimeFailed, match="words"):
                await container.run.invoke(bad)


async def test_commands_run_in_a_container_whose_first_process_is_stopped(rig: Rig) -> None:
    async with idle(rig) as container:
        await container.signal(signal.SIGSTOP, whole_group=False)
        assert await shell(container, "echo moving") == "moving\n"


async def test_a_command_ends_with_its_container(rig: Rig) -> None:
    results: list[InvocationResult] = []
    async with idle(rig) as container:

        async def ask() -> None:
            results.append(await container.run.invoke(call("/bin/sleep", "777")))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await until(lambda: members(container) == ["/bin/sleep 777"])
            os.kill(container.pid, signal.SIGKILL)
            # It could not end while we did not reap its last process.
            assert await container.wait() == ExitStatus(signal=signal.SIGKILL)
        assert [result.status for result in results] == [ExitStatus(signal=signal.SIGKILL)]
        with pytest.raises(Conflict):
            await container.run.invoke(call("/bin/true"))


async def test_a_container_that_ends_at_any_moment_of_a_command_leaves_no_doubt(rig: Rig) -> None:
    outcomes = []
    for delay_ms in range(0, 40, 4):
        async with idle(rig) as container, trio.open_nursery() as nursery:

            async def kill_first(pid: int = container.pid, delay_ms: int = delay_ms) -> None:
                await trio.sleep(delay_ms / 1000)
                os.kill(pid, signal.SIGKILL)

            nursery.start_soon(kill_first)
            try:
                result = await container.run.invoke(call("/bin/sleep", "777"))
                assert result.status == ExitStatus(signal=signal.SIGKILL)
                outcomes.append("killed")
            except Conflict:
                outcomes.append("conflict")
            assert await container.wait() == ExitStatus(signal=signal.SIGKILL)
        assert rig.remains() == []
    assert "conflict" in outcomes


async def test_destroying_a_container_ends_its_commands(rig: Rig) -> None:
    ended: list[object] = []
    async with idle(rig) as container, trio.open_nursery() as nursery:

        async def ask() -> None:
            try:
                ended.append((await container.run.invoke(call("/bin/sleep", "777"))).status)
            except Conflict as error:
                ended.append(error.rule)

        for _ in range(MAX_AT_ONCE):
            nursery.start_soon(ask)
        await trio.sleep(0.02)
        await container.destroy()
        with pytest.raises(Conflict):
            await container.run.invoke(call("/bin/true"))
    assert len(ended) == MAX_AT_ONCE
    assert set(ended) <= {ExitStatus(signal=signal.SIGKILL), "has ended already"}


def leftovers(rig: Rig, container: Held) -> list[str]:
    bundle = rig.folder / "bundles" / container.run.oci_id
    return [
        *(path.name for path in bundle.iterdir() if path.name.startswith("invocation")),
        *members(container),
        *(child for child in children() if child != str(container.pid)),
    ]


async def test_a_command_cancelled_at_any_time_leaves_nothing(rig: Rig) -> None:
    ran = 0
    async with idle(rig) as container:
        await shell(container, "true")
        fds = open_fds()
        for delay_ms in range(0, 60, 2):
            with trio.move_on_after(delay_ms / 1000) as scope:
                await container.run.invoke(call("/bin/sh", "-c", "sleep 777 & sleep 777"))
            assert scope.cancelled_caught
            # Dead orphans are the first process's to reap.
            await until(lambda: leftovers(rig, container) == [])
            assert open_fds() == fds
            ran += 1
        assert await shell(container, "echo unharmed") == "unharmed\n"
    assert ran == 30


def test_a_command_cancelled_at_any_step_leaves_nothing(tmp_path: Path) -> None:
    swept = 0

    async def one_round(instrument: CancelAtStep) -> bool:
        finished = False
        async with running_rig(tmp_path) as rig:
            if not (rig.rootfs / "lib").exists():
                add_entry_points(rig.rootfs)
            async with idle(rig) as container:
                fds = open_fds()
                with trio.CancelScope() as scope:
                    instrument.arm(scope)
                    await container.run.invoke(call("/bin/true", stdin=b"x"))
                    finished = True
                instrument.disarm()
                assert leftovers(rig, container) == []
                assert open_fds() == fds
        return finished

    for step in range(1, 500):
        instrument = CancelAtStep(step)
        finished = trio.run(one_round, instrument, instruments=[instrument])
        assert finished or instrument.fired
        if not instrument.fired:
            swept = step - 1
            break
    assert swept > 8


@contextmanager
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(spawn, "GRACE_S", 0.1)
        yield


async def test_a_runtime_that_hangs_half_way_is_ended_with_what_it_had_begun(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with idle(rig) as container:
        await shell(container, "true")
        fds = open_fds()
        caught_it = 0
        for delay_ms in range(0, 24, 2):
            with impatient(monkeypatch):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(container.run.invoke, call("/bin/sleep", "777"))
                    await until(lambda: len(children()) == 2)
                    runtime = next(one for one in children() if one != str(container.pid))
                    await trio.sleep(delay_ms / 1000)
                    with suppress(ProcessLookupError):
                        os.kill(int(runtime), signal.SIGSTOP)
                        caught_it += 1
                    await trio.sleep(0.02)
                    nursery.cancel_scope.cancel()
            await until(lambda: leftovers(rig, container) == [])
            assert open_fds() == fds
        assert caught_it > 0
        assert await shell(container, "echo unharmed") == "unharmed\n"


async def test_once_it_was_ended_no_command_is_begun(tmp_path: Path) -> None:
    invocations = Invocations(
        OciCommand("/bin/false", tmp_path),
        "7",
        first_pid=os.getpid(),
        bundle=tmp_path,
        max_at_once=1,
        pace=exchange_pace(),
    )
    await invocations.end()
    with pytest.raises(Conflict, match="has ended already"):
        await invocations.run(call("/bin/true"))
