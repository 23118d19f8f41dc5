"""How fast we take what containers write, so that reading leaves the event loop to others.

A writer whose pipe is full waits for its reader: reading slowly is all that it takes to slow
a flood down, and nobody but the flooder pays for it. What must be bounded is the reading of
all of them together, by bytes and also by reads: a program that writes single bytes without
end costs a turn of the event loop for each.
"""

from __future__ import annotations

import trio


class Pace:
    """Gives out turns on one time line, each as long as what was read is worth.

    Whoever reads little finds the line free and hardly waits; of n who always have more,
    each comes by every n-th turn, and never two at once.
    """

    def __init__(self, *, bytes_per_s: float, reads_per_s: float, rest_s: float) -> None:
        """Bounds for all readers together; each single one rests `rest_s` at least."""
        self._byte_s = 1 / bytes_per_s
        self._read_s = 1 / reads_per_s
        self._rest_s = rest_s
        self._free_at_s = float("-inf")

    async def rest(self, size_bytes: int) -> None:
        """To be called after each read, before the next. Cancellable."""
        now_s = trio.current_time()
        turn_s = self._read_s + size_bytes * self._byte_s
        self._free_at_s = max(self._free_at_s, now_s) + turn_s
        await trio.sleep_until(max(self._free_at_s, now_s + self._rest_s))
