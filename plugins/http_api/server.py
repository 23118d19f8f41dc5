"""Connections served: Hypercorn's HTTP/1.1, or another protocol that begins otherwise.

Hypercorn's own `serve` opens sockets, installs a shutdown trigger and runs a lifespan
for each call. A supervisor with hundreds of containers needs none of that hundreds of
times, so its `TCPServer` (one connection) runs under an accept loop here. Three things
that it lacks, beside those in `connections`:

- it keeps a connection that the client closed until its keep-alive time is over: hundreds
  of short calls would use up all of them. `_Http` lets go at once;
- it changes to HTTP/2 for whoever asks, also where that is not offered;
- an exception in one connection would end the server. It ends that connection.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, cast

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config as HypercornConfig
from hypercorn.protocol import ProtocolWrapper
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ASGIFramework, ConnectionState

from plugins.http_api.connections import BoundedStream, Connection, HttpListener, HttpStream
from plugins.http_api.faults import fault_without_words
from supervisor import Busy, Refusal

if TYPE_CHECKING:
    import structlog
    from starlette.types import ASGIApp

# Connections beyond the limit that are still answered (with 503) rather than just closed.
_ANSWERED_OVER_LIMIT = 32
# Descriptors or memory have run out, which passes (accept(2)).
_CAPACITY_ERRNOS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
_CAPACITY_PAUSE_S = 0.1

Judge = Callable[[trio.SocketStream], Refusal | None]
Binary = Callable[[BoundedStream, Connection], Awaitable[None]]


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


class _Http(TCPServer):
    """One connection's HTTP."""

    async def _read_data(self) -> None:
        # Without the wrapper, which changes protocols: who asks for HTTP/2 loses the connection.
        self.protocol = cast("ProtocolWrapper", self.protocol.protocol)
        # Returns when nothing more can come. Only the idle timer would be left to wait for.
        await super()._read_data()
        connection: Connection = self.state["connection"]
        connection.leave()
        await self.idle_task.stop()


class HttpServer:
    """Serves one ASGI application on one listener, once.

    Requests find a `Connection` under "connection" in `scope["state"]`, beside what
    `state` holds. `binary`, if given, is handed every connection whose first byte begins no
    HTTP request; else HTTP refuses it.
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
        binary: Binary | None = None,
    ) -> None:
        self._app = ASGIWrapper(cast("ASGIFramework", app))
        self._log = log
        self._max_connections = max_connections
        self._shutdown_s = shutdown_s
        self._judge = judge
        self._state = state or {}
        self._binary = binary
        self._context = WorkerContext(None)
        self._accepting = trio.CancelScope()
        self._ends_when_idle = False
        self._is_stopping = False
        self._handled = 0  # connections, from their accept to the end of their task
        self._live: set[Connection] = set()
        self._silent: set[Connection] = set()  # their first byte has not come
        self._drained = trio.Event()  # set when the last connection ends after accepting has
        self._over = trio.Event()

    async def serve(
        self,
        listener: HttpListener,
        *,
        until_idle: bool = False,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until cancelled, then let running requests end for at most `shutdown_s`.

        With `until_idle` it also returns when the last connection has ended; whoever
        connects then waits in the listener's queue. Does not close the listener; all
        connections are closed when it returns. Raises what accepting raises; running out of
        descriptors is waited for.
        """
        self._ends_when_idle = until_idle
        async with trio.open_nursery() as outside:
            outside.start_soon(self._serve_shielded, listener)
            # The socket listens already: whoever connects now is served.
            task_status.started()
            try:
                await self._over.wait()
            finally:
                self._is_stopping = True
                self._accepting.cancel()

    async def _serve_shielded(self, listener: HttpListener) -> None:
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as handlers:
                try:
                    await self._accept(listener, handlers)
                finally:
                    await self._context.terminated.set()  # idle connections close now
                    handlers.start_soon(self._end_connections, handlers.cancel_scope)
        self._over.set()

    async def _accept(self, listener: HttpListener, handlers: trio.Nursery) -> None:
        while not self._is_stopping:
            self._accepting = trio.CancelScope()
            with self._accepting:
                while True:
                    stream = await self._next(listener)
                    self._handled += 1
                    handlers.start_soon(self._handle, stream)
            # A connection may have come in just when the last one ended: then it goes on.
            if self._ends_when_idle and not self._handled:
                return

    async def _next(self, listener: HttpListener) -> HttpStream:
        while True:
            try:
                return await listener.accept()
            except OSError as error:
                if error.errno not in _CAPACITY_ERRNOS:
                    raise
                self._log.warning("cannot accept", error=repr(error))
            await trio.sleep(_CAPACITY_PAUSE_S)

    async def _end_connections(self, handlers: trio.CancelScope) -> None:
        for connection in tuple(self._silent):
            connection.abort()
        try:
            with trio.move_on_after(self._shutdown_s):
                if self._live:
                    await self._drained.wait()
        finally:
            for connection in tuple(self._live):
                connection.abort()
            handlers.cancel()

    async def _handle(self, stream: HttpStream) -> None:
        bounded = stream if isinstance(stream, BoundedStream) else stream.transport_stream
        try:
            if len(self._live) < self._max_connections + _ANSWERED_OVER_LIMIT:
                await self._converse(stream, bounded)
        except Exception as error:
            # A peer can make the protocol code fail in ways that nobody foresaw.
            self._log.debug("connection failed", fault=fault_without_words(error))
        finally:
            bounded.cut()
            self._handled -= 1
            if self._ends_when_idle and not self._handled:
                self._accepting.cancel()

    async def _converse(self, stream: HttpStream, bounded: BoundedStream) -> None:
        connection = Connection(bounded, self._refusal_for(bounded))
        self._live.add(connection)
        try:
            with connection.scope:
                if self._binary is None:
                    await self._http(stream, connection)
                elif first := await self._first_byte(bounded, connection):
                    if 0x20 < first[0] < 0x7F or first in b"\r\n":
                        await self._http(stream, connection)
                    else:
                        await self._binary(bounded, connection)
        finally:
            self._live.discard(connection)
            if not self._live and self._context.terminated.is_set():
                self._drained.set()

    async def _first_byte(self, stream: BoundedStream, connection: Connection) -> bytes:
        """What the first request begins with; b"" if none does in time. Reads nothing."""
        self._silent.add(connection)
        try:
            with trio.move_on_after(_HYPERCORN.keep_alive_timeout):
                return await stream.first_byte()
        finally:
            self._silent.discard(connection)
        return b""

    async def _http(self, stream: HttpStream, connection: Connection) -> None:
        await _Http(
            self._app,
            _HYPERCORN,
            self._context,
            ConnectionState({**self._state, "connection": connection}),
            cast("trio.SSLStream[trio.SocketStream]", stream),
        )

    def _refusal_for(self, stream: BoundedStream) -> Refusal | None:
        if len(self._live) >= self._max_connections:
            return Busy(
                "connections",
                "the number of connections is bounded",
                expected=f"at most {self._max_connections}",
            )
        return None if self._judge is None else self._judge(stream.inner)
