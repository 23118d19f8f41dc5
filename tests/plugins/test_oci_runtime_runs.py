"""One container, several runs: what lasts, what goes, and why a run did not come about."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from oci_runtime_rig import (
    MemoryLog,
    Rig,
    one_call,
    open_fds,
    receipt_for,
    running_rig,
    write_program,
)

from plugins.oci_runtime import launcher
from plugins.oci_runtime.scratch import Scratch
from supervisor import Conflict, RuntimeFailed

pytestmark = pytest.mark.root


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with running_rig(tmp_path) as rig:
        yield rig
        assert rig.remains() == []


def either(first: str, again: str, mark: str) -> tuple[str, str, str]:
    """A program that does one thing in its first run, where `mark` is absent, then another."""
    return ("/bin/sh", "-c", f"if [ -e {mark} ]; then {again}; else {first}; fi")


async def test_temporary_files_and_a_writable_root_s_changes_outlive_a_run(rig: Rig) -> None:
    (rig.rootfs / "place").chmod(0o777)
    files = "/tmp/a /run/a /run/user/0/a /place/a"
    first = f"for f in {files}; do echo $f > $f; done; chmod 0700 /tmp; echo made"
    spec = rig.spec(*either(first, f"cat {files}; stat -c %a /tmp", "/tmp/a"), writable_root=True)
    prepared = await rig.launcher.prepare(spec)
    assert await rig.run_once(prepared, spec) == "made\n"
    for _ in range(2):
        assert (await rig.run_once(prepared, spec)).split() == [*files.split(), "700"]
    await prepared.close()
    other = rig.spec(*either("echo nothing", "echo something", "/tmp/a"))
    assert await rig.output_of(other) == "nothing\n"


async def test_processes_and_ipc_objects_do_not_outlive_a_run(rig: Rig) -> None:
    key, create, get = 7, 0o1600, 0
    make_queue = write_program(rig.rootfs, "make_queue", one_call(68, key, create))  # msgget
    find_queue = write_program(rig.rootfs, "find_queue", one_call(68, key, get))
    look = (
        f"{find_queue}; test $? = {errno.ENOENT} && echo no queue || echo a queue; "
        "ls /dev/mqueue; ls /dev/shm; grep -lx sleep /proc/[0-9]*/comm | wc -l"
    )
    leave = (
        f"{make_queue}; touch /dev/mqueue/left /dev/shm/left; setsid sleep 60 & "
        "until grep -qx sleep /proc/[0-9]*/comm; do :; done;"
    )
    spec = rig.spec(*either(f"touch /tmp/mark; {leave} {look}", look, "/tmp/mark"))
    prepared = await rig.launcher.prepare(spec)
    before = (await rig.run_once(prepared, spec)).splitlines()
    after = (await rig.run_once(prepared, spec)).splitlines()
    await prepared.close()
    assert before == ["a queue", "left", "left", "1"]
    assert after == ["no queue", "0"]


async def test_the_ids_are_the_same_in_every_run(rig: Rig) -> None:
    spec = rig.spec("/bin/cat", "/proc/self/uid_map", uids=(1000,))
    prepared = await rig.launcher.prepare(spec)
    texts = {await rig.run_once(prepared, spec) for _ in range(2)}
    await prepared.close()
    assert len(texts) == 1


async def test_links_that_a_container_leaves_are_not_followed_by_the_next_start(
    rig: Rig, tmp_path: Path
) -> None:
    # In every place that a start has to do with, towards a folder that is not its own.
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o777)
    outside.chmod(0o777)
    (rig.rootfs / "place").chmod(0o777)
    leave = (
        f"rm -rf /run/user; ln -s {outside} /run/user; "
        f"rmdir /tmp/x; ln -s {outside} /tmp/x; touch /tmp/mark; echo left"
    )
    spec = rig.spec(*either(f"mkdir /tmp/x; {leave}", "echo again", "/tmp/mark"))
    prepared = await rig.launcher.prepare(spec)
    assert await rig.run_once(prepared, spec) == "left\n"
    assert await rig.run_once(prepared, spec) == "again\n"
    await prepared.close()
    assert list(outside.iterdir()) == []


async def test_nothing_of_a_container_is_mounted_while_it_runs_or_after(rig: Rig) -> None:
    def mounts() -> list[str]:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        return [line for line in lines if rig.instance in line]

    spec = rig.spec("/bin/sleep", "60")
    before = mounts()
    prepared = await rig.launcher.prepare(spec)
    assert mounts() == before
    for _ in range(2):
        run = await prepared.start(receipt_for(spec), MemoryLog())
        assert mounts() == before
        await run.destroy()
        assert mounts() == before
    await prepared.close()


@pytest.mark.parametrize(
    ("name", "mode", "contents", "word"),
    [
        ("missing", None, b"", "ENOENT: No such file or directory"),
        ("plain", 0o644, b"\x7fELF", "EACCES: Permission denied"),
        ("text", 0o755, b"neither a program nor a script", "ENOEXEC: Exec format error"),
        ("orphan", 0o755, b"#!/no/such/interpreter\n", "ENOENT: No such file or directory"),
    ],
)
async def test_why_a_program_cannot_be_executed_is_in_the_refusal(
    rig: Rig, name: str, mode: int | None, contents: bytes, word: str
) -> None:
    if mode is not None:
        (rig.rootfs / "place" / name).write_bytes(contents)
        (rig.rootfs / "place" / name).chmod(mode)
    fds = open_fds()
    for log_fds in ((), (1, 2, 7)):
        spec = rig.spec(f"/place/{name}", log_fds=log_fds)
        rig.sockets.pop(spec.container_id).close()
        with pytest.raises(RuntimeFailed) as caught:
            await rig.start(spec)
        assert caught.value.rule == "its program must be executable"
        assert caught.value.expected == f"/place/{name}"
        assert caught.value.actual == word
        assert rig.remains() == []
    assert open_fds() == fds


@pytest.mark.parametrize(
    ("folder", "word"),
    [
        ("/place/missing", "ENOENT: No such file or directory"),
        ("/bin/busybox", "ENOTDIR: Not a directory"),
        ("/place/closed", "EACCES: Permission denied"),
    ],
)
async def test_without_its_working_directory_nothing_starts_and_none_is_made(
    rig: Rig, folder: str, word: str
) -> None:
    # Writable, even for the container: a runtime could make it.
    (rig.rootfs / "place").chmod(0o777)
    (rig.rootfs / "place" / "closed").mkdir(mode=0o700)
    spec = rig.spec("/bin/touch", "/place/mark", working_dir=folder, writable_root=True)
    with pytest.raises(RuntimeFailed) as caught:
        await rig.start(spec)
    assert caught.value.rule == "its working directory must be there"
    assert (caught.value.expected, caught.value.actual) == (folder, word)
    assert [path.name for path in (rig.rootfs / "place").iterdir()] == ["closed"]
    assert rig.remains() == []


async def test_a_program_is_not_searched_for_in_the_path(rig: Rig) -> None:
    with pytest.raises(RuntimeFailed) as caught:
        await rig.start(rig.spec("true", environment=("PATH=/bin",)))
    assert caught.value.actual == "ENOENT: No such file or directory"


async def test_a_start_after_a_failed_one_succeeds(rig: Rig) -> None:
    program = rig.rootfs / "place" / "program"
    spec = rig.spec("/place/program")
    prepared = await rig.launcher.prepare(spec)
    for _ in range(2):
        with pytest.raises(RuntimeFailed):
            await prepared.start(receipt_for(spec), MemoryLog())
        assert rig.remains(bundles=False) == []
    program.write_text("#!/bin/sh\necho now\n")
    program.chmod(0o755)
    assert await rig.run_once(prepared, spec) == "now\n"
    await prepared.close()


async def test_a_cancelled_start_takes_nothing_from_what_lasts(rig: Rig) -> None:
    spec = rig.spec(*either("echo kept > /tmp/file", "cat /tmp/file", "/tmp/file"))
    prepared = await rig.launcher.prepare(spec)
    assert await rig.run_once(prepared, spec) == ""
    cancelled = 0
    for delay_ms in range(0, 60, 4):
        with trio.move_on_after(delay_ms / 1000) as scope:
            run = await prepared.start(receipt_for(spec), MemoryLog())
            await run.destroy()
        cancelled += scope.cancelled_caught
        assert rig.remains(bundles=False) == []
    assert cancelled > 3
    assert await rig.run_once(prepared, spec) == "kept\n"
    await prepared.close()


async def test_a_container_runs_once_at_a_time(rig: Rig) -> None:
    spec = rig.spec("/bin/sleep", "60")
    prepared = await rig.launcher.prepare(spec)
    run = await prepared.start(receipt_for(spec), MemoryLog())
    with pytest.raises(Conflict):
        await prepared.start(receipt_for(spec), MemoryLog())
    os.kill(run.pid, 0)
    await run.destroy()
    await prepared.close()
    with pytest.raises(Conflict):
        await prepared.start(receipt_for(spec), MemoryLog())


async def test_closing_ends_a_run_that_is_left_and_may_be_repeated(rig: Rig) -> None:
    spec = rig.spec("/bin/sleep", "60")
    prepared = await rig.launcher.prepare(spec)
    run = await prepared.start(receipt_for(spec), MemoryLog())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(prepared.close)
        nursery.start_soon(prepared.close)
    await prepared.close()
    assert (await run.wait()).signal == 9
    assert rig.remains() == []


async def test_an_id_is_free_again_once_its_container_is_closed(rig: Rig) -> None:
    spec = rig.spec("/bin/true")
    prepared = await rig.launcher.prepare(spec)
    with pytest.raises(Conflict):
        await rig.launcher.prepare(spec)
    await prepared.close()
    again = await rig.launcher.prepare(spec)
    assert await rig.run_once(again, spec) == ""
    await again.close()


async def test_where_there_is_no_room_for_temporary_files_nothing_is_left(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object, **__: object) -> Scratch:
        raise OSError(errno.ENOMEM, "no memory")

    spec = rig.spec("/bin/true")
    fds = open_fds()
    with monkeypatch.context() as patch:
        patch.setattr(launcher, "Scratch", no_memory)
        with pytest.raises(RuntimeFailed, match="must be preparable"):
            await rig.launcher.prepare(spec)
    assert rig.remains() == []
    assert open_fds() == fds
    assert await rig.output_of(spec) == ""


async def test_eight_starts_at_once_many_times_over_leave_nothing(rig: Rig) -> None:
    async def many(number: int) -> None:
        spec = rig.spec("/bin/sh", "-c", "read x < /proc/self/mountinfo; echo $0", str(number))
        prepared = await rig.launcher.prepare(spec)
        for _ in range(3):
            assert await rig.run_once(prepared, spec) == f"{number}\n"
        await prepared.close()

    with trio.fail_after(120):
        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(many, number)
    assert rig.remains() == []
