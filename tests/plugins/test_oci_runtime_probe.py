"""Runtimes are found by trying, and refused with the reason of each."""

from __future__ import annotations

import os
import platform
import shutil
import struct
import textwrap
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from control_group_views import machine_is_hybrid, run_in_view
from oci_runtime_rig import children, make_plugin, traces_of

from plugins.oci_runtime import OciRuntime, probe, spawn
from plugins.oci_runtime.gateway import Gateway
from plugins.oci_runtime.probe import exit_program
from supervisor import ConfigError, Refusal, RuntimeFailed

PATIENCE_S = 60
root = pytest.mark.root


@pytest.fixture
def runtime_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "runtime"
    folder.mkdir(mode=0o711)
    return folder


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """Installs shell scripts as the only runtimes of the machine."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setattr(probe, "SEARCH_PATH", str(folder))

    def install(name: str, script: str) -> str:
        program = folder / name
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        return str(program)

    return install


@asynccontextmanager
async def lifespan(runtime_dir: Path, **config: object) -> AsyncIterator[OciRuntime]:
    plugin = make_plugin(runtime_dir, OciRuntime.Config(**config))  # type: ignore[arg-type]  # any
    async with trio.open_nursery() as nursery:
        with trio.fail_after(PATIENCE_S):
            await nursery.start(plugin.lifespan)
        yield plugin
        nursery.cancel_scope.cancel()


async def refusal_of(runtime_dir: Path, **config: object) -> Refusal:
    """Why the plugin does not start; nothing of the attempt is left."""
    with pytest.raises(ExceptionGroup) as caught:
        async with lifespan(runtime_dir, **config):
            pass
    error: BaseException = caught.value
    while isinstance(error, BaseExceptionGroup):
        (error,) = error.exceptions
    assert isinstance(error, Refusal)
    instance = Gateway(runtime_dir, shared_size_mib=1).instance
    assert traces_of(instance, with_gateway=True) == []
    assert children() == []
    return error


@root
async def test_the_first_that_works_is_taken(
    runtime_dir: Path, installed: Callable[[str, str], str]
) -> None:
    installed("runc", "echo broken 1.0; exit 3")
    installed("crun", f'exec {probe.CANDIDATES[0]} "$@"')
    async with lifespan(runtime_dir) as plugin:
        runtime = await plugin.container_runtime()
        assert runtime.command.executable.endswith("/bin/crun")  # type: ignore[attr-defined]  # ours


@root
async def test_every_candidate_s_reason_is_named(
    runtime_dir: Path, installed: Callable[[str, str], str]
) -> None:
    runc = installed("runc", 'if [ "$1" = --version ]; then echo runc 1; else exit 3; fi')
    crun = installed("crun", "exit 4")
    error = await refusal_of(runtime_dir)
    assert isinstance(error, RuntimeFailed)
    assert error.expected == "runc or crun"
    first, second = str(error.actual).split("; /")
    assert first.startswith(f"{runc}: ")
    assert "exit code 3" in first
    assert f"/{second}".startswith(f"{crun}: ")
    assert "must tell its version" in second
    assert "exit code 4" in second


@root
async def test_what_is_not_installed_is_named(
    runtime_dir: Path, installed: Callable[[str, str], str]
) -> None:
    error = await refusal_of(runtime_dir)
    assert error.actual == "runc: not installed; crun: not installed"


@root
async def test_a_runtime_that_runs_something_else_is_refused(
    runtime_dir: Path, installed: Callable[[str, str], str]
) -> None:
    liar = installed("liar", "echo liar 1.0")
    error = await refusal_of(runtime_dir, runtime=liar)
    assert error.expected == liar
    assert error.actual == f"{liar}: the container's program: was never reached by the runtime"


@root
async def test_a_runtime_that_hangs_is_ended_at_the_deadline(
    runtime_dir: Path, installed: Callable[[str, str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "PROBE_TIMEOUT_S", 1)
    monkeypatch.setattr(spawn, "GRACE_S", 0.01)
    script = 'if [ "$1" = --version ]; then echo hanging 1; else sleep 1000; fi'
    error = await refusal_of(runtime_dir, runtime=installed("hanging", script))
    assert str(error.actual).endswith("must end in time; expected within 1 s")


async def test_a_path_that_is_not_absolute_is_refused(runtime_dir: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        probe._candidates("runc")
    assert caught.value.item == "$.plugin.oci_runtime.runtime"


def test_a_machine_whose_instructions_are_unknown_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        exit_program("riscv64")
    assert caught.value.actual == "riscv64"


@pytest.mark.parametrize(("machine", "number"), [("x86_64", 62), ("aarch64", 183)])
def test_the_program_is_an_executable_for_its_machine(machine: str, number: int) -> None:
    program = exit_program(machine)
    assert program[:5] == b"\x7fELF\x02"
    executable, elf_machine = struct.unpack_from("<HH", program, 16)
    assert (executable, elf_machine) == (2, number)


def test_the_program_exits_with_its_code(tmp_path: Path) -> None:
    program = tmp_path / "probe"
    program.write_bytes(exit_program(platform.machine()))
    program.chmod(0o755)
    pid = os.posix_spawn(program, [str(program)], {})
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == probe.PROBE_EXIT_CODE


# --- other machines' control groups ---------------------------------------------------------

# The plugin from start to end, and a container with a limit in between.
LIFE = """
    import json, sys, trio
    from pathlib import Path
    from oci_runtime_rig import children, running_rig
    from plugins.oci_runtime import OciRuntime, orphans

    orphans.PERIOD_S = 0.05

    async def main():
        config = OciRuntime.Config(runtime=sys.argv[2])
        async with running_rig(Path(sys.argv[1]), config) as rig:
            text = await rig.shell("cat /proc/self/cgroup; echo works")
            with trio.fail_after(60):
                # Helpers of crun's, dead and left to us.
                while children():
                    await trio.sleep(0.05)
            answer = {
                "text": text.splitlines(),
                "executable": rig.launcher.command.executable,
                "notes": rig.launcher.notes,
                "remains": rig.remains(),
                "instance": rig.instance,
            }
            spec = rig.spec("/bin/sleep", "1000")
            container = await rig.start(spec)
            groups = Path(f"/proc/{container.pid}/cgroup").read_text()
            answer["group"] = groups.splitlines()[-1].removeprefix("0::")
            await container.destroy()
        print(json.dumps(answer))

    trio.run(main)
