"""Every benchmark still runs, says what it measured, and leaves nothing. No speed is asserted."""

from __future__ import annotations

import gzip
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trio

from benchmarks import (
    admission,
    clock_program,
    daemon_start,
    exit_to_event,
    hook_calls,
    idle,
    image_index,
    image_memory,
    image_sources,
    image_transfers,
    invoke,
    layer_inputs,
    measuring,
    ram,
    report,
    starts,
    verifying,
)
from benchmarks.__main__ import BENCHMARKS, main
from benchmarks.figures import CannotMeasure, Figure, Goal, Section, percentile_ms
from benchmarks.foreground import Foreground
from benchmarks.ram import ram_folder
from plugins.oci_runtime.hierarchies import visible_hierarchies
from supervisor.formats.elf import instructions

REPOSITORY = Path(__file__).resolve().parent.parent
MACHINE = report.MachineWords(
    cores=2,
    architecture="x86_64",
    kernel="Linux 6.1",
    python="3.11.2",
    runc="1.1.5",
    podman=None,
    skopeo=None,
    umoci=None,
    load_at_start=0.25,
)
AT = datetime(2026, 1, 15, tzinfo=UTC)

# httpx leaves the streams below an answer to the garbage collector.
UNFINISHED_ANSWERS = pytest.mark.filterwarnings("ignore:Async generator 'http:ResourceWarning")


def traces() -> set[str]:
    """Mounts, folders and control groups of benchmarks."""
    found = {
        line.split()[1]
        for line in Path("/proc/self/mounts").read_text().splitlines()
        if "acon-bench-" in line
    }
    groups = (one.mount_point for one in visible_hierarchies())
    for folder in (Path("/dev/shm"), Path("/run"), *groups):
        found |= {str(path) for path in folder.glob("acon*-bench-*")}
    return found


def figures_of(benchmark: Callable[[], Section], *, noisy: str = "!") -> dict[str, Figure]:
    """`noisy`: names with this word in them measure the whole machine, and may find nothing."""
    before = traces()
    section = benchmark()
    assert traces() <= before, "it cleans up after itself"
    assert section.name in BENCHMARKS
    figures = {figure.name: figure for figure in section.figures}
    assert len(figures) == len(section.figures), "no two figures have one name"
    for figure in figures.values():
        assert math.isfinite(figure.value), figure
        assert figure.value > 0 or noisy in figure.name, figure
    return figures


def test_hook_calls_are_counted_by_call_and_by_walk() -> None:
    figures = figures_of(lambda: hook_calls.run(walks=5, rounds=1))
    calls, walks = figures["calls"], figures["walks through all 8"]
    assert calls.value == pytest.approx(8 * walks.value)
    assert calls.goal == Goal(at_least=50_000)


def test_admission_is_measured_on_one_core_and_the_others_come_back() -> None:
    before = os.sched_getaffinity(0)
    figures = figures_of(lambda: admission.run(images=6))
    assert os.sched_getaffinity(0) == before
    assert figures["admissions in a second of one core"].goal == Goal(at_least=300)


def test_measuring_is_compared_with_a_bare_extension() -> None:
    figures = figures_of(lambda: measuring.run(events=3))
    ratio = (
        figures["measured event, software TD"].value / figures["bare extension, software TD"].value
    )
    assert figures["measured beside bare"].value == pytest.approx(ratio)


def test_verifying_is_compared_with_what_nobody_can_leave_out() -> None:
    assert "whole beside both" in figures_of(lambda: verifying.run(rounds=1))


@pytest.mark.root
def test_the_daemons_start_and_memory_are_measured() -> None:
    figures = figures_of(lambda: daemon_start.run(rounds=1))
    assert figures["ready"].goal == Goal(at_most=1.0)
    assert figures["resident (VmRSS)"].goal == Goal(at_most=64.0)
    assert figures["of it its own share (PSS)"].value <= figures["resident (VmRSS)"].value


@UNFINISHED_ANSWERS
@pytest.mark.root
def test_starts_are_compared_with_the_runtime_alone_and_with_podman() -> None:
    figures = figures_of(lambda: starts.run(rounds=2))
    for what in ("one start", "2 starts, 8 at a time"):
        assert figures[f"{what}, acond beside runc"].goal == Goal(at_most=1.5)
        for podman in ("podman", "podman with own ids"):
            beside = figures.get(f"{what}, acond beside {podman}")
            assert beside is None or beside.goal == Goal(at_most=1 / 3)


@pytest.mark.root
def test_invocations_are_compared_with_what_executes_in_the_same_container() -> None:
    figures = figures_of(lambda: invoke.run(rounds=2))
    ratio = figures["acond"].value / figures["runc exec"].value
    assert figures["acond, beside runc exec"].value == pytest.approx(ratio)
    assert figures["acond, beside runc exec"].goal == Goal(at_most=1.3)


@pytest.mark.root
def test_idle_containers_are_counted_and_their_supervisor_watched() -> None:
    figures = figures_of(lambda: idle.run(containers=10, watched_s=0.1), noisy="while idle")
    assert figures["resident (VmRSS)"].goal == Goal(at_most=100.0)
    assert figures["processor while idle"].goal == Goal(at_most=1.0)


