from __future__ import annotations

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from plugins.image_store.registry.patience import Passing, Patience, persist, retry_after_s
from supervisor import DeadlineExceeded, RuntimeFailed

DATE = "Wed, 21 Oct 2015 07:28:00 GMT"


@given(st.integers(1, 10_000), st.none() | st.floats(0, 1e9))
def test_pauses_double_with_jitter_and_never_exceed_their_bound(
    failures: int, asked_s: float | None
) -> None:
    patience = Patience(first_pause_s=1, longest_pause_s=20)
    pause_s = patience.pause_s(failures, asked_s)
    doubled_s = min(20.0, 2.0 ** min(failures - 1, 20))
    assert doubled_s / 2 <= pause_s <= 20
    if asked_s is None:
        assert pause_s <= doubled_s
    else:
        assert pause_s >= min(asked_s, 20)


@pytest.mark.parametrize(
    ("text", "date", "seconds"),
    [
        (None, DATE, None),
        ("7", None, 7.0),
        (" 120 ", DATE, 120.0),
        ("Wed, 21 Oct 2015 07:28:30 GMT", DATE, 30.0),
        ("Wed, 21 Oct 2015 07:27:00 GMT", DATE, 0.0),
        ("Wed, 21 Oct 2015 07:28:30 GMT", None, None),
        ("Wed, 21 Oct 2015 07:28:30 -0000", DATE, None),
        ("soon", DATE, None),
        ("-1", DATE, None),
        ("1.5", DATE, None),
        ("9" * 400, DATE, None),
        ("²", DATE, None),
    ],
)
def test_a_retry_after_counts_from_the_answers_own_date(
    text: str | None, date: str | None, seconds: float | None
) -> None:
    assert retry_after_s(text, date) == seconds


@given(st.text(max_size=40), st.none() | st.text(max_size=40))
def test_no_retry_after_makes_the_reader_fail(text: str, date: str | None) -> None:
    seconds = retry_after_s(text, date)
    assert seconds is None or seconds >= 0


class Attempts:
    """Fails some times, then answers; knows when it was asked."""

    def __init__(self, failures: int, *, maybe_done: bool = True) -> None:
        self.at_s: list[float] = []
        self._failures = failures
        self._maybe_done = maybe_done

    async def __call__(self) -> str:
        self.at_s.append(trio.current_time())
        if len(self.at_s) <= self._failures:
            raise Passing(RuntimeFailed("it", "failed"), maybe_done=self._maybe_done)
        return "done"


async def test_attempts_end_with_the_first_answer(autojump_clock: trio.testing.MockClock) -> None:
    attempts = Attempts(3)
    answer = await persist(attempts, Patience(first_pause_s=1), item="it", attempts=5)
    assert answer == "done"
    pauses_s = [b - a for a, b in zip(attempts.at_s, attempts.at_s[1:], strict=False)]
    assert len(pauses_s) == 3
    assert all(n / 2 <= pause_s <= n for n, pause_s in zip((1, 2, 4), pauses_s, strict=True))


async def test_the_last_refusal_is_raised_when_no_attempt_is_left(
    autojump_clock: trio.testing.MockClock,
) -> None:
    attempts = Attempts(100)
    with pytest.raises(RuntimeFailed, match="it: failed"):
        await persist(attempts, Patience(), item="it", attempts=4)
    assert len(attempts.at_s) == 4


async def test_what_may_have_been_done_is_repeated_only_if_that_changes_nothing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    uncertain, certain = Attempts(1), Attempts(1, maybe_done=False)
    with pytest.raises(RuntimeFailed):
        await persist(uncertain, Patience(), item="it", attempts=4, idempotent=False)
    assert len(uncertain.at_s) == 1
    assert await persist(certain, Patience(), item="it", attempts=4, idempotent=False) == "done"


async def test_each_attempt_has_its_own_bound(autojump_clock: trio.testing.MockClock) -> None:
    began_s = trio.current_time()
    with pytest.raises(DeadlineExceeded) as caught:
        await persist(
            trio.sleep_forever,
            Patience(answer_timeout_s=10, first_pause_s=1),
            item="it",
            attempts=3,
        )
    assert caught.value.item == "it"
    assert 30 < trio.current_time() - began_s < 30 + 3.1
