"""One request and its answer, with what Hypercorn leaves to chance made certain.

- A body is read only when a route asks for it, within bounds on its size, on the pause
  between two chunks and on what all requests together hold in memory.
- An answer given before the whole body was read is sent at once and whole; what the
  client still sends is thrown away for a moment, so that the answer is not lost with a
  reset connection; then the connection ends.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, ExitStack

import trio
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from plugins.http_api.connections import Connection
from supervisor import Busy, DeadlineExceeded, FormatError

_LINGER_S = 2.0
_LINGER_MAX_BYTES = 4 << 20


class ClientGone(Exception):
    """The client went away in the middle of its request: there is nobody to answer."""


class BodyBudget:
    """Bytes that requests may hold in memory at one time: bodies, what commands write."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.held_bytes = 0

    def take(self, count: int) -> None:
        """Raises `Busy` when they are used up."""
        if self.held_bytes + count > self._max_bytes:
            raise Busy(
                "requests",
                "the memory for them is bounded",
                expected=f"at most {self._max_bytes} bytes at one time",
            )
        self.held_bytes += count

    def give_back(self, count: int) -> None:
        self.held_bytes -= count


class Exchange:
    """Made by `guard` for each request; routes get it with `exchange_of(request)`."""

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        budget: BodyBudget,
        max_body_bytes: int,
        deadline_s: float,
    ) -> None:
        self.connection: Connection = scope["state"]["connection"]
        self.headers = Headers(scope=scope)
        self.time_limit = trio.CancelScope(deadline=trio.current_time() + deadline_s)
        self.status: int | None = None
        self._receive = receive
        self._send = send
        self._budget = budget
        self._max_body_bytes = max_body_bytes
        self._held_bytes = 0
        self._place = ExitStack()
        # HTTP/1.1 says in the head whether there is a body (RFC 9112, section 6).
        length = self.headers.get("content-length", "0")
        self._unread = length != "0" or "transfer-encoding" in self.headers

    def take_place(self, place: AbstractContextManager[None]) -> None:
        """Be one of the requests that are counted. Raises what entering `place` raises."""
        self._place.enter_context(place)

    def leave_the_requests(self) -> None:
        """Be counted no more: this request is bounded in another way now."""
        self._place.close()

    def allow(self, deadline_s: float) -> None:
        """Give this request more time than others, from now on."""
        self.time_limit.deadline = trio.current_time() + deadline_s

    @property
    def content_length(self) -> int | None:
        """What the client announced; none for a chunked body."""
        if "transfer-encoding" in self.headers:
            return None
        return int(self.headers.get("content-length", "0"))  # h11 checked that it is a number

    async def read_chunk(self, *, pause_s: float = math.inf) -> bytes:
        """The next bytes of the body (64 KiB at most), b"" at its end.

        Raises `ClientGone`, and `DeadlineExceeded` when nothing comes for `pause_s`. The
        request's own deadline holds in any case.
        """
        while self._unread:
            with trio.move_on_after(pause_s):
                message = await self._receive_part()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                chunk: bytes = message.get("body", b"")
                if chunk:
                    return chunk
                continue
            raise DeadlineExceeded(
                "request body", "must keep coming", expected=f"a chunk within {pause_s:g} s"
            )
        return b""

    async def read_body(self) -> bytes:
        """All of a small body. Raises `FormatError` beyond the bound, `Busy`, `ClientGone`."""
        announced = self.content_length
        if announced is not None and announced > self._max_body_bytes:
            raise self._too_large(announced)
        body = bytearray()
        while chunk := await self.read_chunk():
            if len(body) + len(chunk) > self._max_body_bytes:
                raise self._too_large(len(body) + len(chunk))
            self.hold_bytes(len(chunk))
            body += chunk
        return bytes(body)

    def hold_bytes(self, count: int) -> None:
        """Have this much of the memory for requests until this one is over. Raises `Busy`."""
        self._budget.take(count)
        self._held_bytes += count

    async def send(self, message: Message) -> None:
        """ASGI's send for the application. Raises `ClientGone` when it did not arrive."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if self._unread or self.connection.refusal is not None:
                headers = [*message.get("headers", ()), (b"connection", b"close")]
                message = {**message, "headers": headers}
        elif self._unread and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            await self._linger()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(message)
        if self.connection.lost:
            # Hypercorn may be waiting for this answer's end before it reads on.
            self.connection.abort()
            raise ClientGone

    def close(self) -> None:
        """The request is over: give back its place and its memory."""
        self._place.close()
        self._budget.give_back(self._held_bytes)
        self._held_bytes = 0

    async def _receive_part(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            self._unread = False
        return message

    async def _linger(self) -> None:
        thrown_away = 0
        with trio.move_on_after(_LINGER_S):
            while self._unread and thrown_away <= _LINGER_MAX_BYTES:
                thrown_away += len((await self._receive_part()).get("body", b""))
        if self._unread:
            self.connection.abort()
            await trio.lowlevel.checkpoint()  # raises Cancelled: nothing more is sent

    def _too_large(self, size_bytes: int) -> FormatError:
        return FormatError(
            "request body",
            "the size of a request is bounded",
            expected=f"at most {self._max_body_bytes} bytes",
            actual=f"{size_bytes} or more",
        )


def exchange_of(request: Request) -> Exchange:
    """The exchange that `guard` made for this request."""
    exchange: Exchange = request.scope["exchange"]
    return exchange
