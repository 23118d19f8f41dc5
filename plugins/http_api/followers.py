"""Those who follow something for a long time: how many, how long, and how they are sent away.

A follower is a request that has left the requests' count for a place of its own, so that
those who only watch never take the place of those who act. It costs a task, a connection
and a number: nothing is kept for it. It is asked to come back at the latest after
`deadline_s`, so that nothing which has gone wrong on the way to its client lasts for ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import trio

from plugins.http_api.slots import Slots

if TYPE_CHECKING:
    from plugins.http_api.exchange import Exchange

# For the last line: its follower's own time is over by then.
_FAREWELL_S = 10.0


class Followers:
    """All of one supervisor's followers. `until_shutdown` must run beside the servers."""

    def __init__(self, *, most: int, heartbeat_s: float, deadline_s: float) -> None:
        self.heartbeat_s = heartbeat_s
        self.deadline_s = deadline_s
        self.are_ending = False
        self._slots = Slots("followers", "the number of those who follow is bounded", most=most)
        self._pauses: set[trio.CancelScope] = set()

    @property
    def count(self) -> int:
        return self._slots.taken

    @contextmanager
    def following(self, exchange: Exchange) -> Iterator[float]:
        """`exchange` is a follower while the block runs; gives the time (trio's) for its end.

        Raises `Busy` when there are too many. The connection that it came through is let to
        read as slowly as it likes until then: it holds up nobody else.
        """
        with self._slots.one():
            exchange.leave_the_requests()
            exchange.allow(self.deadline_s + _FAREWELL_S)
            ends_at = trio.current_time() + self.deadline_s
            with exchange.connection.patience(ends_at):
                yield ends_at

    @contextmanager
    def pause(self, ends_at: float) -> Iterator[None]:
        """A wait that is over by then, or as soon as the daemon ends; it must not have begun to."""
        with trio.CancelScope(deadline=ends_at) as scope:
            self._pauses.add(scope)
            try:
                yield
            finally:
                self._pauses.discard(scope)

    async def until_shutdown(self) -> None:
        """Runs until cancelled; then every follower says its last line and ends."""
        try:
            await trio.sleep_forever()
        finally:
            self.are_ending = True
            for scope in tuple(self._pauses):
                scope.cancel()
