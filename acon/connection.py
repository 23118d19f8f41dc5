"""One conversation over HTTP with a daemon: requests, their bounds, and what went wrong.

A daemon that cannot be reached, or breaks off, is a `ConnectionFailed`.
"""

from __future__ import annotations

import errno
import os
import ssl
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import msgspec
import trio

from acon.answers import MAX_ANSWER_BYTES, read_bounded, refusal_of
from supervisor.errors import ConfigError, DeadlineExceeded, Refusal

CONNECT_TIMEOUT_S = 10.0
# The daemon bounds requests itself; this is a little longer, so that its reason arrives.
REQUEST_TIMEOUT_S = 90.0
_CLOSE_TIMEOUT_S = 2.0

_HEADERS = {"Accept-Encoding": "identity", "User-Agent": "acon"}

_HINTS = {
    errno.ENOENT: "is not there: is acond running? (--socket or ACON_SOCKET names another)",
    errno.ECONNREFUSED: "nobody listens: acond is not running",
    errno.EACCES: "may not be used by this user: try as root",
}


class ConnectionFailed(Refusal):
    """The daemon was not reached, or broke off; `item` is the socket or URL."""

    kind = "connection"


class Connection:
    """Made by `over_socket` or `over_url`; to be used with `async with`, by any number of tasks."""

    def __init__(self, http: httpx.AsyncClient, *, where: str) -> None:
        self._http = http
        self.where = where

    @classmethod
    def over_socket(cls, path: Path) -> Self:
        """The daemon that listens on a Unix socket of this machine."""
        transport = httpx.AsyncHTTPTransport(uds=os.fspath(path))
        http = httpx.AsyncClient(
            transport=transport, base_url="http://acond", headers=_HEADERS, trust_env=False
        )
        return cls(http, where=str(path))

    @classmethod
    def over_url(cls, url: str, *, verify: bool = True, ca_file: Path | None = None) -> Self:
        """A daemon on TCP, with TLS. Raises `ConfigError`; see `Client.over_url`."""
        if not url.startswith("https://"):
            raise ConfigError("url", "must begin with https://", actual=url)
        try:
            context = ssl.create_default_context(cafile=ca_file)
        except OSError as error:
            raise ConfigError("CA file", "must be PEM", actual=f"{ca_file}: {error}") from error
        if not verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        http = httpx.AsyncClient(
            verify=context, base_url=url, headers=_HEADERS, trust_env=False, follow_redirects=False
        )
        return cls(http, where=url)

    async def __aenter__(self) -> Self:
        await self._http.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._http.__aexit__(kind, error, traceback)

    async def call(
        self,
        method: str,
        path: str,
        body: object | None = None,
        *,
        timeout_s: float = REQUEST_TIMEOUT_S,
        max_bytes: int = MAX_ANSWER_BYTES,
    ) -> bytes:
        """One request with a JSON body or none; returns the body of its answer.

        Raises what the daemon refused, `ConnectionFailed`, `DeadlineExceeded`, and
        `FormatError` for an answer beyond `max_bytes`.
        """
        content = None if body is None else msgspec.json.encode(body)
        request = self._http.build_request(method, path, content=content)
        return await self._exchange(request, timeout_s=timeout_s, max_bytes=max_bytes)

    async def send(
        self,
        method: str,
        path: str,
        body: httpx.AsyncByteStream,
        *,
        headers: dict[str, str],
        timeout_s: float,
    ) -> bytes:
        """As `call`, with a body that is read while it is sent; the caller closes it."""
        request = self._http.build_request(method, path, headers=headers)
        request.stream = body
        return await self._exchange(request, timeout_s=timeout_s, max_bytes=MAX_ANSWER_BYTES)

    async def open(self, path: str, *, silence_s: float) -> httpx.Response:
        """A GET whose answer is read as it comes, with `raised` around each read; `close` it.

        A read that brings nothing for `silence_s` fails. Raises as `call`.
        """
        request = self._http.build_request("GET", path)
        timeout = httpx.Timeout(silence_s, connect=CONNECT_TIMEOUT_S)
        request.extensions["timeout"] = timeout.as_dict()
        item = _item(request)
        try:
            with trio.fail_after(REQUEST_TIMEOUT_S):
                response = await self._http.send(request, stream=True)
                if response.status_code < 400:
                    return response
                try:
                    answer = await read_bounded(response, item=item, max_bytes=MAX_ANSWER_BYTES)
                finally:
                    await self.close(response)
        except (httpx.HTTPError, trio.TooSlowError) as error:
            raise self.failure(error, item=item, timeout_s=silence_s) from error
        raise refusal_of(answer, response.status_code, item)

    async def close(self, response: httpx.Response) -> None:
        """End an answer that `open` gave, read to its end or not."""
        with trio.move_on_after(_CLOSE_TIMEOUT_S, shield=True):
            await response.aclose()

    async def _exchange(self, request: httpx.Request, *, timeout_s: float, max_bytes: int) -> bytes:
        item = _item(request)
        request.extensions["timeout"] = httpx.Timeout(
            timeout_s, connect=CONNECT_TIMEOUT_S
        ).as_dict()
        try:
            with trio.fail_after(timeout_s):
                response = await self._http.send(request, stream=True)
                try:
                    answer = await read_bounded(response, item=item, max_bytes=max_bytes)
                finally:
                    await self.close(response)
        except (httpx.HTTPError, trio.TooSlowError) as error:
            raise self.failure(error, item=item, timeout_s=timeout_s) from error
        if response.status_code >= 400:
            raise refusal_of(answer, response.status_code, item)
        return answer

    def failure(
        self, error: httpx.HTTPError | trio.TooSlowError, *, item: str, timeout_s: float
    ) -> Refusal:
        """What a person is told of a failure on the way."""
        if isinstance(error, httpx.ConnectTimeout):
            return ConnectionFailed(self.where, "must answer; the machine may be down")
        if isinstance(error, httpx.TimeoutException | trio.TooSlowError):
            return DeadlineExceeded(
                item, "the daemon must answer in time", expected=f"{timeout_s:g} s"
            )
        if not isinstance(error, httpx.ConnectError):
            return ConnectionFailed(
                self.where,
                "the connection broke; the daemon's log may say why",
                actual=str(error) or type(error).__name__,
            )
        hint = "must be reachable: is acond running there?"
        cause = _os_error(error)
        if cause is not None:
            hint = _HINTS.get(cause.errno or 0, hint)
        return ConnectionFailed(
            self.where, hint, actual=error if cause is None else cause.strerror or cause
        )


def _item(request: httpx.Request) -> str:
    return f"{request.method} {request.url.path}"


def _os_error(error: BaseException | None) -> OSError | None:
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
