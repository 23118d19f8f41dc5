"""A user namespace for a mapping alone: right, without traces, and refused in time."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from oci_runtime_rig import children, open_fds

from plugins.image_store.mount import user_namespace as module
from plugins.image_store.mount.user_namespace import LISTINGS, user_namespace
from supervisor import DeadlineExceeded, RuntimeFailed
from supervisor.formats.elf import ELF_MACHINES, elf_file, instructions

PAIRS = ((0, 150_000), (5, 150_005))


def maps_in(namespace_fd: int) -> dict[str, list[list[str]]]:
    """What a process that entered the namespace reads of its own maps."""
    command = ["nsenter", f"--user=/proc/self/fd/{namespace_fd}", "cat", "/proc/self/uid_map"]
    found = {}
    for kind in ("uid_map", "gid_map"):
        command[-1] = f"/proc/self/{kind}"
        done = subprocess.run(
            command, pass_fds=[namespace_fd], check=True, capture_output=True, text=True
        )
        found[kind] = [line.split() for line in done.stdout.splitlines()]
    return found


@pytest.mark.root
def test_it_maps_users_and_groups_alike_and_leaves_no_process_and_no_descriptor() -> None:
    before = open_fds()
    with user_namespace(PAIRS, item="test") as namespace_fd:
        assert not children()
        assert open_fds() == before + 1
        assert os.readlink(f"/proc/self/fd/{namespace_fd}") != os.readlink("/proc/self/ns/user")
        lines = [["0", "150000", "1"], ["5", "150005", "1"]]
        assert maps_in(namespace_fd) == {"uid_map": lines, "gid_map": lines}
    assert open_fds() == before


@pytest.mark.root
def test_it_is_made_also_where_many_descriptors_are_open() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    many = 1100
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, many + 200), hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(many)]
    try:
        with user_namespace(PAIRS, item="test") as namespace_fd:
            assert namespace_fd > many
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.root
@pytest.mark.parametrize("pairs", [((0, 150_000), (0, 150_001)), ((0, 150_000), (1, 150_000))])
def test_a_map_that_the_kernel_refuses_is_refused_without_a_trace(
    pairs: tuple[tuple[int, int], ...],
) -> None:
    before = open_fds()
    refused = pytest.raises(RuntimeFailed, match="no user namespace can be made here")
    with refused, user_namespace(pairs, item="test"):
        pytest.fail("an id was given twice")
    assert not children()
    assert open_fds() == before


def replaced(monkeypatch: pytest.MonkeyPatch, x86_code: str) -> None:
    program = elf_file(ELF_MACHINES["x86_64"], bytes.fromhex(x86_code))
    monkeypatch.setattr(module, "_program", lambda item: program)


@pytest.mark.root
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the programs are for x86_64")
def test_a_child_that_ends_or_hangs_ends_in_a_refusal_without_a_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = open_fds()
    replaced(monkeypatch, "b8e7000000 bf01000000 0f05")  # exit_group(1)
    with pytest.raises(RuntimeFailed, match="unshare"), user_namespace(PAIRS, item="test"):
        pytest.fail("nobody made a namespace")
    monkeypatch.setattr(module, "MAKE_TIMEOUT_S", 0.2)
    replaced(monkeypatch, "ebfe")  # jmp to itself
    with pytest.raises(DeadlineExceeded, match=r"0\.2 s"), user_namespace(PAIRS, item="test"):
        pytest.fail("nobody made a namespace")
    assert not children()
    assert open_fds() == before


@pytest.mark.root
def test_a_program_that_another_child_could_still_write_is_run_a_moment_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = open_fds()
    genuine, copies = os.open, []

    def as_if_forked(path: str, flags: int, *rest: int, dir_fd: int | None = None) -> int:
        """A copy stays open, as in a child that has not come to its execve(2)."""
        fd = genuine(path, flags, *rest, dir_fd=dir_fd)
        if path == "program" and flags & os.O_WRONLY:
            copies.append(os.dup(fd))
        return fd

    def let_go(pause_s: float) -> None:
        os.close(copies.pop())

    monkeypatch.setattr(os, "open", as_if_forked)
    monkeypatch.setattr(time, "sleep", let_go)
    with user_namespace(PAIRS, item="test"):
        assert copies == []
        assert open_fds() == before + 1


def test_an_unknown_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(RuntimeFailed) as caught, user_namespace(PAIRS, item="test"):
        pytest.fail("nobody made a namespace")
    assert (caught.value.expected, caught.value.actual) == ("x86_64, aarch64", "riscv64")


@pytest.mark.parametrize(
    ("machine", "header"), [("x86_64", ".intel_syntax noprefix"), ("aarch64", "")]
)
def test_the_bytes_of_each_listing_are_what_an_assembler_makes_of_it(
    tmp_path: Path, machine: str, header: str
) -> None:
    assembler, objcopy = shutil.which("llvm-mc"), shutil.which("llvm-objcopy")
    if assembler is None or objcopy is None:
        pytest.skip("llvm-mc and llvm-objcopy (Debian: llvm) are not installed")
    source, made, code = (tmp_path / name for name in ("it.s", "it.o", "it.bin"))
    text = [header, *(line[24:] for line in LISTINGS[machine].splitlines()), ""]
    source.write_text("\n".join(text))
    subprocess.run(
        [assembler, f"-triple={machine}", "-filetype=obj", source, "-o", made], check=True
    )
    subprocess.run([objcopy, "-O", "binary", "-j", ".text", made, code], check=True)
    assert code.read_bytes() == instructions(LISTINGS[machine])
