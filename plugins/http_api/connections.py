"""Connections: Hypercorn's HTTP/1.1 on listeners that somebody else opened and closes.

Hypercorn's own `serve` opens sockets, installs a shutdown trigger and runs a lifespan
for each call. A supervisor with hundreds of containers needs none of that hundreds of
times, so its `TCPServer` (one connection) runs under trio's `serve_listeners` here.
What its connections lack is added around them:

- it sends under a shield and without a deadline: a client that does not read would hold
  up shutdown for ever. `BoundedStream` gives every send a deadline, whoever shields it;
- it keeps a connection that the client closed until its keep-alive time is over: hundreds
  of short calls would use up all of them. `_Http` lets go at once;
- its application queue can lock up when an answer is sent before the body was read.
  `Connection.abort` ends a connection with everything that runs in it;
- an exception in one connection would end the server. It ends that connection.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config as HypercornConfig
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ASGIFramework, ConnectionState

from supervisor import Busy, Refusal

if TYPE_CHECKING:
    import structlog
    from starlette.types import ASGIApp

_SEND_BASE_S = 10.0
_SEND_MIN_BYTES_PER_S = 16 * 1024
# Connections beyond the limit that are still answered (with 503) rather than just closed.
_ANSWERED_OVER_LIMIT = 32

Judge = Callable[[trio.SocketStream], Refusal | None]


def _hypercorn_config() -> HypercornConfig:
    config = HypercornConfig()
    config.alpn_protocols = ["http/1.1"]
    config.include_server_header = False
    config.errorlog = None  # exceptions are caught and logged here and in `guard`
    config.accesslog = None
    config.h11_max_incomplete_size = 16 * 1024
    # Also the time that a client has for sending its whole request head.
    config.keep_alive_timeout = 15.0
    config.ssl_handshake_timeout = 10.0
    # Chunks of at most 64 KiB that wait for the application, per connection.
    config.max_app_queue_size = 4
    return config


_HYPERCORN = _hypercorn_config()


class BoundedStream(trio.abc.HalfCloseableStream):
    """A socket stream whose sends have deadlines, and that can be cut off from outside."""

    def __init__(self, inner: trio.SocketStream) -> None:
        self.inner = inner
        self.socket = inner.socket  # Hypercorn reads addresses from it

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Raises `trio.BrokenResourceError` when the peer takes the bytes too slowly."""
        with trio.move_on_after(_SEND_BASE_S + len(data) / _SEND_MIN_BYTES_PER_S) as limit:
            await self.inner.send_all(data)
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

    def cut(self) -> None:
        """Close at once; whoever sends or receives gets `trio.ClosedResourceError`."""
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
_HttpStream = BoundedStream | trio.SSLStream[BoundedStream]


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

    def leave(self) -> None:
        """The client has gone: nobody waits for an answer."""
        self.client_left = True
        if self._wanted_by_client is not None:
            self._wanted_by_client.cancel()

    def abort(self) -> None:
        """Close the socket and cancel everything that this connection runs."""
        self._stream.cut()
        self.scope.cancel()


class _Http(TCPServer):
    """One connection's HTTP."""

    async def _read_data(self) -> None:
        # Returns when nothing more can come. Only the idle timer would be left to wait for.
        await super()._read_data()
        connection: Connection = self.state["connection"]
        connection.leave()
        await self.idle_task.stop()


class HttpServer:
    """Serves one ASGI application on any number of listeners.

    Requests find a `Connection` under "connection" in `scope["state"]`, beside what
    `state` holds.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        log: structlog.stdlib.BoundLogger,
        max_connections: int,
        shutdown_s: float,
        judge: Judge | None = None,
        state: dict[str, object] | None = None,
    ) -> None:
        self._app = ASGIWrapper(cast("ASGIFramework", app))
        self._log = log
        self._max_connections = max_connections
        self._shutdown_s = shutdown_s
        self._judge = judge
        self._state = state or {}
        self._context = WorkerContext(None)
        self._live: set[Connection] = set()
        self._drained = trio.Event()  # set when the last connection ends after accepting has

    async def serve(
        self,
        listeners: Sequence[HttpListener],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until cancelled, then let running requests end for at most `shutdown_s`.

        Does not close the listeners; all connections are closed when it returns.
        Raises what accepting raises (trio retries when descriptors run out).
        """
        accepting = trio.CancelScope()
        async with trio.open_nursery() as outside:
            outside.start_soon(self._serve_shielded, listeners, accepting)
            # The sockets listen already: whoever connects now is served.
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                accepting.cancel()

    async def _serve_shielded(
        self, listeners: Sequence[HttpListener], accepting: trio.CancelScope
    ) -> None:
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as handlers:
                try:
                    with accepting:
                        await trio.serve_listeners(
                            self._handle, list(listeners), handler_nursery=handlers
                        )
                finally:
                    await self._context.terminated.set()  # idle connections close now
                    handlers.start_soon(self._end_connections, handlers.cancel_scope)

    async def _end_connections(self, handlers: trio.CancelScope) -> None:
        try:
            with trio.move_on_after(self._shutdown_s):
                if self._live:
                    await self._drained.wait()
        finally:
            for connection in tuple(self._live):
                connection.abort()
            handlers.cancel()

    async def _handle(self, stream: _HttpStream) -> None:
        bounded = stream if isinstance(stream, BoundedStream) else stream.transport_stream
        if len(self._live) >= self._max_connections + _ANSWERED_OVER_LIMIT:
            bounded.cut()
            return
        connection = Connection(bounded, self._refusal_for(bounded))
        self._live.add(connection)
        try:
            with connection.scope:
                await _Http(
                    self._app,
                    _HYPERCORN,
                    self._context,
                    ConnectionState({**self._state, "connection": connection}),
                    cast("trio.SSLStream[trio.SocketStream]", stream),
                )
        except Exception:
            # A peer can make the protocol code fail in ways that nobody foresaw.
            self._log.debug("connection failed", exc_info=True)
        finally:
            bounded.cut()
            self._live.discard(connection)
            if not self._live and self._context.terminated.is_set():
                self._drained.set()

    def _refusal_for(self, stream: BoundedStream) -> Refusal | None:
        if len(self._live) >= self._max_connections:
            return Busy(
                "connections",
                "the number of connections is bounded",
                expected=f"at most {self._max_connections}",
            )
        return None if self._judge is None else self._judge(stream.inner)
