"""Several jobs at once: their results in order, and one failure as it is."""

from __future__ import annotations

from functools import partial

import pytest
import trio
from trio.testing import MockClock

from acon.parallel import in_parallel
from supervisor.formats.errors import FormatError


async def test_results_come_in_the_order_of_the_jobs(autojump_clock: MockClock) -> None:
    async def job(number: int) -> int:
        await trio.sleep(10 - number)
        return number

    jobs = [partial(job, number) for number in range(5)]
    assert await in_parallel(jobs, at_once=2) == [0, 1, 2, 3, 4]
    assert await in_parallel([], at_once=2) == []


async def test_no_more_run_at_once_than_allowed_and_they_begin_in_order(
    autojump_clock: MockClock,
) -> None:
    running = most = 0
    begun: list[int] = []

    async def job(number: int) -> None:
        nonlocal running, most
        begun.append(number)
        running += 1
        most = max(most, running)
        await trio.sleep(1)
        running -= 1

    await in_parallel([partial(job, number) for number in range(9)], at_once=3)
    assert most == 3
    assert begun == sorted(begun)


async def test_the_first_failure_is_raised_bare_and_the_others_are_ended(
    autojump_clock: MockClock,
) -> None:
    ended: list[int] = []

    async def job(number: int) -> None:
        try:
            await trio.sleep(number)
        finally:
            ended.append(number)
        raise FormatError(str(number), "failed")

    with pytest.raises(FormatError) as caught:
        await in_parallel([partial(job, number) for number in (3, 1, 2)], at_once=3)
    assert caught.value.item == "1"
    assert sorted(ended) == [1, 2, 3]


async def test_an_interrupt_is_told_before_a_failure(autojump_clock: MockClock) -> None:
    async def interrupted() -> None:
        raise KeyboardInterrupt

    async def failing() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise FormatError("x", "failed while it was ended")

    with pytest.raises(KeyboardInterrupt):
        await in_parallel([failing, interrupted], at_once=2)


async def test_whoever_cancels_all_of_it_sees_no_failure(autojump_clock: MockClock) -> None:
    with trio.move_on_after(1) as scope:
        await in_parallel([trio.sleep_forever], at_once=1)
    assert scope.cancelled_caught
