"""The management API over HTTP, and the socket through which containers get evidence."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import trio
from starlette.routing import Router

from plugins.http_api.acon_protocol import AconProtocol
from plugins.http_api.arrivals import Arrivals
from plugins.http_api.connections import BorrowedListener, HttpListener, tls_listener
from plugins.http_api.container import CONTAINER_ROUTES
from plugins.http_api.event_ring import EventRing
from plugins.http_api.followers import Followers
from plugins.http_api.guard import Guard
from plugins.http_api.listeners import (
    refuse_own_addresses,
    tcp_listener,
    tls_context,
    unix_listener,
)
from plugins.http_api.server import HttpServer
from plugins.http_api.settings import Settings
from plugins.http_api.uploads import Uploads
from plugins.http_api.v1 import V1
from plugins.http_api.v2 import V2
from plugins.http_api.v2_containers import V2Containers
from supervisor import hookimpl

if TYPE_CHECKING:
    from supervisor import ContainerOperations, Event, Operations, PluginContext


class HttpApi:
    """Serves ACON's v1 and our v2 on a Unix socket, and with TLS on TCP where configured."""

    Config = Settings

    def __init__(self, config: Settings, context: PluginContext) -> None:
        self._config = config
        self._log = context.log
        self._arrivals = Arrivals()
        self._events = EventRing(kept_bytes=config.kept_events_kib * 1024)

    @hookimpl
    async def observe(self, event: Event) -> None:
        """For those who ask how far a fetch is, and who watch what happens."""
        self._arrivals.observe(event)
        self._events.observe(event)

    @hookimpl
    async def serve(self, operations: Operations, task_status: trio.TaskStatus[None]) -> None:
        """The management API. Its sockets are gone when it returns."""
        config = self._config
        uploads = Uploads(operations, config, self._log)
        followers = Followers(
            most=config.max_followers,
            heartbeat_s=config.follow_heartbeat_s,
            deadline_s=config.follow_deadline_s,
        )
        guard = Guard(
            self._management_routes(operations, uploads, followers),
            log=self._log,
            max_requests=config.max_requests,
            max_body_bytes=config.max_request_bytes,
            max_buffered_bytes=config.max_buffered_bytes,
            deadline_s=config.request_deadline_s,
        )
        with ExitStack() as stack:
            local = stack.enter_context(unix_listener(Path(config.socket), self._socket_mode))
            remote: HttpListener | None = None
            if config.tcp is not None:
                context = tls_context(config.tcp)
                remote = tls_listener(stack.enter_context(tcp_listener(config.tcp)), context)
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(uploads.sweep)
                    nursery.start_soon(followers.until_shutdown)
                    await nursery.start(
                        self._server(guard, remote=False).serve, BorrowedListener(local)
                    )
                    if remote is not None:
                        await nursery.start(self._server(guard, remote=True).serve, remote)
                    task_status.started()
            finally:
                await uploads.abort_all()

    @hookimpl
    async def serve_container(
        self,
        listener: trio.SocketListener,
        operations: ContainerOperations,
        task_status: trio.TaskStatus[None],
    ) -> None:
        """One container's socket: the routes are shared, the limits are its own.

        There is a server only while there are connections: hundreds of containers that ask
        nothing cost next to nothing.
        """
        task_status.started()  # the socket listens already
        while True:
            await trio.lowlevel.wait_readable(listener.socket)
            # Not in a variable: it would be kept while nobody asks.
            await self._container_server(operations).serve(
                BorrowedListener(listener), until_idle=True
            )

    def _container_server(self, operations: ContainerOperations) -> HttpServer:
        config = self._config
        guard = Guard(
            CONTAINER_ROUTES,
            log=self._log,
            max_requests=config.container_max_connections,
            max_body_bytes=config.container_max_request_bytes,
            max_buffered_bytes=(
                config.container_max_connections * config.container_max_request_bytes
            ),
            deadline_s=config.request_deadline_s,
            log_requests=False,
        )
        acon = AconProtocol(operations, log=self._log, deadline_s=config.request_deadline_s)
        return HttpServer(
            guard,
            log=self._log,
            max_connections=config.container_max_connections,
            shutdown_s=config.shutdown_s,
            state={"operations": operations},
            binary=acon.converse,
        )

    def _management_routes(
        self, operations: Operations, uploads: Uploads, followers: Followers
    ) -> Router:
        config = self._config
        v1 = V1(
            operations,
            uploads,
            transfer_deadline_s=config.transfer_deadline_s,
            request_deadline_s=config.request_deadline_s,
        )
        v2 = V2(
            operations,
            uploads,
            self._arrivals,
            self._events,
            followers,
            transfer_deadline_s=config.transfer_deadline_s,
        )
        containers = V2Containers(
            operations, followers, request_deadline_s=config.request_deadline_s
        )
        return Router([*v1.routes(), *v2.routes(), *containers.routes()], redirect_slashes=False)

    @property
    def _socket_mode(self) -> int:
        return int(self._config.socket_mode, 8)

    def _server(self, guard: Guard, *, remote: bool) -> HttpServer:
        return HttpServer(
            guard,
            log=self._log,
            max_connections=self._config.max_connections,
            shutdown_s=self._config.shutdown_s,
            judge=refuse_own_addresses if remote else None,
        )
