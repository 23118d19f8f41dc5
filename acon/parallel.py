"""Several jobs at once, a bounded number of them, whose first failure is told as it is."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import trio

T = TypeVar("T")


async def in_parallel(jobs: Sequence[Callable[[], Awaitable[T]]], *, at_once: int) -> list[T]:
    """The jobs' results, in their order; they begin in it too, `at_once` (1 or more) of them.

    When one fails, or Ctrl-C is pressed, the others are cancelled and awaited, and that one
    exception is raised bare: whoever turns it into words need not look into groups.
    """
    results: dict[int, T] = {}
    waiting = iter(enumerate(jobs))

    async def work() -> None:
        for number, job in waiting:
            results[number] = await job()

    try:
        async with trio.open_nursery() as nursery:
            for _worker in range(min(at_once, len(jobs))):
                nursery.start_soon(work)
    except BaseExceptionGroup as group:
        raise _first(group) from None
    return [results[number] for number in range(len(jobs))]


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What to tell: an interrupt before all, then that somebody outside cancelled us."""
    leaves: list[BaseException] = []
    waiting: list[BaseException] = [group]
    while waiting:
        one = waiting.pop(0)
        if isinstance(one, BaseExceptionGroup):
            waiting += one.exceptions
        else:
            leaves.append(one)
    leaves.sort(key=lambda one: (isinstance(one, Exception), isinstance(one, trio.Cancelled)))
    return leaves[0]
