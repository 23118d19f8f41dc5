"""The management API over HTTP, and the socket through which containers get evidence."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import trio
from starlette.routing import Router

from plugins.http_api.arrivals import Arrivals
from plugins.http_api.connections import BorrowedListener, HttpListener, HttpServer, tls_listener
from plugins.http_api.container import CONTAINER_ROUTES
from plugins.http_api.guard import Guard
from plugins.http_api.listeners import (
    refuse_own_addresses,
    tcp_listener,
    tls_context,
    unix_listener,
)
from plugins.http_api.settings import Settings
from plugins.http_api.uploads import Uploads
from plugins.http_api.v1 import V1
from plugins.http_api.v2 import V2
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

    @hookimpl
    async def observe(self, event: Event) -> None:
        """For those who ask how far a fetch is."""
        self._arrivals.observe(event)

    @hookimpl
    async def serve(self, operations: Operations, task_status: trio.TaskStatus[None]) -> None:
        """The management API. Its sockets are gone when it returns."""
        config = self._config
        uploads = Uploads(operations, config, self._log)
        v1 = V1(operations, uploads, transfer_deadline_s=config.transfer_deadline_s)
        v2 = V2(
            operations,
            uploads,
            self._arrivals,
            transfer_deadline_s=config.transfer_deadline_s,
        )
        guard = Guard(
            Router([*v1.routes(), *v2.routes()], redirect_slashes=False),
            log=self._log,
            max_requests=config.max_requests,
            max_body_bytes=config.max_request_bytes,
            max_buffered_bytes=config.max_buffered_bytes,
            deadline_s=config.request_deadline_s,
        )
        with ExitStack() as stack:
            local = stack.enter_context(unix_listener(Path(config.socket), self._socket_mode))
            remote: list[HttpListener] = []
            if config.tcp is not None:
                context = tls_context(config.tcp)
                remote.append(tls_listener(stack.enter_context(tcp_listener(config.tcp)), context))
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(uploads.sweep)
                    await nursery.start(
                        self._server(guard, remote=False).serve, [BorrowedListener(local)]
                    )
                    if remote:
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
        """One container's socket. The routes are shared, the limits are its own."""
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
        )
        server = HttpServer(
            guard,
            log=self._log,
            max_connections=config.container_max_connections,
            shutdown_s=config.shutdown_s,
            state={"operations": operations},
        )
        await server.serve([BorrowedListener(listener)], task_status=task_status)

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
