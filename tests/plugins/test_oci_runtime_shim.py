"""The program between a runtime and a container's own, run directly: no runtime, no root."""

from __future__ import annotations

import errno
import os
import platform
import resource
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import trio
import trio.testing

from plugins.oci_runtime import kernel
from plugins.oci_runtime.shim import ChdirFailed, ExecFailed, ShimPipe, open_shim
from plugins.oci_runtime.shim_program import LISTINGS, MAX_KEPT_FD, shim_program
from plugins.oci_runtime.spawn import keep_descriptors_here, run_to_end
from supervisor import ConfigError, RuntimeFailed
from supervisor.formats.elf import instructions

SHOW_ENVIRONMENT = ("/usr/bin/env", "-0")
SHOW_DESCRIPTORS = ("/bin/sh", "-c", "ls /proc/$$/fd")
TIMEOUT_S = 20


class Tap:
    """A pipe of which one end is given to a program."""

    def __init__(self, read_end: int, write_end: int) -> None:
        self.read_end = read_end
        self.write_end = write_end

    def all(self) -> bytes:
        """What came by now."""
        os.set_blocking(self.read_end, False)
        with suppress(BlockingIOError):
            return os.read(self.read_end, 65536)
        return b""


@contextmanager
def tap() -> Iterator[Tap]:
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    try:
        yield Tap(read_end, write_end)
    finally:
        os.close(read_end)
        os.close(write_end)


async def run_shim(pipe: ShimPipe, fds: Mapping[int, int]) -> tuple[int, int]:
    """The exit code of what the shim became, and the pid that it told."""
    code = await run_to_end(pipe.argv, fds={**fds, **pipe.fds}, timeout_s=TIMEOUT_S)
    return code, await pipe.started(timeout_s=TIMEOUT_S)


async def output_of(*argv: str, environment: tuple[str, ...] = (), working_dir: str = "/") -> bytes:
    with (
        tap() as out,
        open_shim(
            argv, environment, working_dir=working_dir, first_fd=3, kept_fds=frozenset()
        ) as pipe,
    ):
        code, pid = await run_shim(pipe, {1: out.write_end, 2: out.write_end})
        assert code == 0
        assert pid > 1
        return out.all()


async def test_the_program_gets_exactly_its_environment() -> None:
    for environment in (
        (),
        ("A=1", "B=two words", "EMPTY=", "ü=ü"),
        ("HOME=/somewhere",),
        ("HOME=",),
        ("A=2", "A=1", "HOME=/x", "A=3"),
        tuple(f"V{n}={n}" for n in range(500)),
    ):
        text = await output_of(*SHOW_ENVIRONMENT, environment=environment)
        assert text == "".join(f"{entry}\0" for entry in environment).encode()


async def test_the_program_gets_exactly_its_arguments() -> None:
    words = ("", "two words", "ü", "-", "$HOME", "x" * 20_000)
    script = 'printf "%s\\n" "$0" "$@"'
    text = await output_of("/bin/sh", "-c", script, "zero", *words)
    assert text.decode().split("\n")[:-1] == ["zero", *words]


async def test_the_program_is_not_searched_for() -> None:
    with (
        open_shim(
            ("sh",), ("PATH=/bin",), working_dir="/", first_fd=3, kept_fds=frozenset()
        ) as pipe,
        pytest.raises(ExecFailed) as caught,
    ):
        await run_shim(pipe, {})
    assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.ENOEXEC, errno.ENOTDIR])
async def test_why_a_program_cannot_be_executed_is_told(tmp_path: Path, number: int) -> None:
    files = {
        errno.ENOENT: (tmp_path / "missing", None),
        errno.EACCES: (tmp_path / "plain", 0o644),
        errno.ENOEXEC: (tmp_path / "text", 0o755),
        errno.ENOTDIR: (tmp_path / "text" / "below", None),
    }
    (tmp_path / "text").touch()
    path, mode = files[number]
    if mode is not None:
        path.write_bytes(b"neither ELF nor a script")
        path.chmod(mode)
    with open_shim((str(path),), (), working_dir="/", first_fd=3, kept_fds=frozenset()) as pipe:
        assert await run_to_end(pipe.argv, fds=pipe.fds, timeout_s=TIMEOUT_S) == 127
        with pytest.raises(ExecFailed) as caught:
            await pipe.started(timeout_s=TIMEOUT_S)
        assert caught.value.errno == number
        assert pipe.first_process() is not None


