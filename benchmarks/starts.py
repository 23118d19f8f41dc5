"""From a start request to a running process, beside the OCI runtime alone and Podman."""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from itertools import count
from pathlib import Path

import trio

from acon.client import Client
from benchmarks.figures import (
    CannotMeasure,
    Figure,
    Section,
    median_ms,
    require_root,
    stopwatch,
)
from benchmarks.machine import Machine
from benchmarks.ram import ram_folder
from benchmarks.starters import Acond, BareRuntime, Podman, Starter, make_layer
from plugins.oci_runtime.kernel import child_subreaper

AT_ONCE = 8
CLOSE_TIMEOUT_S = 120
ORPHANS_TIMEOUT_S = 30
POLL_S = 0.01
# Where Podman keeps its locks, whatever its options say.
PODMAN_LOCKS = Path("/dev/shm/libpod_lock")


def run(*, rounds: int = 15, rounds_at_once: int = 5) -> Section:
    require_root()
    runtime = shutil.which("runc")
    if runtime is None:
        raise CannotMeasure("runc is not installed")
    with ram_folder() as folder, _orphans_reaped(), Machine(folder) as machine:
        layer = folder / "layer.tar"
        make_layer(layer)
        machine.power_on()
        machine.boot()
        machine.start_daemon()
        one, many, left_out = trio.run(_compare, machine, runtime, layer, rounds, rounds_at_once)
    return Section(
        name="starts",
        title="Start request to running process",
        method=(
            "A static busybox that sleeps. `acond`: a request over its Unix socket until the "
            "answer; delegation, gates, measuring, mounting the layers, idmapping and the start "
            "through `runc` are in it, and each start has an event of its own in the log. `runc`: "
            "`runc run --detach` alone on a copy of the bundle that `acond` gave it, prepared "
            "beforehand. `podman`: `podman run --detach --network host --read-only` through the "
            "same runc, without a user namespace, image imported and tried beforehand. All "
            f"storage on one tmpfs; one after the other in turn, {rounds} rounds, medians; then "
            f"{AT_ONCE} requests at once until the last is answered, {rounds_at_once} rounds."
        ),
        figures=(*_figures(one, "one start"), *_figures(many, f"{AT_ONCE} starts at once")),
        left_out=left_out,
    )


Samples = dict[str, list[float]]


def _figures(samples: Samples, what: str) -> Iterator[Figure]:
    for name, seconds in samples.items():
        yield Figure(name=f"{what}, {name}", value=median_ms(seconds), unit="ms")
    ours = statistics.median(samples[Acond.name])
    for name, seconds in samples.items():
        if name != Acond.name:
            ratio = ours / statistics.median(seconds)
            yield Figure(name=f"{what}, acond beside {name}", value=ratio, unit="times")


async def _compare(
    machine: Machine, runtime: str, layer: Path, rounds: int, rounds_at_once: int
) -> tuple[Samples, Samples, tuple[str, ...]]:
    numbers = count(1)
    left_out: list[str] = []
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(Client.over_socket(machine.api))
        acond = Acond(client)
        await acond.load(layer)
        config = await _bundle_config(acond, machine, next(numbers))
        bare = await stack.enter_async_context(_bare(runtime, config, layer, machine))
        starters: list[Starter] = [acond, bare]
        try:
            starters.append(await stack.enter_async_context(_podman(runtime, layer, machine)))
        except CannotMeasure as error:
            left_out.append(f"podman: {error}")
        one = await _rounds(starters, numbers, rounds, at_once=1)
        many = await _rounds(starters, numbers, rounds_at_once, at_once=AT_ONCE)
    return one, many, tuple(left_out)


async def _bundle_config(acond: Acond, machine: Machine, number: int) -> bytes:
    """What `acond` gives to the runtime, taken from a container that runs."""
    await acond.start(number)
    bundles = machine.runtime_dir / "plugins" / "oci_runtime" / "bundles"
    config = (bundles / str(acond.id_of(number)) / "config.json").read_bytes()
    await acond.end(number)
    return config


@asynccontextmanager
async def _bare(
    runtime: str, config: bytes, layer: Path, machine: Machine
) -> AsyncIterator[BareRuntime]:
    bare = BareRuntime(runtime, config, layer, machine.folder / "bare")
    try:
        yield bare
    finally:
        with trio.move_on_after(CLOSE_TIMEOUT_S, shield=True):
            await bare.close()


@asynccontextmanager
async def _podman(runtime: str, layer: Path, machine: Machine) -> AsyncIterator[Podman]:
    executable = shutil.which("podman")
    if executable is None:
        raise CannotMeasure("it is not installed")
    with _podman_locks_as_before():
        reasons = []
        for driver in Podman.DRIVERS:
            folder = machine.folder / f"podman-{driver}"
            podman = Podman(executable, runtime, driver, folder)
            try:
                try:
                    await podman.load(layer)
                except CannotMeasure as error:
                    reasons.append(f"with {driver}: {error}")
                    continue
                yield podman
                return
            finally:
                with trio.move_on_after(CLOSE_TIMEOUT_S, shield=True):
                    await podman.close()
        raise CannotMeasure("; ".join(reasons))


@contextmanager
def _podman_locks_as_before() -> Iterator[None]:
    existed = PODMAN_LOCKS.exists()
    try:
        yield
    finally:
        if not existed:
            PODMAN_LOCKS.unlink(missing_ok=True)


async def _rounds(
    starters: Sequence[Starter], numbers: Iterator[int], rounds: int, *, at_once: int
) -> Samples:
    """In turn, so that whatever else the machine does falls on all of them alike."""
    samples: Samples = {starter.name: [] for starter in starters}
    for _ in range(rounds):
        for starter in starters:
            batch = [next(numbers) for _ in range(at_once)]
            for number in batch:
                await starter.prepare(number)
            with stopwatch() as watch:
                async with trio.open_nursery() as nursery:
                    for number in batch:
                        nursery.start_soon(starter.start, number)
            samples[starter.name].append(watch.seconds)
            for number in batch:
                await starter.end(number)
    return samples


@contextmanager
def _orphans_reaped() -> Iterator[None]:
    """Adopt what runtimes leave behind, and see it end; a machine's init may not do so."""
    with child_subreaper():
        before = _children()
        try:
            yield
        finally:
            for pid in _children() - before:
                _see_end(pid)


def _see_end(pid: int) -> None:
    """Wait for an orphan; past the deadline, end it."""
    deadline = time.monotonic() + ORPHANS_TIMEOUT_S
    with suppress(ChildProcessError):
        while os.waitpid(pid, os.WNOHANG)[0] == 0:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return
            time.sleep(POLL_S)


def _children() -> set[int]:
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        found.update(map(int, (task / "children").read_text().split()))
    return found
