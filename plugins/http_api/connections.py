"""One connection as its server and its requests see it, on listeners that somebody else opened.

Hypercorn sends under a shield and without a deadline: a client that does not read would hold
up shutdown for ever. `BoundedStream` gives every send a deadline, whoever shields it, and tells
when nothing arrives any more (`lost`), to which Hypercorn would go on sending. Its application
queue can lock up when an answer is sent before the body was read: `Connection.abort` ends a
connection with everything that runs in it.
"""

from __future__ import annotations

import math
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import trio

from supervisor import Refusal

_SEND_BASE_S = 10.0
_SEND_MIN_BYTES_PER_S = 16 * 1024


class BoundedStream(trio.abc.HalfCloseableStream):
    """A socket stream whose sends have deadlines, and that can be cut off from outside.

    `patient_until` (trio's clock) is when those deadlines begin to count. `lost`: nothing
    that is sent arrives any more.
    """

    def __init__(self, inner: trio.SocketStream) -> None:
        self.inner = inner
        self.socket = inner.socket  # Hypercorn reads addresses from it
        self.patient_until = -math.inf
        self.lost = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Raises `trio.BrokenResourceError` when the peer takes the bytes too slowly."""
        begin = max(trio.current_time(), self.patient_until)
        deadline = begin + _SEND_BASE_S + len(data) / _SEND_MIN_BYTES_PER_S
        try:
            with trio.move_on_at(deadline) as limit:
                await self.inner.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.lost = True
            raise
        if limit.cancelled_caught:
            self.cut()
            raise trio.BrokenResourceError("the peer does not read")

    async def wait_send_all_might_not_block(self) -> None:
        await self.inner.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        await self.inner.send_eof()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        return await self.inner.receive_some(max_bytes)

    async def aclose(self) -> None:
        await self.inner.aclose()

    async def first_byte(self) -> bytes:
        """The next byte, which stays to be read; b"" when nothing comes."""
        return await self.socket.recv(1, socket.MSG_PEEK)

    def cut(self) -> None:
        """Close at once; whoever sends or receives gets `trio.ClosedResourceError`."""
        self.lost = True
        self.socket.close()


class BorrowedListener(trio.abc.Listener[BoundedStream]):
    """A listener that is closed by the one who opened it, not by the server."""

    def __init__(self, listener: trio.SocketListener) -> None:
        self._listener = listener

    async def accept(self) -> BoundedStream:
        return BoundedStream(await self._listener.accept())

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


def tls_listener(
    listener: trio.SocketListener, context: ssl.SSLContext
) -> trio.SSLListener[BoundedStream]:
    """TLS over `listener`, which the caller closes."""
    # trio types SSLListener for socket streams alone; any stream will do.
    borrowed = cast("trio.abc.Listener[trio.SocketStream]", BorrowedListener(listener))
    wrapped = trio.SSLListener(borrowed, context, https_compatible=True)
    return cast("trio.SSLListener[BoundedStream]", wrapped)


HttpListener = BorrowedListener | trio.SSLListener[BoundedStream]
HttpStream = BoundedStream | trio.SSLStream[BoundedStream]


class Connection:
    """What a request may know of, and do to, the connection that it came through.

    `refusal` is set when every request of this connection is to be answered with it.
    """

    def __init__(self, stream: BoundedStream, refusal: Refusal | None) -> None:
        self.refusal = refusal
        self.scope = trio.CancelScope()
        self.client_left = False
        self._stream = stream
        self._wanted_by_client: trio.CancelScope | None = None

    @contextmanager
    def for_its_client(self, scope: trio.CancelScope) -> Iterator[None]:
        """While the block runs, `scope` is cancelled as soon as the client has gone.

        One request at a time runs in a connection of HTTP/1.1. A client that closes only its
        own side counts as gone too: Hypercorn sends it nothing more.
        """
        self._wanted_by_client = scope
        if self.client_left:
            scope.cancel()
        try:
            yield
        finally:
            self._wanted_by_client = None

    @property
    def lost(self) -> bool:
        """What was sent last did not arrive, and nothing will."""
        return self._stream.lost

    @contextmanager
    def patience(self, until: float) -> Iterator[None]:
        """While the block runs, a client may be slow to read until then (trio's clock)."""
        self._stream.patient_until = until
        try:
            yield
        finally:
            self._stream.patient_until = -math.inf

    def leave(self) -> None:
        """The client has gone: nobody waits for an answer."""
        self.client_left = True
        if self._wanted_by_client is not None:
            self._wanted_by_client.cancel()

    def abort(self) -> None:
        """Close the socket and cancel everything that this connection runs."""
        self._stream.cut()
        self.scope.cancel()