@UNFINISHED_ANSWERS
@pytest.mark.root
def test_the_way_from_an_end_to_its_event_is_measured() -> None:
    figures = figures_of(lambda: exit_to_event.run(rounds=3))
    assert figures["median"].goal == Goal(at_most=5.0)
    assert figures["90 of 100 within"].value >= figures["median"].value


def test_the_program_that_is_started_tells_the_time_of_its_first_instruction(
    tmp_path: Path,
) -> None:
    program = tmp_path / "clock"
    program.write_bytes(clock_program.clock_program())
    program.chmod(0o755)
    before = time.monotonic()
    with subprocess.Popen([program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        told = clock_program.time_in(process.stdout.readline())
        after = time.monotonic()
        assert process.poll() is None, "it waits"
        process.kill()
    assert before <= told <= after


@pytest.mark.parametrize("line", [b"", b"aa\n", b"a" * 31, b"a" * 31 + b"q", b"A" * 32])
def test_words_that_are_no_time_are_not_taken_for_one(line: bytes) -> None:
    with pytest.raises(CannotMeasure):
        clock_program.time_in(line)


@pytest.mark.parametrize(
    ("triple", "header"), [("x86_64", ".intel_syntax noprefix"), ("aarch64", "")]
)
def test_the_started_programs_bytes_are_what_an_assembler_makes_of_its_listing(
    tmp_path: Path, triple: str, header: str
) -> None:
    assembler, objcopy = shutil.which("llvm-mc"), shutil.which("llvm-objcopy")
    if assembler is None or objcopy is None:
        pytest.skip("llvm-mc and llvm-objcopy (Debian: llvm) are not installed")
    listing = clock_program.LISTINGS[triple]
    source, made, code = (tmp_path / name for name in ("clock.s", "clock.o", "clock.bin"))
    source.write_text("\n".join([header, *(line[24:] for line in listing.splitlines()), ""]))
    subprocess.run(
        [assembler, f"-triple={triple}", "-filetype=obj", source, "-o", made], check=True
    )
    subprocess.run([objcopy, "-O", "binary", "-j", ".text", made, code], check=True)
    assert code.read_bytes() == instructions(listing)


@pytest.mark.parametrize(
    ("percent", "expected"), [(0, 10), (10, 10), (50, 50), (90, 90), (91, 100), (100, 100)]
)
def test_a_percentile_is_one_of_the_samples(percent: int, expected: int) -> None:
    samples = [number / 1000 for number in (30, 10, 20, 100, 50, 40, 90, 60, 80, 70)]
    assert percentile_ms(samples, percent) == pytest.approx(expected)


def test_a_command_that_starts_nothing_is_told_in_its_own_words(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = ["/bin/sh", "-c", "echo no such image >&2; exit 125"]
    with pytest.raises(CannotMeasure, match="no such image"):
        trio.run(Foreground.start, command, log)


@pytest.mark.root
def test_an_image_from_every_source_is_compared_with_what_others_do(tmp_path: Path) -> None:
    figures = figures_of(
        lambda: image_sources.run(
            rounds=1, cache=tmp_path, size_bytes=2_000_000, entries=50, small_files=150
        )
    )
    longer = "the longer of isal alone and SHA-384 alone"
    assert figures[f"layout, beside {longer}"].goal == Goal(at_most=1.3)
    goals = {
        ("podman", "layout, beside podman pull"): 1 / 5,
        ("umoci", "layout, beside umoci unpack"): 1 / 5,
        ("podman", "small files, beside podman pull"): 1 / 3,
        ("docker-registry", "registry, beside skopeo copy + umoci unpack"): 1 / 4,
    }
    for (program, name), bound in goals.items():
        if shutil.which(program) is not None:
            assert figures[name].goal == Goal(at_most=bound)


@pytest.mark.root
def test_layers_at_once_are_compared_with_one_after_another(tmp_path: Path) -> None:
    figures = figures_of(
        lambda: image_transfers.run(
            rounds=1,
            present_rounds=2,
            cache=tmp_path,
            layers=3,
            layer_bytes=200_000,
            layer_entries=5,
            present_bytes=200_000,
            present_entries=5,
        )
    )
    assert figures["one after another beside in parallel"].goal == Goal(at_least=1.7)
    assert figures["fetching what is there"].goal == Goal(at_most=2.0)


@pytest.mark.root
def test_memory_is_measured_beyond_the_layers_own_bytes(tmp_path: Path) -> None:
    figures = figures_of(
        lambda: image_memory.run(
            cache=tmp_path, size_bytes=2_000_000, entries=50, large_bytes=30_000_000
        ),
        noisy="of it",
    )
    totals = [figure for name, figure in figures.items() if name.endswith("beyond its bytes")]
    assert [figure.goal for figure in totals] == [Goal(at_most=64.0)] * 2


@pytest.mark.root
def test_both_kinds_of_index_show_the_same_files_and_are_compared(tmp_path: Path) -> None:
    figures = figures_of(
        lambda: image_index.run(
            rounds=1,
            cache=tmp_path,
            counts=(1, 3),
            layer_bytes=200_000,
            layer_entries=5,
            sharing=2,
            base_bytes=2_000_000,
            base_entries=20,
        ),
        noisy="page cache",
    )
    assert "3 layers, one merged index: root" in figures
    assert "2 images, an index per layer: page cache" in figures


def test_a_layer_to_measure_with_is_made_once(tmp_path: Path) -> None:
    first = layer_inputs.machine_layers(tmp_path, size_bytes=300_000, entries=20, count=2)
    again = layer_inputs.machine_layers(tmp_path, size_bytes=300_000, entries=20, count=2)
    assert first == again and first[0].sha384 != first[1].sha384
    assert gzip.decompress(Path(first[0].blob).read_bytes()) == Path(first[0].tar).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "machine-300000-20-2-0",
        "machine-300000-20-2-1",
    ]


def test_small_files_are_as_many_as_asked_for(tmp_path: Path) -> None:
    layer = layer_inputs.small_files_layer(tmp_path, files=150)
    with tarfile.open(layer.tar) as archive:
        assert sum(member.isreg() and member.size == 200 for member in archive) == 150
    assert layer.entries == 152


@pytest.mark.root
def test_an_interrupted_comparison_leaves_nothing(tmp_path: Path) -> None:
    before = traces()
    with (tmp_path / "output").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks", "starts"],
            cwd=REPOSITORY,
            stdout=output,
            stderr=output,
        )
    try:
        deadline = time.monotonic() + 120
        # It is in the middle of it once it has made control groups of its own.
        while not any("acond-bench-" in trace for trace in traces() - before):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.terminate()
        assert process.wait(120) == 130, (tmp_path / "output").read_text()
    finally:
        process.kill()
        process.wait()
    assert traces() <= before


@pytest.mark.root
def test_a_ram_folder_is_mounted_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ram, "PLACES", ())
    before = traces()
    with ram_folder() as folder:
        assert any(trace == str(folder) for trace in traces() - before), "it is a mount"
    assert not folder.exists()
    assert traces() <= before