async def test_the_program_begins_in_its_working_directory(tmp_path: Path) -> None:
    folder = tmp_path / "two words ü"
    folder.mkdir()
    assert await output_of("/bin/pwd", working_dir=str(folder)) == f"{folder}\n".encode()


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENOTDIR])
async def test_without_its_working_directory_no_program_runs(tmp_path: Path, number: int) -> None:
    folders = {errno.ENOENT: tmp_path / "missing", errno.ENOTDIR: tmp_path / "file"}
    mark = tmp_path / "mark"
    (tmp_path / "file").touch()
    with open_shim(
        ("/bin/touch", str(mark)),
        (),
        working_dir=str(folders[number]),
        first_fd=3,
        kept_fds=frozenset(),
    ) as pipe:
        assert await run_to_end(pipe.argv, fds=pipe.fds, timeout_s=TIMEOUT_S) == 127
        with pytest.raises(ChdirFailed) as caught:
            await pipe.started(timeout_s=TIMEOUT_S)
        assert caught.value.errno == number
        assert pipe.first_process() is not None
    assert not mark.exists()


async def test_no_descriptor_of_the_shim_or_of_a_runtime_is_a_working_directory(
    tmp_path: Path,
) -> None:
    """As CVE-2024-21626 was: what is open on the way is not open when the directory is sought."""
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        for number in range(3, 7):
            with open_shim(
                ("/bin/true",),
                (),
                working_dir=f"/proc/self/fd/{number}",
                first_fd=5,
                kept_fds=frozenset(),
            ) as pipe:
                fds = {**dict.fromkeys((3, 4), folder), **pipe.fds}
                assert await run_to_end(pipe.argv, fds=fds, timeout_s=TIMEOUT_S) == 127
                with pytest.raises(ChdirFailed):
                    await pipe.started(timeout_s=TIMEOUT_S)
    finally:
        os.close(folder)


async def test_only_kept_descriptors_are_open_in_the_program() -> None:
    keep_descriptors_here()
    for kept, first_fd in (((), 3), ((3, 5), 6), ((63,), 64), (tuple(range(3, 64)), 64)):
        with (
            tap() as out,
            open_shim(
                SHOW_DESCRIPTORS, (), working_dir="/", first_fd=first_fd, kept_fds=frozenset(kept)
            ) as pipe,
        ):
            given = dict.fromkeys(range(3, first_fd), out.read_end)
            code, _ = await run_shim(pipe, {1: out.write_end, **given})
            assert code == 0
            # The shell itself holds none but what it was given.
            assert sorted(map(int, out.all().split())) == sorted((0, 1, 2, *kept))


async def test_the_start_is_told_while_the_program_still_runs() -> None:
    script = "echo $$; read word; exit 3"
    with ExitStack() as stack:
        out, command = stack.enter_context(tap()), stack.enter_context(tap())
        pipe = stack.enter_context(
            open_shim(
                ("/bin/sh", "-c", script), (), working_dir="/", first_fd=3, kept_fds=frozenset()
            )
        )
        codes: list[int] = []

        async def run() -> None:
            fds = {0: command.read_end, 1: out.write_end, **pipe.fds}
            codes.append(await run_to_end(pipe.argv, fds=fds, timeout_s=TIMEOUT_S))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await trio.testing.wait_all_tasks_blocked()
            pid = await pipe.started(timeout_s=TIMEOUT_S)
            assert codes == []
            assert pipe.first_process() == pid
            os.write(command.write_end, b"go on\n")
        assert codes == [3]
        assert int(out.all()) == pid