"""


@root
@pytest.mark.parametrize("name", ["runc", "crun"])
def test_runtimes_run_containers_where_version_2_is_alone(tmp_path: Path, name: str) -> None:
    program = shutil.which(name, path=spawn.SEARCH_PATH)
    if program is None:
        pytest.skip(f"{name} is not installed")
    seen = run_in_view("v2", LIFE, tmp_path, program)
    assert seen["executable"] == program
    # In a control group namespace of its own, whose top is the container's group.
    assert "0::/" in seen["text"]
    assert seen["text"][-1] == "works"
    assert seen["remains"] == []
    if machine_is_hybrid():
        # Version 1 holds the controllers here: what is not limited is said.
        assert len(seen["notes"]) == 3
        assert all("no control group limits" in note for note in seen["notes"])


# As systemd starts a service with Delegate=yes.
IN_A_UNIT = f"""
    import os, subprocess, sys
    from pathlib import Path

    top = Path("/sys/fs/cgroup")
    unit = top / "test-{os.getpid()}.service"
    unit.mkdir()
    try:
        os.setxattr(unit, "trusted.delegate", b"1")
        script = 'echo 0 > "$0/cgroup.procs" && exec "$@"'
        subprocess.run(["sh", "-c", script, unit, sys.executable, *sys.argv[1:]], check=True)
    finally:
        # The daemon's own leaf stays until systemd removes the unit's group.
        (unit / "supervisor").rmdir()
        unit.rmdir()
"""


@root
@pytest.mark.parametrize("name", ["runc", "crun"])
def test_runtimes_run_containers_in_a_delegated_unit(tmp_path: Path, name: str) -> None:
    program = shutil.which(name, path=spawn.SEARCH_PATH)
    if program is None:
        pytest.skip(f"{name} is not installed")
    seen = run_in_view("v2", IN_A_UNIT, "-c", textwrap.dedent(LIFE), tmp_path, program)
    assert seen["group"] == f"/test-{os.getpid()}.service/acond-{seen['instance']}/2"
    assert seen["text"][-1] == "works"
    assert seen["remains"] == []


@root
@pytest.mark.skipif(not machine_is_hybrid(), reason="needs version 1 controllers")
def test_runc_runs_containers_where_version_1_is_alone(tmp_path: Path) -> None:
    seen = run_in_view("v1", LIFE, tmp_path, "auto")
    assert seen["text"][-1] == "works"
    assert seen["remains"] == []
    assert seen["notes"] == []
