"""What one container wrote to the descriptors in its manifest's `logFDs`: the last of it, by line.

Memory is bounded by what lines really cost and not by their text, so that a flood of empty
lines is bounded too. Readers hold nothing but the number of the last line that they have
seen: however many follow, and however slowly, nothing is kept for them; who is too slow is
told how many lines went by. The log outlives runs, so a restart does not erase what the run
before it said.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import msgspec
import trio

from supervisor.operations import LogLine, LogPage

# A longer line is cut into several.
MAX_LINE_BYTES = 16 * 1024
# What Python needs for a line beside its text.
LINE_COST_BYTES = 128
MIN_KEPT_BYTES = 4096


class _Kept(msgspec.Struct, frozen=True, gc=False):
    """A line without its number, which follows from its place."""

    time_ns: int
    fd: int
    text: bytes
    cut: bool


class ContainerLog:
    """Implements `supervisor.container_seams.LogSink`, for one container and all of its runs.

    The runtime writes, `end_run` and `begin_run` mark the runs, anyone reads pages.
    """

    def __init__(self, *, kept_bytes: int, now_ns: Callable[[], int] = time.time_ns) -> None:
        """Keep at most `kept_bytes`, of which each line takes LINE_COST_BYTES beside its text.

        `now_ns` is Unix time in nanoseconds. Raises `ValueError` below MIN_KEPT_BYTES.
        """
        if kept_bytes < MIN_KEPT_BYTES:
            raise ValueError(f"a log keeps at least {MIN_KEPT_BYTES} bytes, not {kept_bytes}")
        self._kept_bytes = kept_bytes
        self._max_line_bytes = min(MAX_LINE_BYTES, kept_bytes // 4)
        self._now_ns = now_ns
        self._lines: deque[_Kept] = deque()
        self._lines_cost = 0
        self._last_number = 0
        # Of each descriptor the line that has no newline yet, and when it began. Together
        # they take half of what is kept, at most.
        self._unfinished: dict[int, tuple[int, bytes]] = {}
        self._unfinished_cost = 0
        self._ended = False
        self._readers = trio.lowlevel.ParkingLot()

    def write(self, fd: int, chunk: bytes) -> None:
        """Keep what came through `fd`, at the present time. Never blocks, never raises."""
        if not chunk:
            return
        self._append(self._take_lines(fd, chunk))

    def begin_run(self) -> None:
        """Another run follows: the log is not at its end any more."""
        self._ended = False

    def end_run(self) -> None:
        """Nothing more comes from this run: its unfinished lines are lines now. Idempotent."""
        lines = [_Kept(began_ns, fd, text, False) for fd, (began_ns, text) in self._rests()]
        self._unfinished.clear()
        self._unfinished_cost = 0
        self._ended = True
        self._append(lines)
        self._readers.unpark_all()

    def page(self, *, after: int, max_lines: int) -> LogPage:
        """At most `max_lines` lines with numbers above `after` (0: from the beginning)."""
        after = max(after, 0)
        before_first = self._last_number - len(self._lines)
        start = max(after - before_first, 0)
        stop = min(start + max_lines, len(self._lines))
        lines = tuple(
            self._line(before_first + index + 1, self._lines[index]) for index in range(start, stop)
        )
        return LogPage(
            lines=lines,
            lost_lines=max(before_first - after, 0),
            last_number=self._last_number,
            ended=self._ended and stop >= len(self._lines),
        )

    async def wait(self, *, after: int) -> None:
        """Until there is a line above `after`, or no run is under way. Cancellable."""
        await trio.lowlevel.checkpoint()
        while self._last_number <= after and not self._ended:
            await self._readers.park()

    def close(self) -> None:
        """Forget everything and send the readers away: nothing will ever follow. Idempotent."""
        self.end_run()
        self._lines.clear()
        self._lines_cost = 0

    def _take_lines(self, fd: int, chunk: bytes) -> list[_Kept]:
        """The lines that `chunk` finishes or makes too long; its rest becomes unfinished."""
        now_ns = self._now_ns()
        began_ns, before = self._unfinished.pop(fd, (now_ns, b""))
        if before:
            self._unfinished_cost -= LINE_COST_BYTES + len(before)
        *whole, rest = (before + chunk).split(b"\n")
        # A chunk full of newlines costs no more than the lines of it that stay.
        superfluous = len(whole) - self._kept_bytes // LINE_COST_BYTES
        if superfluous > 0:
            self._pass_over(whole[:superfluous])
            del whole[:superfluous]
            began_ns = now_ns
        lines: list[_Kept] = []
        for text in whole:
            lines += self._pieces(fd, text, began_ns, now_ns)
            began_ns = now_ns
        if not rest:
            return lines
        *cut, last = self._pieces(fd, rest, began_ns, now_ns)
        lines += cut
        cost = LINE_COST_BYTES + len(last.text)
        if self._unfinished_cost + cost > self._kept_bytes // 2:
            lines.append(_Kept(last.time_ns, fd, last.text, True))
        else:
            self._unfinished[fd] = (last.time_ns, last.text)
            self._unfinished_cost += cost
        return lines

    def _pieces(self, fd: int, text: bytes, began_ns: int, now_ns: int) -> list[_Kept]:
        """One line, or as many as it has to be cut into."""
        limit = self._max_line_bytes
        if len(text) <= limit:
            return [_Kept(began_ns, fd, text, False)]
        return [
            _Kept(now_ns if at else began_ns, fd, text[at : at + limit], at + limit < len(text))
            for at in range(0, len(text), limit)
        ]

    def _pass_over(self, texts: list[bytes]) -> None:
        """Count lines that what follows them drives out at once, and forget those before."""
        limit = self._max_line_bytes
        self._last_number += len(texts)
        if max(map(len, texts)) > limit:
            self._last_number += sum((len(text) - 1) // limit for text in texts if text)
        self._lines.clear()
        self._lines_cost = 0

    def _rests(self) -> list[tuple[int, tuple[int, bytes]]]:
        """Unfinished lines, in the order in which they began."""
        return sorted(self._unfinished.items(), key=lambda item: item[1][0])

    def _append(self, lines: list[_Kept]) -> None:
        for line in lines:
            self._lines.append(line)
            self._lines_cost += LINE_COST_BYTES + len(line.text)
        self._last_number += len(lines)
        while self._lines_cost + self._unfinished_cost > self._kept_bytes:
            self._lines_cost -= LINE_COST_BYTES + len(self._lines.popleft().text)
        if lines:
            self._readers.unpark_all()

    @staticmethod
    def _line(number: int, kept: _Kept) -> LogLine:
        return LogLine(
            number=number, time_ns=kept.time_ns, fd=kept.fd, text=kept.text, cut=kept.cut
        )
