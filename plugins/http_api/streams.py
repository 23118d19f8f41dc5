"""Answers of unknown length: numbered lines of JSON (NDJSON), one after another.

A reader holds only the number of the last line that it was sent. What it is sent next is
asked for when the last piece has gone out, so whoever reads slowly holds up its own task
and nothing else, and finds out how many lines it missed meanwhile. Nothing is kept for it
but the piece that is under way.

The last line tells a whole answer from one that broke off, and where to go on:
`{"ended":true}`, nothing will follow; `{"ended":false,"after":N}`, ask again from there.
Between lines there may be empty ones: heartbeats, since only who writes to a connection
finds out that nobody is there any more.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Protocol

import msgspec
import trio
from starlette.responses import Response

from plugins.http_api.exchange import exchange_of
from plugins.http_api.requests import number, query
from supervisor import Conflict

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

    from plugins.http_api.exchange import Exchange
    from plugins.http_api.followers import Followers

# A piece grows until it has this many bytes, and one line.
PIECE_BYTES = 64 * 1024
_MAX_NUMBER = (1 << 53) - 1
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """Whole lines as they are sent. `after` is the number of the last; `ended`: no more come."""

    data: bytes
    after: int
    ended: bool


class Source(Protocol):
    """Lines with numbers from 1 on, of which the latest are kept."""

    @property
    def last_number(self) -> int:
        """Of the latest line there ever was, 0 before the first."""

    def read(self, after: int) -> Piece:
        """The next lines after a number, empty if there are none. Never blocks.

        Says first how many are lost, if some are; `Piece.after` counts them as read.
        """

    async def wait(self, after: int) -> None:
        """Until `read` would give something or tell the end. Cancellable."""


def utc_time(time_ns: int) -> datetime:
    """Unix time in nanoseconds as msgspec writes it: RFC 3339, to the microsecond."""
    return _EPOCH + timedelta(microseconds=time_ns // 1000)


def json_line(value: object) -> bytes:
    """One line of NDJSON."""
    return msgspec.json.encode(value) + b"\n"


def piece_of(lines: Iterable[bytes]) -> tuple[bytes, int]:
    """As many of the lines as fit into a piece, one at least, joined; and how many they are."""
    data = bytearray()
    count = 0
    for line in lines:
        data += line
        count += 1
        if len(data) >= PIECE_BYTES:
            break
    return bytes(data), count


def line_stream(request: Request, source: Source, followers: Followers) -> Response:
    """The answer to a call with the query `after=N&follow=0|1`, both 0 unless given.

    Raises `FormatError` for other parameters, `Conflict` for a number that does not exist
    yet: who brings it has read the lines of another daemon's life, or of nothing at all.
    """
    wanted = query(request, "after", "follow")
    after = number(wanted.get("after", "0"), item="after", minimum=0, maximum=_MAX_NUMBER)
    follow = number(wanted.get("follow", "0"), item="follow", minimum=0, maximum=1)
    last_number = source.last_number
    if after > last_number:
        raise Conflict(
            "after",
            "is not beyond the last line: numbers begin anew when the daemon starts",
            expected=f"at most {last_number}",
            actual=after,
        )
    reader = _Reader(source, after, exchange_of(request))
    if follow:
        return _LineStream(reader, lambda: reader.follow(followers))
    return _LineStream(reader, lambda: reader.read_up_to(last_number))


class _Reader:
    """Sends one answer's lines, from `after` on."""

    def __init__(self, source: Source, after: int, exchange: Exchange) -> None:
        self._source = source
        self._after = after
        self._exchange = exchange

    async def read_up_to(self, last_number: int) -> None:
        """What there is now: up to the line that was the last when it was asked for."""
        await self.send_head()
        while (piece := self._source.read(self._after)).data:
            await self._send(piece.data)
            self._after = piece.after
            if self._after >= last_number:
                break
        await self._send_end(ended=piece.ended)

    async def follow(self, followers: Followers) -> None:
        """What there is and what will come, to the source's end or the follower's.

        Raises `Busy` when there are too many, and then nothing was sent.
        """
        with followers.following(self._exchange) as ends_at:
            await self.send_head()
            await self._send_end(ended=await self._follow_until(ends_at, followers))

    async def _follow_until(self, ends_at: float, followers: Followers) -> bool:
        """True when nothing more will follow, False when the follower has to come back."""
        beat_at = -math.inf  # at once: some proxies keep back a head until bytes follow it
        while not followers.are_ending and trio.current_time() < ends_at:
            piece = self._source.read(self._after)
            if not piece.data and piece.ended:
                return True
            if piece.data or trio.current_time() >= beat_at:
                await self._send(piece.data or b"\n")
                self._after = piece.after
                beat_at = trio.current_time() + followers.heartbeat_s
            else:
                with followers.pause(min(ends_at, beat_at)):
                    await self._source.wait(self._after)
        return False

    async def send_head(self) -> None:
        headers = [(b"content-type", b"application/x-ndjson"), (b"cache-control", b"no-store")]
        await self._exchange.send(
            {"type": "http.response.start", "status": 200, "headers": headers}
        )

    async def _send(self, data: bytes) -> None:
        await self._exchange.send({"type": "http.response.body", "body": data, "more_body": True})

    async def _send_end(self, *, ended: bool) -> None:
        last = {"ended": True} if ended else {"ended": False, "after": self._after}
        await self._send(json_line(last))
        await self.finish()

    async def finish(self) -> None:
        await self._exchange.send({"type": "http.response.body", "body": b"", "more_body": False})


class _LineStream(Response):
    """Sent while it is made; chunked, since its length is not known."""

    def __init__(self, reader: _Reader, send_lines: Callable[[], Awaitable[None]]) -> None:
        super().__init__()
        self._reader = reader
        self._send_lines = send_lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "HEAD":
            await self._reader.send_head()
            await self._reader.finish()
        else:
            await self._send_lines()
