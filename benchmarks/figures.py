"""What a benchmark says: figures with their units and goals, and how they were made."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import msgspec


class Goal(msgspec.Struct, frozen=True, kw_only=True):
    """A bound on a figure, in the figure's unit; exactly one of the two is given."""

    at_least: float | None = None
    at_most: float | None = None

    def met_by(self, value: float) -> bool:
        if self.at_least is not None:
            return value >= self.at_least
        return self.at_most is not None and value <= self.at_most


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One measured number. `unit` is a word after it ("ms", "a second", "times")."""

    name: str
    value: float
    unit: str
    goal: Goal | None = None

    @property
    def is_met(self) -> bool | None:
        return None if self.goal is None else self.goal.met_by(self.value)


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """One benchmark's outcome. `left_out` says what could not be measured here, and why.

    `conclusion`: what was decided by it, and how the figures decide it.
    """

    name: str
    title: str
    method: str
    figures: tuple[Figure, ...]
    left_out: tuple[str, ...] = ()
    conclusion: str = ""


class CannotMeasure(Exception):
    """This machine lacks what a benchmark needs; the text says what."""


def require_root() -> None:
    """Raises `CannotMeasure` for anybody else."""
    if os.geteuid() != 0:
        raise CannotMeasure("real containers need root")


class Stopwatch:
    """What one block took, after the block: by the clock, and of this process's processors."""

    seconds = 0.0
    processor_seconds = 0.0


@contextmanager
def stopwatch() -> Iterator[Stopwatch]:
    watch = Stopwatch()
    begun, begun_processor = time.perf_counter(), time.process_time()
    yield watch
    watch.seconds = time.perf_counter() - begun
    watch.processor_seconds = time.process_time() - begun_processor


def median_seconds(work: Callable[[], object], *, rounds: int) -> float:
    """How long one call takes, as the median of so many."""
    samples = []
    for _ in range(rounds):
        with stopwatch() as watch:
            work()
        samples.append(watch.seconds)
    return statistics.median(samples)


def median_ms(seconds: Sequence[float]) -> float:
    return statistics.median(seconds) * 1000


def percentile_ms(seconds: Sequence[float], percent: int) -> float:
    """What so many of a hundred took at most: the nearest rank."""
    rank = max(1, math.ceil(len(seconds) * percent / 100))
    return sorted(seconds)[rank - 1] * 1000