def test_a_ram_folder_goes_also_when_its_user_fails() -> None:
    with pytest.raises(ZeroDivisionError), ram_folder() as folder:
        (folder / "file").write_bytes(b"x")
        raise ZeroDivisionError
    assert not folder.exists()


# --- the page -------------------------------------------------------------------------------


def section(*figures: Figure, left_out: tuple[str, ...] = ()) -> Section:
    return Section(
        name="some", title="Something", method="As it is.", figures=figures, left_out=left_out
    )


def test_the_page_says_of_each_goal_whether_it_was_met() -> None:
    page = report.render(
        [
            section(
                Figure(name="fast", value=400, unit="a second", goal=Goal(at_least=300)),
                Figure(name="slow", value=2.5, unit="s", goal=Goal(at_most=1)),
                Figure(name="free", value=12_345.6, unit="a second"),
            )
        ],
        MACHINE,
        AT,
    )
    assert "| fast | 400 a second | at least 300 a second | yes |" in page
    assert "| slow | 2.5 s | at most 1 s | **no** |" in page
    assert "| free | 12,300 a second |  |  |" in page
    assert "2026-01-15" in page and "./run bench" in page
    assert "2 cores (x86_64), Linux 6.1, Python 3.11.2, runc 1.1.5" in page


def test_the_page_says_what_was_left_out_and_why() -> None:
    page = report.render([section(left_out=("podman: it is not installed",))], MACHINE, AT)
    assert "Left out: podman: it is not installed" in page


def test_the_page_says_what_was_decided() -> None:
    decided = Section(name="a", title="A", method="", figures=(), conclusion="**Decision: both.**")
    assert "\n**Decision: both.**\n" in report.render([decided], MACHINE, AT)


def test_the_machines_words_hold_no_name_of_it() -> None:
    words = str(report.describe_machine())
    assert platform.node() not in words.split()
    assert platform.python_version() in words


# --- the command ----------------------------------------------------------------------------


def impossible() -> Section:
    raise CannotMeasure("needs a machine that is not this one")


def test_the_command_writes_the_page_only_when_all_ran(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "performance.md"
    figure = Figure(name="fast", value=400, unit="a second", goal=Goal(at_least=300))
    benchmarks = {"some": lambda: section(figure), "other": lambda: section()}
    out = tmp_path / "figures.json"
    assert main(["some", "--json", str(out)], benchmarks=benchmarks, page=page) == 0
    assert not page.exists()
    assert json.loads(out.read_bytes())["sections"][0]["figures"][0]["value"] == 400
    assert main([], benchmarks=benchmarks, page=page) == 0
    assert "| fast | 400 a second |" in page.read_text()


def test_what_cannot_run_here_fails_the_command_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "performance.md"
    assert main([], benchmarks={"impossible": impossible}, page=page) == 1
    assert "needs a machine that is not this one" in page.read_text()
    assert "needs a machine that is not this one" in capsys.readouterr().out


def test_an_unknown_benchmark_is_wrong_usage() -> None:
    with pytest.raises(SystemExit) as caught:
        main(["no-such-benchmark"])
    assert caught.value.code == 2
