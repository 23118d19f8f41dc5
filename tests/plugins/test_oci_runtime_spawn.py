"""Processes of ours: exact descriptors, exit codes, and no trace of them when given up."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing
from oci_runtime_rig import children, open_fds

from plugins.oci_runtime import kernel, spawn
from plugins.oci_runtime.spawn import Child, keep_descriptors_here, run_to_end
from supervisor import RuntimeFailed

TIMEOUT_S = 20


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    yield read_end, write_end
    os.close(read_end)
    os.close(write_end)


def shell(script: str) -> tuple[str, ...]:
    return ("/bin/sh", "-c", script)


def started(*argv: str) -> int:
    return os.posix_spawn(argv[0], argv, {})


def reaped(pid: int) -> None:
    os.waitpid(pid, 0)


async def run_shell(script: str, fds: dict[int, int] | None = None) -> int:
    return await run_to_end(shell(script), fds=fds or {}, timeout_s=TIMEOUT_S)


async def until_readable(fd: int) -> bytes:
    with trio.fail_after(TIMEOUT_S):
        await trio.lowlevel.wait_readable(fd)
    return os.read(fd, 65536)


@pytest.mark.parametrize("code", [0, 1, 255])
async def test_an_exit_code_is_told(code: int) -> None:
    assert await run_shell(f"exit {code}") == code


async def test_a_deadly_signal_is_told_as_its_negative() -> None:
    assert await run_shell("kill -USR1 $$") == -signal.SIGUSR1


async def test_descriptors_arrive_under_their_numbers_even_crosswise(pipe: tuple[int, int]) -> None:
    keep_descriptors_here()
    read_end, write_end = pipe
    # Each of ours has the number that another is wanted under.
    fds = {write_end: read_end, read_end: write_end, 1: write_end}
    script = f"readlink /proc/$$/fd/{read_end} /proc/$$/fd/{write_end}; ls /proc/$$/fd"
    assert await run_shell(script, fds) == 0
    words = os.read(read_end, 65536).decode().split()
    assert words[0] == words[1]
    assert sorted(map(int, words[2:])) == sorted({0, 1, 2, read_end, write_end})


async def test_standard_descriptors_that_are_not_given_are_dev_null(pipe: tuple[int, int]) -> None:
    script = "readlink /proc/$$/fd/0 /proc/$$/fd/2 >&3; cat | wc -c >&3; echo x; echo y >&2"
    assert await run_shell(script, {3: pipe[1]}) == 0
    assert os.read(pipe[0], 65536).split() == [b"/dev/null", b"/dev/null", b"0"]


async def test_the_environment_is_none_of_ours(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "of ours")
    await run_to_end(("/usr/bin/env",), fds={1: pipe[1]}, timeout_s=TIMEOUT_S)
    names = [line.split(b"=")[0] for line in os.read(pipe[0], 65536).splitlines()]
    assert names == [b"PATH"]


async def test_ignored_signals_are_not_inherited(pipe: tuple[int, int]) -> None:
    assert signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN
    await run_to_end(("/bin/grep", "SigIgn", "/proc/self/status"), fds={1: pipe[1]}, timeout_s=9)
    ignored = int(os.read(pipe[0], 4096).split()[1], 16)
    for signum in (signal.SIGPIPE, signal.SIGXFSZ):
        assert not ignored & 1 << (signum - 1)


async def test_it_leads_a_process_group_of_its_own(pipe: tuple[int, int]) -> None:
    await run_shell("echo $$; cut -d' ' -f5 /proc/$$/stat", {1: pipe[1]})
    pid, group = os.read(pipe[0], 4096).split()
    assert pid == group


async def test_a_program_that_cannot_be_executed_is_refused(tmp_path: Path) -> None:
    fds = open_fds()
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(RuntimeFailed) as caught:
            await run_to_end((str(path),), fds={5: 1}, timeout_s=TIMEOUT_S)
        assert caught.value.item == str(path)
        assert caught.value.rule == "must be executable"
    assert open_fds() == fds


async def test_one_that_is_late_is_ended_with_its_group(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spawn, "GRACE_S", 0.01)
    before = set(children())
    fds = open_fds()
    with kernel.child_subreaper(), pytest.raises(RuntimeFailed) as caught:
        await run_to_end(shell("sleep 60 & echo $!; wait"), fds={1: pipe[1]}, timeout_s=0.2)
    assert caught.value.rule == "must finish in time"
    with pytest.raises(ProcessLookupError):
        os.kill(int(os.read(pipe[0], 4096)), 0)
    assert set(children()) <= before
    assert open_fds() == fds


async def test_what_one_that_is_late_has_begun_in_a_session_of_its_own_is_ended_too(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a runtime's first process is, before it is in any control group."""
    monkeypatch.setattr(spawn, "GRACE_S", 0.01)
    before = set(children())
    script = "setsid sleep 60 & echo $!; wait"
    with kernel.child_subreaper(), pytest.raises(RuntimeFailed):
        await run_to_end(shell(script), fds={1: pipe[1]}, timeout_s=0.2)
    with pytest.raises(ProcessLookupError):
        os.kill(int(os.read(pipe[0], 4096)), 0)
    assert set(children()) <= before


async def test_one_that_is_cancelled_may_finish_and_else_is_ended(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(children())
    for grace_s, script, expected in (
        (TIMEOUT_S, "echo begun; sleep 0.1; echo done", b"done\n"),
        (0.01, "echo begun; sleep 60; echo done", b""),
    ):
        monkeypatch.setattr(spawn, "GRACE_S", grace_s)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_shell, script, {1: pipe[1]})
            assert await until_readable(pipe[0]) == b"begun\n"
            nursery.cancel_scope.cancel()
        text = b""
        if expected:
            text = os.read(pipe[0], 4096)
        assert text == expected
        assert set(children()) <= before


async def test_a_process_that_is_not_ours_is_no_child() -> None:
    fds = open_fds()
    with pytest.raises(ChildProcessError):
        Child(1)
    assert open_fds() == fds
    await trio.lowlevel.checkpoint()


async def test_an_end_is_told_again_and_signals_after_it_are_refused() -> None:
    child = Child(started(*shell("exit 5")))
    assert [await child.wait(), await child.wait()] == [5, 5]
    assert child.ended
    with pytest.raises(ProcessLookupError):
        child.send_signal(signal.SIGTERM)
    child.close()
    child.close()


async def test_a_status_that_somebody_else_took_is_an_error() -> None:
    child = Child(started("/bin/true"))
    reaped(child.pid)
    with pytest.raises(OSError, match="No child processes") as caught:
        await child.wait()
    assert caught.value.errno == errno.ECHILD
    child.close()
