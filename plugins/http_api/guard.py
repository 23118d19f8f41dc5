"""What stands between Hypercorn and every route: limits, deadlines, faults, the log."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import trio
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from plugins.http_api.answers import NoSuchCall, refusal_response
from plugins.http_api.exchange import BodyBudget, ClientGone, Exchange
from plugins.http_api.faults import fault_without_words
from plugins.http_api.slots import Slots
from supervisor import DeadlineExceeded, Refusal, RuntimeFailed

if TYPE_CHECKING:
    import structlog

    from plugins.http_api.connections import Connection

# An answer that says "too late" may take this long to send.
_LATE_ANSWER_S = 5.0


class Guard:
    """An ASGI application around `app`, counting requests of its own.

    Errors leave as `refusal_response` makes them; no traceback ever does. With `log_requests`
    off nothing that a client wrote is logged, not even a path, nor what an exception may quote.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        log: structlog.stdlib.BoundLogger,
        max_requests: int,
        max_body_bytes: int,
        max_buffered_bytes: int,
        deadline_s: float,
        log_requests: bool = True,
    ) -> None:
        self._app = app
        self._log = log
        self._max_body_bytes = max_body_bytes
        self._deadline_s = deadline_s
        self._log_requests = log_requests
        self._budget = BodyBudget(max_buffered_bytes)
        self._requests = Slots(
            "requests", "the number of requests under way is bounded", most=max_requests
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection: Connection = scope["state"]["connection"]
        if scope["type"] != "http" or scope["http_version"] not in ("1.0", "1.1"):
            # WebSockets, and versions that there are not: no client of ours speaks them.
            connection.abort()
            return
        exchange = Exchange(
            scope,
            receive,
            send,
            budget=self._budget,
            max_body_bytes=self._max_body_bytes,
            deadline_s=self._deadline_s,
        )
        # "app" makes Starlette raise its own errors instead of answering them.
        scope = {**scope, "exchange": exchange, "app": self._app}
        began = trio.current_time()
        try:
            await self._answer_in_time(scope, exchange)
        finally:
            exchange.close()
            self._log.debug(
                "request",
                **self._named(scope),
                status=exchange.status,
                duration_ms=round((trio.current_time() - began) * 1000),
            )

    async def _answer_in_time(self, scope: Scope, exchange: Exchange) -> None:
        # What is asked for is for its client. What it sent (PUT) counts though it has gone:
        # `uploads` keep it for a while, since it may come back and go on.
        with ExitStack() as stack:
            stack.enter_context(exchange.time_limit)
            if scope["method"] != "PUT":
                stack.enter_context(exchange.connection.for_its_client(exchange.time_limit))
            await self._answer(scope, exchange)
        if not exchange.time_limit.cancelled_caught or exchange.connection.client_left:
            return
        if exchange.status is None:
            late = DeadlineExceeded("request", "must be done in the time that requests have")
            with trio.move_on_after(_LATE_ANSWER_S) as limit:
                await self._refuse(late, scope, exchange)
            if not limit.cancelled_caught:
                return
        exchange.connection.abort()

    async def _answer(self, scope: Scope, exchange: Exchange) -> None:
        refusal: Refusal
        try:
            self._check_admittance(exchange)
            await self._app(scope, _no_receive, exchange.send)
            return
        except ClientGone:
            return
        except Refusal as error:
            refusal = error
        except HTTPException as error:
            refusal = _no_such_call(scope, error)
        except Exception as error:
            self._log_fault(error, scope)
            refusal = RuntimeFailed("request", "the daemon failed inside; its log says how")
        if exchange.status is not None:
            exchange.connection.abort()  # half an answer is out: it must not look whole
            return
        await self._refuse(refusal, scope, exchange)

    def _log_fault(self, error: Exception, scope: Scope) -> None:
        if self._log_requests:
            self._log.exception("request failed", **self._named(scope))
        else:
            self._log.error("request failed", fault=fault_without_words(error))

    def _named(self, scope: Scope) -> dict[str, str]:
        return {"method": scope["method"], "path": scope["path"]} if self._log_requests else {}

    def _check_admittance(self, exchange: Exchange) -> None:
        if exchange.connection.refusal is not None:
            raise exchange.connection.refusal
        exchange.take_place(self._requests.one())

    async def _refuse(self, refusal: Refusal, scope: Scope, exchange: Exchange) -> None:
        response = refusal_response(refusal, path=scope["path"])
        await response(scope, _no_receive, exchange.send)


async def _no_receive() -> dict[str, object]:
    # Bodies are read through the exchange alone, so that every read is bounded.
    raise RuntimeError("bodies are read with exchange_of(request)")


def _no_such_call(scope: Scope, error: HTTPException) -> Refusal:
    call = f"{scope['method']} {scope['path']}"
    if error.status_code in (404, 405):
        return NoSuchCall(call, "is no call of this API")
    return RuntimeFailed(call, "the daemon failed inside; its log says how")
