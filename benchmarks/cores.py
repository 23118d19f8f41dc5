"""How many of the machine's cores something may use, and how many it did use."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def one_core() -> Iterator[None]:
    """Hold every thread of this process, and what they start, on one core."""
    before = os.sched_getaffinity(0)
    _hold_on({min(before)})
    try:
        yield
    finally:
        _hold_on(before)


def _hold_on(cores: set[int]) -> None:
    for thread in Path("/proc/self/task").iterdir():
        try:
            os.sched_setaffinity(int(thread.name), cores)
        except ProcessLookupError:  # it ended meanwhile
            continue


def used_seconds() -> float:
    """Processor time so far, of this process and of its children that have ended."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
