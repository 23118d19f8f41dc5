"""What the image store takes beyond a layer's own bytes, in a process that holds nothing else."""

from __future__ import annotations

import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from benchmarks.figures import CannotMeasure, Figure, Goal, Section, require_root
from benchmarks.layer_inputs import (
    CACHE,
    USUAL_BYTES,
    USUAL_ENTRIES,
    Layer,
    machine_layers,
    synthetic_layer,
    warm,
)
from benchmarks.ram import ram_folder
from benchmarks.store_process import Result, Task

GOAL = Goal(at_most=64.0)
SAMPLE_S = 0.002
LOAD_TIMEOUT_S = 300
STOP_TIMEOUT_S = 60
_KB_PER_MB = 1_000_000 / 1024  # the kernel counts in units of 1,024 bytes


class Peaks(msgspec.Struct, kw_only=True):
    """Megabytes. `own`: the store's process beyond its start, without pages of the layer."""

    own: float = 0.0
    helpers: float = 0.0
    high_water: float = 0.0
    index: float = 0.0

    @property
    def total(self) -> float:
        return self.own + self.helpers + self.index


def run(
    *,
    cache: Path = CACHE,
    size_bytes: int = USUAL_BYTES,
    entries: int = USUAL_ENTRIES,
    large_bytes: int = 1_000_000_000,
) -> Section:
    require_root()
    (usual,) = machine_layers(cache, size_bytes=size_bytes, entries=entries)
    large = synthetic_layer(cache, size_bytes=large_bytes)
    figures: list[Figure] = []
    with ram_folder() as folder:
        for number, layer in enumerate((usual, large)):
            warm(layer.blob)
            peaks = _measure(folder / str(number), layer)
            figures += _figures(f"{layer.tar_bytes / 1e6:,.0f} MB", peaks)
    return Section(
        name="image_memory",
        title="Memory beyond the layer's own bytes",
        method=(
            "A fresh process that holds an open `Store` and nothing else, then takes a gzip layer "
            f"from a file to a mounted root: one of this machine's files ({usual}), one synthetic "
            f"({large}). Peaks of `RssAnon` and `RssFile`, looked at every "
            f"{SAMPLE_S * 1000:.0f} ms: of the process beyond what it had when the store was "
            "open, plus all of what its decompressor's process has of its own, plus the index. "
            "`VmHWM` counts also those pages of the layer that are mapped while the tar is read, "
            "which are the layer's own bytes. 1 MB is 1,000,000 bytes."
        ),
        figures=tuple(figures),
    )


def _figures(what: str, peaks: Peaks) -> list[Figure]:
    return [
        Figure(name=f"{what}, beyond its bytes", value=peaks.total, unit="MB", goal=GOAL),
        Figure(name=f"{what}, of it the process", value=peaks.own, unit="MB"),
        Figure(name=f"{what}, of it its decompressor", value=peaks.helpers, unit="MB"),
        Figure(name=f"{what}, of it the index", value=peaks.index, unit="MB"),
        Figure(name=f"{what}, VmHWM beyond start", value=peaks.high_water, unit="MB"),
    ]


def _measure(runtime_dir: Path, layer: Layer) -> Peaks:
    """Of one process, from before it fetches the layer until it has mounted it."""
    with _store_process() as process:
        _tell(process, msgspec.json.encode(_task(runtime_dir, layer)).decode())
        _hear(process, None)
        (_proc(process) / "clear_refs").write_text("5")  # VmHWM begins anew (proc(5))
        begun_mb = _megabytes(_proc(process) / "status", "VmHWM:")
        start_mb = _own_mb(_proc(process))
        peaks = Peaks()
        _tell(process, "go")

        def look() -> None:
            peaks.own = max(peaks.own, _own_mb(_proc(process)) - start_mb)
            peaks.helpers = max(peaks.helpers, _helpers_mb(_proc(process)))

        said = _hear(process, look)
        peaks.high_water = max(_megabytes(_proc(process) / "status", "VmHWM:") - begun_mb, 0.0)
        mounted_bytes = msgspec.json.decode(said, type=Result).mounted_bytes
        peaks.index = max(mounted_bytes - layer.tar_bytes, 0) / 1e6
        return peaks


@contextmanager
def _store_process() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.store_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        cwd=Path(__file__).resolve().parent.parent,
        start_new_session=True,  # Ctrl-C reaches the benchmark alone, which then ends it
    )
    try:
        yield process
    finally:
        # The end of its input lets it unmount and free; SIGKILL only if that was not enough.
        try:
            process.communicate(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def _task(runtime_dir: Path, layer: Layer) -> Task:
    return Task(runtime_dir=str(runtime_dir), layer=layer)


def _tell(process: subprocess.Popen[str], line: str) -> None:
    if process.stdin is not None:
        process.stdin.write(line + "\n")


def _hear(process: subprocess.Popen[str], look: Callable[[], None] | None) -> str:
    """Its next line; until it comes `look` is called again and again."""
    deadline = time.monotonic() + LOAD_TIMEOUT_S
    if process.stdout is None:
        raise RuntimeError("the process has no standard output")
    while not select.select([process.stdout], [], [], SAMPLE_S)[0]:
        if look is not None:
            look()
        if time.monotonic() > deadline:
            raise CannotMeasure(f"the store was not ready in {LOAD_TIMEOUT_S} s")
    line = process.stdout.readline()
    if not line:
        raise CannotMeasure("the process that held the store failed; its words are above")
    return line


def _proc(process: subprocess.Popen[str]) -> Path:
    return Path("/proc", str(process.pid))


def _own_mb(proc: Path) -> float:
    """What is not the layer's: its pages are shared memory (RssShmem) while they are mapped."""
    return _megabytes(proc / "status", "RssAnon:") + _megabytes(proc / "status", "RssFile:")


def _helpers_mb(proc: Path) -> float:
    """The share of its child processes, together. What ends meanwhile counts as nothing."""
    total = 0.0
    for task in (proc / "task").iterdir():
        with suppress(OSError):
            for child in (task / "children").read_text().split():
                total += _megabytes(Path("/proc", child, "smaps_rollup"), "Pss:")
    return total


def _megabytes(path: Path, key: str) -> float:
    for line in path.read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / _KB_PER_MB
    return 0.0  # a process that has ended has no memory
