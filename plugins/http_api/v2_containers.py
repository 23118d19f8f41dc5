"""The calls of our management API that start, show, steer and watch containers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from plugins.http_api.answers import json_response
from plugins.http_api.exchange import exchange_of
from plugins.http_api.invocations import invocation, restart_timeout_s
from plugins.http_api.log_lines import LogLines
from plugins.http_api.requests import container_id, number, query, read_json
from plugins.http_api.streams import line_stream
from supervisor import UnknownItem

if TYPE_CHECKING:
    from plugins.http_api.followers import Followers
    from supervisor import ContainerView, Operations


class _Start(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    image_id: str
    environment: tuple[str, ...] = ()


class _Signal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    signal: int


class _Restart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`timeout_s`: how long to wait for the program that runs."""

    timeout_s: int = 30


class _Invoke(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`stdin` is standard base64, `environment` NAME=VALUE. Bounds: `invocations`."""

    entry_point: str
    arguments: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()
    stdin: bytes = b""
    timeout_s: int = 30
    capture_bytes: int = 65_536


class V2Containers:
    """The routes over one supervisor. `request_deadline_s` is what starts and ends may take."""

    def __init__(
        self, operations: Operations, followers: Followers, *, request_deadline_s: float
    ) -> None:
        self._operations = operations
        self._followers = followers
        self._request_deadline_s = request_deadline_s

    def routes(self) -> list[Route]:
        containers = "/api/v2/containers"
        one = f"{containers}/{{id}}"
        return [
            Route(containers, self._start, methods=["POST"]),
            Route(containers, self._list, methods=["GET"]),
            Route(one, self._show, methods=["GET"]),
            Route(f"{one}/signal", self._signal, methods=["POST"]),
            Route(f"{one}/restart", self._restart, methods=["POST"]),
            Route(f"{one}/invoke", self._invoke, methods=["POST"]),
            Route(f"{one}/logs", self._logs, methods=["GET"]),
        ]

    async def _start(self, request: Request) -> Response:
        start = await read_json(request, _Start)
        started = await self._operations.start(start.image_id, start.environment)
        return json_response({"container_id": started})

    async def _list(self, request: Request) -> Response:
        memory_bytes = await self._memory_bytes(request)
        views = self._operations.containers()
        return json_response({"containers": [_shown(view, memory_bytes) for view in views]})

    async def _show(self, request: Request) -> Response:
        wanted = container_id(request)
        memory_bytes = await self._memory_bytes(request)
        return json_response(_shown(self._view(wanted), memory_bytes))

    async def _signal(self, request: Request) -> Response:
        wanted = container_id(request)
        signal = await read_json(request, _Signal)
        await self._operations.signal(wanted, signal.signal)
        return json_response({})

    async def _restart(self, request: Request) -> Response:
        wanted = container_id(request)
        restart = await read_json(request, _Restart)
        timeout_s = restart_timeout_s(restart.timeout_s)
        exchange_of(request).allow(timeout_s + self._request_deadline_s)
        await self._operations.restart(wanted, timeout_s=timeout_s)
        return json_response(_shown(self._view(wanted), {}))

    async def _invoke(self, request: Request) -> Response:
        wanted = container_id(request)
        exchange = exchange_of(request)
        invoke = await read_json(request, _Invoke)
        call = invocation(
            invoke.entry_point,
            arguments=invoke.arguments,
            environment=invoke.environment,
            stdin=invoke.stdin,
            timeout_s=invoke.timeout_s,
            capture_bytes=invoke.capture_bytes,
        )
        exchange.hold_bytes(2 * call.capture_bytes)
        exchange.allow(call.timeout_s + self._request_deadline_s)
        result = await self._operations.invoke(wanted, call)
        return json_response(
            {
                "exit_code": result.status.exit_code,
                "signal": result.status.signal,
                "stdout": result.stdout,
                "stderr": result.stderr,
                "stdout_cut": result.stdout_cut,
                "stderr_cut": result.stderr_cut,
            }
        )

    async def _logs(self, request: Request) -> Response:
        lines = LogLines(self._operations, container_id(request))
        return line_stream(request, lines, self._followers)

    def _view(self, wanted: int) -> ContainerView:
        for view in self._operations.containers():
            if view.container_id == wanted:
                return view
        raise UnknownItem(f"container {wanted}", "is not here")

    async def _memory_bytes(self, request: Request) -> dict[int, int]:
        """Of the running containers, if the query asks for it: the kernel is asked then."""
        asked = number(
            query(request, "memory").get("memory", "0"), item="memory", minimum=0, maximum=1
        )
        return await self._operations.memory_bytes() if asked else {}


def _shown(view: ContainerView, memory_bytes: dict[int, int]) -> dict[str, object]:
    return msgspec.structs.asdict(view) | {"memory_bytes": memory_bytes.get(view.container_id)}
