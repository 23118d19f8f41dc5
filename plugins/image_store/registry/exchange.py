"""One HTTP request and its answer: what the transport's failures mean, bodies with bounds."""

from __future__ import annotations

import logging
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager, suppress

import httpx
import trio

from plugins.image_store.registry.patience import Passing, Patience
from plugins.image_store.registry.said import printable
from plugins.image_store.registry.urls import origin_of
from supervisor import DeadlineExceeded, Refusal, RuntimeFailed, Untrusted

CLEANUP_TIMEOUT_S = 5
# Identity: a body is hashed as it is sent, and nothing inflates what nobody has verified.
_HEADERS = {"user-agent": "attested-containers", "accept-encoding": "identity"}
_TOO_LARGE_HEADERS = 431
# Its traces hold the headers of answers: signed addresses, or whatever a server repeats.
logging.getLogger("httpcore").setLevel(logging.WARNING)


class Answer:
    """An answer whose body was not read yet. Whoever got it calls `aclose`."""

    def __init__(self, response: httpx.Response, url: httpx.URL, item: str) -> None:
        self.url = url
        self.item = item
        self._response = response
        self._pieces: AsyncIterator[bytes] | None = None
        self._ended = False

    @property
    def status(self) -> int:
        return self._response.status_code

    @property
    def headers(self) -> httpx.Headers:
        return self._response.headers

    async def chunk(self) -> bytes:
        """The body's next bytes, some 64 KiB at most, as sent; empty at the end.

        Raises `Passing` when the connection breaks or stalls, `Untrusted` for an encoded body.
        """
        if self._pieces is None:
            if self.headers.get("content-encoding", "identity").lower() != "identity":
                raise Untrusted(
                    self.item,
                    "a registry must send bodies as they are (Content-Encoding)",
                    expected="identity",
                    actual=self.headers["content-encoding"][:80],
                )
            stream = self._response.stream
            if not isinstance(stream, httpx.AsyncByteStream):
                raise RuntimeError("an asynchronous transport has asynchronous streams")
            self._pieces = aiter(stream)
        with failures_named(self.item, self.url):
            while not self._ended:
                try:
                    piece = await anext(self._pieces)
                except StopAsyncIteration:
                    self._ended = True
                    break
                except BaseException:
                    self._ended = True
                    raise
                if piece:
                    return piece
        return b""

    async def read(self, *, max_bytes: int) -> bytes:
        """The whole body. Raises `Untrusted` as soon as it has more bytes than that."""
        body = bytearray()
        while piece := await self.chunk():
            body += piece
            if len(body) > max_bytes:
                raise Untrusted(
                    self.item,
                    "an answer has a bounded size",
                    expected=f"at most {max_bytes} bytes",
                    actual=f"more than {max_bytes} bytes",
                )
        return bytes(body)

    async def beginning(self, *, max_bytes: int) -> bytes:
        """What can be had of the body, cut off; for showing what an error says."""
        body = bytearray()
        with suppress(Passing, Refusal):
            while len(body) < max_bytes and (piece := await self.chunk()):
                body += piece
        return bytes(body[:max_bytes])

    async def aclose(self) -> None:
        """Idempotent; shielded inside."""
        if self._pieces is not None and not self._ended:
            self._ended = True
            # The body is a stack of generators: an exception in the innermost is the only way
            # to end all of them here and now, instead of when memory is next collected.
            with trio.CancelScope(shield=True) as scope:
                scope.cancel()
                with failures_ignored():
                    async for _ in self._pieces:
                        pass
        with trio.move_on_after(CLEANUP_TIMEOUT_S, shield=True), failures_ignored():
            await self._response.aclose()


class Exchange:
    """Sends requests through one pool of connections: no redirects, cookies, proxies, logins.

    An async context manager; the connections are closed with it.
    """

    def __init__(self, tls: ssl.SSLContext, patience: Patience) -> None:
        self._timeouts = httpx.Timeout(
            patience.read_timeout_s, connect=patience.connect_timeout_s
        ).as_dict()
        self._transport = httpx.AsyncHTTPTransport(
            verify=tls, trust_env=False, limits=httpx.Limits(max_keepalive_connections=4)
        )

    async def __aenter__(self) -> Exchange:
        await self._transport.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        with trio.move_on_after(CLEANUP_TIMEOUT_S, shield=True):
            await self._transport.aclose()

    async def send(
        self,
        method: str,
        url: httpx.URL,
        *,
        item: str,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
    ) -> Answer:
        """Raises `Passing` for what may pass, `Untrusted` for what will not."""
        request = httpx.Request(
            method,
            url,
            headers={**_HEADERS, **(headers or {})},
            content=content,
            extensions={"timeout": self._timeouts},
        )
        with failures_named(item, url):
            response = await self._transport.handle_async_request(request)
        return Answer(response, url, item)


@contextmanager
def failures_named(item: str, url: httpx.URL) -> Iterator[None]:
    """Turn what httpx raises into `Passing` or a `Refusal`."""
    try:
        yield
    except httpx.HTTPError as error:
        raise _failure(error, item, url) from error


@contextmanager
def failures_ignored() -> Iterator[None]:
    """Nothing is lost when a connection breaks that is about to be closed."""
    with suppress(httpx.HTTPError, trio.BrokenResourceError, trio.ClosedResourceError):
        yield


def _failure(error: httpx.HTTPError, item: str, url: httpx.URL) -> Passing | Refusal:
    where = origin_of(url)
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return Untrusted(
                item,
                "the server's certificate must be for its name and from a known CA (ca_file)",
                expected=f"a certificate of {url.raw_host.decode('ascii')}",
                actual=cause.verify_message,
            )
        if getattr(cause, "error_status_hint", None) == _TOO_LARGE_HEADERS:
            return Untrusted(
                item, "an answer's headers have a bounded size", actual=f"more from {where}"
            )
    unsent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
    if isinstance(error, httpx.TimeoutException):
        rule = "could not be connected to in time" if unsent else "stopped answering"
        return Passing(DeadlineExceeded(item, rule, actual=where), maybe_done=not unsent)
    rule = "could not be connected to" if unsent else "broke the connection"
    # A protocol error's words hold what the server sent, which may be what we sent it.
    reason = type(error).__name__ if isinstance(error, httpx.ProtocolError) else str(error)
    return Passing(
        RuntimeFailed(item, rule, actual=f"{where}: {printable(reason)}"), maybe_done=not unsent
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
