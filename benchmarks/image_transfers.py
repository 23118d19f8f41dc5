"""Many layers at once beside one after another, and a layer that is there already."""

from __future__ import annotations

import signal
import statistics
from collections.abc import Sequence
from pathlib import Path

import tomli_w
import trio

from acon.client import Client
from benchmarks.compare import median_of_rounds
from benchmarks.cores import one_core
from benchmarks.figures import Figure, Goal, Section, median_ms, require_root, stopwatch
from benchmarks.layer_inputs import CACHE, USUAL_BYTES, USUAL_ENTRIES, Layer, machine_layers, warm
from benchmarks.machine import Machine
from benchmarks.program_image import PROGRAM
from benchmarks.ram import ram_folder
from benchmarks.store_side import StoreSide, from_files, open_store
from supervisor.testing import Owner, manifest

PARALLEL_GOAL = Goal(at_least=1.7)
PRESENT_GOAL = Goal(at_most=2.0)
ONE, MANY = "one after another", "in parallel"
ONE_CORE = "one after another on one core"


def run(
    *,
    rounds: int = 5,
    present_rounds: int = 100,
    cache: Path = CACHE,
    layers: int = 20,
    layer_bytes: int = 12_000_000,
    layer_entries: int = 500,
    present_bytes: int = USUAL_BYTES,
    present_entries: int = USUAL_ENTRIES,
) -> Section:
    require_root()
    many = machine_layers(cache, size_bytes=layer_bytes, entries=layer_entries, count=layers)
    (present,) = machine_layers(cache, size_bytes=present_bytes, entries=present_entries)
    warm(*(layer.blob for layer in many))
    settings = tomli_w.dumps(
        {"plugin": {"image_store": {"file_roots": [str(Path(present.blob).parent)]}}}
    )
    with ram_folder() as folder, Machine(folder, settings=settings) as machine:
        samples, used = trio.run(_each_way, folder, many, rounds)
        machine.power_on()
        machine.boot()
        machine.start_daemon()
        fetched, asked = trio.run(_present, machine, present, present_rounds)
    each = sum(layer.tar_bytes for layer in many) / len(many) / 1e6
    return Section(
        name="image_transfers",
        title="Many layers at once, and a layer that is there already",
        method=(
            f"{layers} layers of this machine's files, {each:.0f} MB each, packed by `gzip -6`, "
            "from files to a mounted root. Image store: its `Store` used directly, in RAM; "
            "`parallel_layers = 1` for one after another, its default for in parallel. Also one "
            "after another already uses a second core: a layer is decompressed in one process "
            "while another hashes and stores it; how many cores were busy is told, and what one "
            "core alone takes. In turn, "
            "a request to `acond` over its Unix socket until the answer, for fetching it again "
            f"and for its state. Median of {present_rounds}."
        ),
        figures=(
            *(
                Figure(name=f"{layers} layers, {way}", value=seconds, unit="s")
                for way, seconds in samples.items()
            ),
            *(
                Figure(name=f"{way}, cores busy", value=used[way] / seconds, unit="cores")
                for way, seconds in samples.items()
            ),
            Figure(
                name=f"{ONE} beside {MANY}",
                value=samples[ONE] / samples[MANY],
                unit="times",
                goal=PARALLEL_GOAL,
            ),
            Figure(
                name=f"{ONE_CORE} beside {MANY}",
                value=samples[ONE_CORE] / samples[MANY],
                unit="times",
            ),
            Figure(name="fetching what is there", value=fetched, unit="ms", goal=PRESENT_GOAL),
            Figure(name="asking whether it is there", value=asked, unit="ms", goal=PRESENT_GOAL),
        ),
    )


class _OnOneCore(StoreSide):
    async def work(self) -> None:
        with one_core():
            await super().work()


async def _each_way(
    folder: Path, many: Sequence[Layer], rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds by the clock, and of processors, by the name of the way; medians."""
    roots = [Path(layer.blob).parent for layer in many]
    async with (
        open_store(folder / "store-1", file_roots=roots, parallel_layers=1) as first,
        open_store(folder / "store-2", file_roots=roots) as second,
    ):
        sides = [
            StoreSide(first, from_files(many), name=ONE),
            StoreSide(second, from_files(many), name=MANY),
            _OnOneCore(first, from_files(many), name=ONE_CORE),
        ]
        samples = await median_of_rounds(sides, rounds=rounds)
    return samples, {side.name: statistics.median(side.used_s) for side in sides}


async def _present(machine: Machine, layer: Layer, rounds: int) -> tuple[float, float]:
    """Milliseconds for fetching it again, and for its state."""
    fetched: list[float] = []
    asked: list[float] = []
    image = manifest(
        name="present:1",
        layers=[str(layer.digest)],
        entrypoint=[PROGRAM],
        signals=[int(signal.SIGKILL)],
    )
    async with Client.over_socket(machine.api) as client:
        await client.admit([Owner("somebody").sign(image)])
        await client.fetch_layer(layer.digest, layer.source)
        for _ in range(rounds):
            with stopwatch() as watch:
                await client.fetch_layer(layer.digest, layer.source)
            fetched.append(watch.seconds)
            with stopwatch() as watch:
                state = await client.layer_state(layer.digest)
            asked.append(watch.seconds)
            if state.state != "verified":
                raise RuntimeError(f"{layer.digest} is {state.state}")
    return median_ms(fetched), median_ms(asked)
