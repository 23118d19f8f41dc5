"""How long a registry is waited for, and how often it is asked again."""

from __future__ import annotations

import itertools
import random
from collections.abc import Awaitable, Callable
from email.utils import parsedate_to_datetime
from typing import TypeVar

import msgspec
import trio

from supervisor import DeadlineExceeded, Refusal

T = TypeVar("T")


class Patience(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of one request or download. A deadline over all attempts is the caller's.

    `attempts`, `mirror_attempts`: tries in a row without progress, at the registry and at
    each mirror. An attempt of a download made progress if it brought `progress_bytes`, or
    all that was missing. `slow_timeout_s`: while a body is read, each so many bytes
    (`window_bytes`) must arrive within it, not counting the time that the reader takes.
    """

    connect_timeout_s: float = 10
    read_timeout_s: float = 30
    answer_timeout_s: float = 60
    slow_timeout_s: float = 60
    window_bytes: int = 64 * 2**10
    progress_bytes: int = 2**20
    attempts: int = 5
    mirror_attempts: int = 2
    first_pause_s: float = 0.5
    longest_pause_s: float = 20

    def pause_s(self, failures: int, asked_s: float | None) -> float:
        """How long to wait after so many failures in a row; `asked_s` is a Retry-After.

        Doubles from `first_pause_s`, with jitter so that many clients do not come back
        together; never longer than `longest_pause_s`, whatever the registry asks for.
        """
        doubled_s = self.first_pause_s * 2.0 ** min(failures - 1, 30)
        pause_s = min(self.longest_pause_s, doubled_s) * random.uniform(0.5, 1)
        return max(pause_s, min(asked_s or 0, self.longest_pause_s))


class Passing(Exception):
    """A failure that another attempt may not meet; never leaves this package.

    `refusal` is raised once no attempt is left. `maybe_done`: the registry may have done
    what it was asked, so that only an idempotent request may be repeated.
    """

    def __init__(
        self, refusal: Refusal, *, maybe_done: bool = True, pause_s: float | None = None
    ) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal
        self.maybe_done = maybe_done
        self.pause_s = pause_s


async def persist(
    attempt: Callable[[], Awaitable[T]],
    patience: Patience,
    *,
    item: str,
    attempts: int,
    idempotent: bool = True,
) -> T:
    """The answer of `attempt`, tried up to `attempts` times, each within `answer_timeout_s`."""
    for number in itertools.count(1):
        try:
            try:
                with trio.fail_after(patience.answer_timeout_s):
                    return await attempt()
            except trio.TooSlowError:
                raise Passing(too_slow(item, patience.answer_timeout_s)) from None
        except Passing as error:
            if number >= attempts or (error.maybe_done and not idempotent):
                raise error.refusal from error
            await trio.sleep(patience.pause_s(number, error.pause_s))
    raise RuntimeError("unreachable: counting does not end")


def too_slow(item: str, timeout_s: float) -> DeadlineExceeded:
    return DeadlineExceeded(
        item, "the registry must answer in time", expected=f"within {timeout_s:g} s"
    )


def retry_after_s(retry_after: str | None, date: str | None) -> float | None:
    """Seconds that a `Retry-After` asks for (RFC 9110, section 10.2.3); None if it says none.

    A date counts from the answer's own `date`: no clock of this machine is believed.
    """
    if retry_after is None:
        return None
    text = retry_after.strip()
    if text.isascii() and text.isdigit() and len(text) <= 9:
        return float(text)
    if date is None:
        return None
    try:
        seconds = (parsedate_to_datetime(text) - parsedate_to_datetime(date)).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return None
    return max(0.0, seconds)
