"""User and group ids for containers: drawn from a counter, never shared, never reused."""

from __future__ import annotations

from supervisor.errors import Busy
from supervisor.seams import IdMap

# The kernel's overflow id stands for "nobody I know": no container may own it.
OVERFLOW_ID = 65534
LAST_ID = 2**32 - 2


class IdRanges:
    """Hands out outside ids from `first_id` on for as long as the supervisor lives."""

    def __init__(self, first_id: int) -> None:
        self._next = first_id

    def draw(self, inside_ids: tuple[int, ...]) -> IdMap:
        """One new outside id for 0 and for each of `inside_ids`. Raises `Busy` at the end."""
        pairs = []
        for inside in (0, *inside_ids):
            if self._next == OVERFLOW_ID:
                self._next += 1
            if self._next > LAST_ID:
                raise Busy("user ids", "all ids of this supervisor's life are used up")
            pairs.append((inside, self._next))
            self._next += 1
        return IdMap(pairs=tuple(pairs))
