"""Sides of a comparison, measured in turn, and what their times say beside each other."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import trio

from benchmarks.figures import Figure, Goal, stopwatch
from benchmarks.image_peers import Side

_TIDY_TIMEOUT_S = 120

Samples = dict[str, float]


async def median_of_rounds(sides: Sequence[Side], *, rounds: int) -> Samples:
    """Seconds by name, medians. In turn, so that what else the machine does falls on all alike."""
    samples: dict[str, list[float]] = {side.name: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            try:
                await side.prepare()
                with stopwatch() as watch:
                    await side.work()
                samples[side.name].append(watch.seconds)
            finally:
                with trio.move_on_after(_TIDY_TIMEOUT_S, shield=True):
                    await side.tidy()
    return {name: statistics.median(seconds) for name, seconds in samples.items()}


def times_of(samples: Samples, *, what: str) -> list[Figure]:
    return [
        Figure(name=f"{what}, {name}", value=seconds, unit="s") for name, seconds in samples.items()
    ]


def beside(
    seconds: float, other: float, *, what: str, other_name: str, at_most: float | None = None
) -> Figure:
    """`seconds` as a multiple of `other`."""
    return Figure(
        name=f"{what}, beside {other_name}",
        value=seconds / other,
        unit="times",
        goal=None if at_most is None else Goal(at_most=at_most),
    )
