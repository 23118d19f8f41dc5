"""What happened lately, for whoever asks: the last events, each as the line that is sent.

Events are for people and programs that watch; what has to be believed is in the
measurement log. So what does not fit any more is forgotten, and readers are told how much.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from datetime import datetime
from itertools import islice
from typing import TYPE_CHECKING

import msgspec
import trio

from plugins.http_api.streams import Piece, json_line, piece_of, utc_time
from supervisor import LayerProgress

if TYPE_CHECKING:
    from supervisor import Event

# What Python needs for a line beside its bytes.
_LINE_COST_BYTES = 128


class _EventLine(msgspec.Struct, frozen=True):
    """`event` has its name in `type`, and its own fields."""

    number: int
    time: datetime
    event: msgspec.Struct


class EventRing:
    """The events of this daemon's life, numbered from 1; a `streams.Source` that never ends."""

    def __init__(self, *, kept_bytes: int, now_ns: Callable[[], int] = time.time_ns) -> None:
        """`now_ns` is Unix time in nanoseconds."""
        self._kept_bytes = kept_bytes
        self._now_ns = now_ns
        self._lines: deque[bytes] = deque()
        self._cost_bytes = 0
        self._last_number = 0
        self._readers = trio.lowlevel.ParkingLot()

    def observe(self, event: Event) -> None:
        """Take in an event; never waits.

        How far a fetch has come is left out: told ten times a second, it would drive out
        everything else, and `GET /api/v2/layers` answers it.
        """
        if isinstance(event, LayerProgress):
            return
        self._last_number += 1
        line = json_line(_EventLine(self._last_number, utc_time(self._now_ns()), event))
        self._lines.append(line)
        self._cost_bytes += _LINE_COST_BYTES + len(line)
        while self._cost_bytes > self._kept_bytes:
            self._cost_bytes -= _LINE_COST_BYTES + len(self._lines.popleft())
        self._readers.unpark_all()

    @property
    def last_number(self) -> int:
        return self._last_number

    def read(self, after: int) -> Piece:
        before_first = self._last_number - len(self._lines)
        lost = max(before_first - after, 0)
        data, count = piece_of(islice(self._lines, max(after - before_first, 0), None))
        told = json_line({"lost_events": lost}) if lost else b""
        return Piece(data=told + data, after=after + lost + count, ended=False)

    async def wait(self, after: int) -> None:
        await trio.lowlevel.checkpoint()
        while self._last_number <= after:
            await self._readers.park()