async def test_a_shim_whose_supervisor_gave_up_runs_no_program(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with open_shim(
        ("/bin/touch", str(mark)), (), working_dir="/", first_fd=3, kept_fds=frozenset()
    ) as pipe:
        copies = {number: os.dup(descriptor) for number, descriptor in pipe.fds.items()}
    try:
        code = await run_to_end(pipe.argv, fds=copies, timeout_s=TIMEOUT_S)
    finally:
        for copy in copies.values():
            os.close(copy)
    assert code == 127
    assert not mark.exists()


async def test_a_runtime_that_ends_before_the_shim_ran_is_told_from_a_start() -> None:
    with open_shim(("/bin/true",), (), working_dir="/", first_fd=3, kept_fds=frozenset()) as pipe:
        assert await run_to_end(("/bin/true",), fds=pipe.fds, timeout_s=TIMEOUT_S) == 0
        with pytest.raises(RuntimeFailed) as caught:
            await pipe.started(timeout_s=TIMEOUT_S)
        assert caught.value.rule == "was never reached by the runtime"
        assert pipe.first_process() is None


async def test_a_shim_that_says_nothing_is_not_waited_for_longer_than_its_deadline() -> None:
    with open_shim(("/bin/true",), (), working_dir="/", first_fd=3, kept_fds=frozenset()) as pipe:
        silent = os.dup(pipe.fds[4])
        try:
            with pytest.raises(RuntimeFailed) as caught:
                await pipe.started(timeout_s=0.01)
        finally:
            os.close(silent)
        assert caught.value.rule == "must begin in time"


async def test_a_status_that_is_no_errno_is_refused() -> None:
    with open_shim(("/bin/true",), (), working_dir="/", first_fd=3, kept_fds=frozenset()) as pipe:
        os.write(pipe.fds[4], b"abc")
        with pytest.raises(RuntimeFailed) as caught:
            await pipe.started(timeout_s=TIMEOUT_S)
        assert caught.value.actual == repr(b"abc")


async def test_words_that_no_program_can_be_given_are_refused() -> None:
    for argv, environment in (((), ()), (("/bin/true\0",), ()), (("/bin/true",), ("A=\0",))):
        with (
            pytest.raises(RuntimeFailed),
            open_shim(argv, environment, working_dir="/", first_fd=3, kept_fds=frozenset()),
        ):
            pass
    await trio.lowlevel.checkpoint()


def test_the_program_s_bytes_cannot_be_changed() -> None:
    with open_shim(("/bin/true",), (), working_dir="/", first_fd=3, kept_fds=frozenset()) as pipe:
        fd = pipe.fds[3]
        for change in (
            lambda: os.pwrite(fd, b"x", 0),
            lambda: os.ftruncate(fd, 0),
            lambda: os.write(os.open(f"/proc/self/fd/{fd}", os.O_WRONLY), b"x"),
        ):
            with pytest.raises(OSError, match=r"Errno 1\b|Errno 13\b"):
                change()


@pytest.mark.root
async def test_where_programs_in_memory_are_forbidden_the_shim_lies_in_a_tmpfs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forbidden(name: str) -> int:
        raise PermissionError(errno.EACCES, "vm.memfd_noexec", name)

    monkeypatch.setattr(kernel, "_new_memory_file", forbidden)
    assert await output_of("/bin/echo", "words") == b"words\n"


def test_descriptors_that_have_no_bit_cannot_be_kept() -> None:
    for kept in (frozenset({2}), frozenset({MAX_KEPT_FD + 1})):
        with pytest.raises(ValueError, match="cannot be kept"):
            shim_program(
                "x86_64",
                argv=("a",),
                environment=(),
                working_dir="/",
                open_files=(1024, 1024),
                kept_fds=kept,
                status_fd=70,
            )


def test_a_machine_without_a_listing_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        shim_program(
            "riscv64",
            argv=("a",),
            environment=(),
            working_dir="/",
            open_files=(1024, 1024),
            kept_fds=frozenset(),
            status_fd=4,
        )
    assert caught.value.actual == "riscv64"


@pytest.mark.parametrize(
    ("machine", "triple", "header"),
    [("x86_64", "x86_64", ".intel_syntax noprefix"), ("aarch64", "aarch64", "")],
)
def test_the_bytes_of_each_listing_are_what_an_assembler_makes_of_it(
    tmp_path: Path, machine: str, triple: str, header: str
) -> None:
    assembler, objcopy = shutil.which("llvm-mc"), shutil.which("llvm-objcopy")
    if assembler is None or objcopy is None:
        pytest.skip("llvm-mc and llvm-objcopy (Debian: llvm) are not installed")
    text = [header, *(line[24:] for line in LISTINGS[machine].splitlines())]
    source, made, code = (tmp_path / name for name in ("shim.s", "shim.o", "shim.bin"))
    source.write_text("\n".join([*text, ""]))
    subprocess.run(
        [assembler, f"-triple={triple}", "-filetype=obj", source, "-o", made], check=True
    )
    subprocess.run([objcopy, "-O", "binary", "-j", ".text", made, code], check=True)
    assert code.read_bytes() == instructions(LISTINGS[machine])


async def test_the_other_machine_s_program_does_the_same_under_an_emulator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if emulator is None:
        pytest.skip("qemu-aarch64 (Debian: qemu-user-static) is not installed")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    keep_descriptors_here()
    with tap() as out:
        for argv, environment, wanted in (
            (SHOW_ENVIRONMENT, ("B=2", "A=1", "HOME="), b"B=2\0A=1\0HOME=\0"),
            (SHOW_DESCRIPTORS, (), b"0\n1\n2\n4\n"),
            (("/bin/pwd",), (), f"{tmp_path}\n".encode()),
            (("/bin/sh", "-c", "ulimit -n"), (), b"1024\n"),
        ):
            kept = frozenset({4})
            with open_shim(
                argv, environment, working_dir=str(tmp_path), first_fd=6, kept_fds=kept
            ) as pipe:
                fds = {1: out.write_end, **dict.fromkeys((3, 4, 5), out.read_end)}
                through = (emulator, *pipe.argv)
                code = await run_to_end(through, fds=fds | pipe.fds, timeout_s=TIMEOUT_S)
                assert code == 0
                assert await pipe.started(timeout_s=TIMEOUT_S) > 1
                assert out.all() == wanted
        missing = str(tmp_path / "missing")
        for path, working_dir, failure in (
            (missing, "/", ExecFailed),
            ("/bin/true", missing, ChdirFailed),
        ):
            with open_shim(
                (path,), (), working_dir=working_dir, first_fd=3, kept_fds=frozenset()
            ) as pipe:
                through = (emulator, *pipe.argv)
                assert await run_to_end(through, fds=pipe.fds, timeout_s=TIMEOUT_S) == 127
                with pytest.raises(failure) as caught:
                    await pipe.started(timeout_s=TIMEOUT_S)
                assert caught.value.errno == errno.ENOENT


async def test_the_umask_is_0077_whatever_the_callers_is() -> None:
    before = os.umask(0o022)
    try:
        assert await output_of("/bin/sh", "-c", "umask") == b"0077\n"
    finally:
        os.umask(before)


@pytest.mark.parametrize(("hard", "soft"), [(3000, 1024), (700, 700)])
async def test_the_program_may_open_as_many_files_as_usual_whatever_the_caller_may(
    monkeypatch: pytest.MonkeyPatch, hard: int, soft: int
) -> None:
    # The shim's words in a child whose limits are not ours: ours could not be raised again.
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (hard, hard))
    with (
        tap() as out,
        open_shim(
            ("/bin/sh", "-c", "ulimit -Sn; ulimit -Hn"),
            (),
            working_dir="/",
            first_fd=3,
            kept_fds=frozenset(),
        ) as pipe,
    ):
        await run_shim(pipe, {1: out.write_end})
        assert out.all().split() == [str(soft).encode(), str(hard).encode()]
