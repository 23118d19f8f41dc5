"""What a killed predecessor left is found without its help, ended, and told."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import msgspec
import pytest
import trio
from control_group_views import machine_is_hybrid, run_in_view
from control_groups_rig import process_in, v1_group
from oci_runtime_succession import Outcome, succession

from plugins.oci_runtime import leftovers
from plugins.oci_runtime.cgroups import ControlGroups
from plugins.oci_runtime.gateway import Gateway
from plugins.oci_runtime.leftovers import Leftovers, end_leftovers
from plugins.oci_runtime.spawn import SEARCH_PATH
from supervisor import PredecessorEnded, RuntimeFailed

pytestmark = pytest.mark.root
PATIENCE_S = 60
needs_hybrid = pytest.mark.skipif(
    not machine_is_hybrid(), reason="needs version 1 controllers beside version 2"
)


class Scene:
    """The folders of a plugin whose process is gone."""

    def __init__(self, folder: Path) -> None:
        self.gateway = Gateway(folder, shared_size_mib=1)
        self.state = folder / "state"
        self.bundles = folder / "bundles"
        for one in (self.state, self.bundles):
            one.mkdir()

    async def end(self) -> Leftovers:
        groups = ControlGroups(self.gateway.instance)
        await groups.find()
        with trio.fail_after(PATIENCE_S):
            return await end_leftovers(
                state_dir=self.state,
                bundles_dir=self.bundles,
                groups=groups,
                gateway=self.gateway,
            )


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


@contextmanager
def runtime_at_work(state: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A runtime in the middle of its work, and what it has begun in its process group."""
    script = "sleep 1000 & echo $!; wait"
    with subprocess.Popen(
        ["sh", "-c", script, "runc", "--root", str(state), "run", "--detach", "7"],
        stdout=subprocess.PIPE,
        process_group=0,
    ) as process:
        try:
            assert process.stdout is not None
            yield process, int(process.stdout.readline())
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def lives(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


async def test_where_nothing_was_left_there_is_nothing_to_say(scene: Scene) -> None:
    found = await scene.end()
    assert found == Leftovers(containers=(), processes=0, mounts=False)
    assert not found.any
    assert found.notes == ()
    assert not scene.state.exists()
    assert not scene.bundles.exists()


async def test_a_runtime_at_work_is_ended_with_what_it_had_begun(scene: Scene) -> None:
    # State as an interrupted runtime leaves it: none that it could read again.
    (scene.state / "7").mkdir()
    (scene.state / "7" / "state.json").write_text('{"id": ')
    with runtime_at_work(scene.state) as (runtime, begun):
        found = await scene.end()
        assert not lives(runtime.pid)
        assert not lives(begun)
    assert found.containers == ("7",)
    assert found.processes == 2
    assert not scene.state.exists()


async def test_runtimes_of_others_are_spared(scene: Scene, tmp_path: Path) -> None:
    for state in (tmp_path / "state-of-another", tmp_path / "another" / "state"):
        with runtime_at_work(state) as (runtime, begun):
            assert not (await scene.end()).any
            assert lives(runtime.pid)
            assert lives(begun)


async def test_whoever_is_of_our_own_group_is_spared(scene: Scene) -> None:
    # As an operator who looks with `runc --root`, and a wrapper that has started us.
    command = ["sh", "-c", "echo begun; read word", "runc", "--root", str(scene.state), "list"]
    with subprocess.Popen(  # noqa: ASYNC220 - not waited for
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"begun\n"
            assert not (await scene.end()).any
            assert lives(process.pid)
        finally:
            process.kill()


@needs_hybrid
async def test_processes_in_groups_are_ended_and_containers_named_in_order(scene: Scene) -> None:
    with ExitStack() as stack:
        processes = []
        for oci_id in ("10", "9", "0"):
            name = scene.gateway.instance
            folders = stack.enter_context(v1_group(name, oci_id, "pids", "memory"))
            processes.append(stack.enter_context(process_in(folders, "sleep", "1000")))
        (scene.state / "11").mkdir()
        found = await scene.end()
        assert not any(lives(process.pid) for process in processes)
    # 0 is no container: the probe of a runtime.
    assert found.containers == ("9", "10", "11")
    assert found.processes == 3
    assert found.event() == PredecessorEnded(containers=("9", "10", "11"), processes=3)


async def test_mounts_are_taken_away(scene: Scene) -> None:
    scene.gateway.open()
    found = await scene.end()
    assert found.mounts
    assert found.notes
    assert not scene.gateway.path.exists()
    assert str(scene.gateway.path) not in Path("/proc/self/mountinfo").read_text()


def test_mounts_are_found_although_other_folders_are_passable_now() -> None:
    # Not in pytest's own folders: those are closed.
    with tempfile.TemporaryDirectory() as name:
        base, inner = Path(name), Path(name) / "inner"
        base.chmod(0o711)
        inner.mkdir()
        inner.chmod(0o711)
        before = Scene(inner)
        before.gateway.open()
        assert before.gateway.path.parent == inner
        inner.chmod(0o700)
        again = Gateway(inner, shared_size_mib=1)
        assert again.path.parent == base
        assert again.close()
        assert not before.gateway.path.exists()
        assert str(inner) not in Path("/proc/self/mountinfo").read_text()


async def test_what_resists_is_named(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    async def resists(self: ControlGroups, oci_id: str | None = None) -> set[int]:
        await trio.sleep_forever()
        return set()

    monkeypatch.setattr(ControlGroups, "end", resists)
    monkeypatch.setattr(ControlGroups, "members", lambda self: {4711})
    monkeypatch.setattr(leftovers, "TIMEOUT_S", 0.05)
    with pytest.raises(RuntimeFailed) as caught:
        await scene.end()
    assert caught.value.actual == "processes [4711]"


def test_a_note_names_some_and_counts_all() -> None:
    few = Leftovers(containers=("1", "2"), processes=5, mounts=True)
    assert few.notes == (
        "the supervisor before was killed; at this start what it had left was ended: "
        "containers: 2 (1, 2), processes: 5",
    )
    many = Leftovers(containers=tuple(map(str, range(1, 1001))), processes=1000, mounts=False)
    (note,) = many.notes
    assert "containers: 1000 (1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 990 more)" in note


# --- a real predecessor ---------------------------------------------------------------------


def require_ended(outcome: Outcome) -> None:
    assert outcome.said == "running"
    # Two containers, a command in one of them, its shell.
    assert len(outcome.found) >= 4
    assert outcome.members == ()
    assert outcome.alive == ()
    assert outcome.traces == ()
    assert {"1", "2"} <= set(outcome.ids)
    assert outcome.processes >= 4
    assert f"processes: {outcome.processes}" in outcome.notes[0]


@needs_hybrid
@pytest.mark.parametrize("delay_s", [0, 0.013, 0.029, 0.047, 0.071])
async def test_containers_commands_and_half_made_ones_are_ended_and_told(
    tmp_path: Path, delay_s: float
) -> None:
    require_ended(await succession(tmp_path, "auto", "auto", delay_s))


SUCCESSION = """
    import sys, msgspec, trio
    from pathlib import Path
    from oci_runtime_succession import succession

    outcome = trio.run(succession, Path(sys.argv[1]), *sys.argv[2:])
    print(msgspec.json.encode(outcome).decode())
"""


@pytest.mark.parametrize("names", [("crun", "runc"), ("runc", "crun")], ids=" then ".join)
def test_what_another_runtime_ran_is_ended_too(tmp_path: Path, names: tuple[str, str]) -> None:
    programs = [shutil.which(name, path=SEARCH_PATH) for name in names]
    if None in programs:
        pytest.skip("needs both runtimes")
    outcome = msgspec.convert(run_in_view("v2", SUCCESSION, tmp_path, *programs), Outcome)
    require_ended(outcome)
