"""From a start request to the program's first instruction, beside runc alone and Podman."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from functools import partial
from itertools import count

import trio

from acon.parallel import in_parallel
from benchmarks.bare_runtime import BareRuntime, bare_runtime, require_runc
from benchmarks.container_machine import ContainerMachine, container_machine
from benchmarks.figures import CannotMeasure, Figure, Goal, Section, median_ms, percentile_ms
from benchmarks.podman import Podman, podman_storage
from benchmarks.starters import Acond, Starter

AT_ONCE = 8
ATTEMPTS = 3
RUNC_GOAL = Goal(at_most=1.5)
PODMAN_GOAL = Goal(at_most=1 / 3)

# Name of the starter -> seconds: of each start, or of all together.
Samples = dict[str, list[float]]
Totals = dict[str, float]


def run(*, rounds: int = 100) -> Section:
    require_runc()
    with container_machine() as machine:
        one, many, left_out = trio.run(_compare, machine, rounds)
    return Section(
        name="starts",
        title="Start request to the program's first instruction",
        method=(
            "A static program of a few instructions, whose first is to ask for the time, which "
            "it then writes. From before the request until that time. `acond`: a request over "
            "its Unix socket; delegation, gates, measuring, mounting the layers, idmapping and "
            "the start through `runc` are in it, and each start has an event of its own in the "
            "log. `runc`: `runc run` alone on a copy of the bundle that `acond` gave it, "
            "prepared beforehand, without the shim. `podman`: `podman run --network host "
            "--read-only` through the same runc, image imported and tried beforehand: without a "
            "user namespace, as is its default, and with one of each container's own "
            "(`--uidmap`, `--gidmap`), as `acond`'s have. All storage on one tmpfs. One after "
            f"another: in turn, each ended before the next, {rounds} of each, medians. "
            f"{AT_ONCE} at a time: {rounds} of each, none ended before the last runs; from the "
            "first request until the last program's first instruction."
        ),
        figures=(*_one_figures(one), *_many_figures(many, rounds)),
        left_out=left_out,
    )


def _one_figures(samples: Samples) -> Iterator[Figure]:
    for name, seconds in samples.items():
        yield Figure(name=f"one start, {name}", value=median_ms(seconds), unit="ms")
        yield Figure(
            name=f"one start, {name}, 90 of 100 within", value=percentile_ms(seconds, 90), unit="ms"
        )
    medians = {name: statistics.median(seconds) for name, seconds in samples.items()}
    yield from _beside(medians, "one start")


def _many_figures(totals: Totals, starts: int) -> Iterator[Figure]:
    what = f"{starts} starts, {AT_ONCE} at a time"
    for name, seconds in totals.items():
        yield Figure(name=f"{what}, {name}", value=seconds, unit="s")
        yield Figure(name=f"{what}, {name}, each", value=seconds / starts * 1000, unit="ms")
    yield from _beside(totals, what)


def _beside(seconds: Totals, what: str) -> Iterator[Figure]:
    for name, other in seconds.items():
        if name != Acond.name:
            yield Figure(
                name=f"{what}, acond beside {name}",
                value=seconds[Acond.name] / other,
                unit="times",
                goal=RUNC_GOAL if name == BareRuntime.name else PODMAN_GOAL,
            )


async def _compare(
    machine: ContainerMachine, rounds: int
) -> tuple[Samples, Totals, tuple[str, ...]]:
    numbers = count(1)
    left_out: list[str] = []
    async with AsyncExitStack() as stack:
        _, acond = await stack.enter_async_context(machine.acond())
        bare = await stack.enter_async_context(
            bare_runtime(acond, machine.machine, machine.layer, next(numbers))
        )
        starters: list[Starter] = [acond, bare]
        try:
            storage = await stack.enter_async_context(
                podman_storage(require_runc(), machine.layer, machine.machine.folder)
            )
        except CannotMeasure as error:
            left_out.append(str(error))
        else:
            starters.append(Podman(storage, name="podman"))
            own_ids = Podman(storage, name="podman with own ids", own_ids=True)
            try:
                await _measured_start(own_ids, numbers)
                starters.append(own_ids)
            except CannotMeasure as error:
                left_out.append(f"{own_ids.name}: {error}")
        one: Samples = {starter.name: [] for starter in starters}
        for _ in range(rounds):
            # In turn, so that whatever else the machine does falls on all of them alike.
            for starter in starters:
                one[starter.name].append(await _measured_start(starter, numbers))
        many: Totals = {}
        for starter in starters:
            try:
                many[starter.name] = await _many_starts(
                    starter, [next(numbers) for _ in range(rounds)]
                )
            except CannotMeasure as error:
                if not isinstance(starter, Podman):
                    raise
                left_out.append(f"{starter.name}, {AT_ONCE} at a time: {error}")
    return one, many, tuple(left_out)


async def _measured_start(starter: Starter, numbers: Iterator[int]) -> float:
    """`_one_start`, more than once if need be: now and then Podman (4.3) may not pass through
    its own storage for a moment. What failed is not in the figures."""
    for attempts_left in reversed(range(ATTEMPTS)):
        try:
            return await _one_start(starter, next(numbers))
        except CannotMeasure:
            if not attempts_left:
                raise
    raise AssertionError("ATTEMPTS is positive")


async def _one_start(starter: Starter, number: int) -> float:
    """Seconds from the request to the first instruction; ended again."""
    await starter.prepare(number)
    begun = time.monotonic()
    await starter.start(number)
    taken = await starter.first_instruction(number) - begun
    await starter.end(number)
    return taken


async def _many_starts(starter: Starter, numbers: Sequence[int]) -> float:
    """Seconds until the last of them has run its first instruction; all ended again."""
    for number in numbers:
        await starter.prepare(number)
    begun = time.monotonic()
    await in_parallel([partial(starter.start, number) for number in numbers], at_once=AT_ONCE)
    taken = max([await starter.first_instruction(number) for number in numbers]) - begun
    await in_parallel([partial(starter.end, number) for number in numbers], at_once=AT_ONCE)
    return taken
