from __future__ import annotations

import pytest
import trio
import trio.testing

from plugins.oci_runtime.pace import Pace


async def test_turns_of_many_never_fall_together_and_go_round(
    autojump_clock: trio.testing.MockClock,
) -> None:
    pace = Pace(bytes_per_s=1000, reads_per_s=1000, rest_s=0)
    turns: list[tuple[float, int]] = []

    async def flood(number: int) -> None:
        while True:
            turns.append((round(trio.current_time(), 3), number))
            await pace.rest(99)  # worth 0.1 s with the read itself

    with trio.move_on_after(10.05):
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(flood, number)
    later = turns[20:]
    times = [time_s for time_s, _ in later]
    assert times == sorted(set(times))
    assert len(later) == 100
    assert {sum(1 for _, who in later if who == number) for number in range(20)} == {5}


async def test_one_reader_alone_rests_no_longer_than_it_must(
    autojump_clock: trio.testing.MockClock,
) -> None:
    pace = Pace(bytes_per_s=1000, reads_per_s=1000, rest_s=0.5)
    await pace.rest(9)
    assert trio.current_time() == pytest.approx(0.5)
    await pace.rest(999)
    assert trio.current_time() == pytest.approx(1.5)
    await trio.sleep(100)
    await pace.rest(9)
    assert trio.current_time() == pytest.approx(102)
