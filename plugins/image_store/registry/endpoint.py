"""One host that serves a registry's API: where it is, who we are there, where it sends us.

A redirect is followed by hand: at most `MAX_REDIRECTS`, for GET and HEAD alone, never to a
place that `urls.require_reachable` refuses, and what authorizes us stays with the origin that
it is for.
"""

from __future__ import annotations

from collections.abc import Mapping

import httpx
import msgspec

from plugins.image_store.config import RegistryConfig
from plugins.image_store.registry.auth import Authenticator, Scope
from plugins.image_store.registry.credentials import Credentials
from plugins.image_store.registry.exchange import Answer, Exchange
from plugins.image_store.registry.names import api_host, host_of, is_local
from plugins.image_store.registry.patience import Passing, retry_after_s
from plugins.image_store.registry.said import (
    MAX_ERROR_BYTES,
    errors_said,
    refusal_of,
    without_secrets,
)
from plugins.image_store.registry.urls import origin_of, parse_url, require_reachable
from supervisor import Denied, FormatError, Refusal, Untrusted

MAX_REDIRECTS = 5
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MAY_PASS = frozenset({408, 429, 500, 502, 503, 504})
# Of these the registry says that it did nothing.
_NOT_DONE = frozenset({408, 429, 503})
_SHOWN_PATH_CHARACTERS = 160


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """A request. `path` begins with `/v2/`, or is a URL that the registry gave (`Location`)."""

    method: str
    path: str
    scope: Scope
    headers: Mapping[str, str] = {}
    content: bytes | None = None


class Endpoint:
    """A registry or a mirror. `item` names a request in refusals: host and path, no query."""

    def __init__(
        self,
        registry: str,
        config: RegistryConfig,
        credentials: Credentials,
        exchange: Exchange,
        *,
        attempts: int,
    ) -> None:
        self.registry = registry
        self.attempts = attempts
        self._plain_http = config.plain_http
        scheme = "http" if speaks_plainly(registry, config) else "https"
        self._base = parse_url(f"{scheme}://{api_host(registry)}", item=registry)
        self._exchange = exchange
        self._auth = Authenticator(
            registry, self._base, credentials, exchange, plain_http=config.plain_http
        )

    def item(self, ask: Ask) -> str:
        if ask.path.startswith("/"):
            return self.registry + ask.path.partition("?")[0][:_SHOWN_PATH_CHARACTERS]
        return f"{self.registry} (a location that it gave)"

    async def answer(self, ask: Ask) -> Answer:
        """The answer, whatever its status, after a login and redirects; the caller closes it.

        Raises `Passing`, `Denied`, `Untrusted`, `FormatError`.
        """
        item = self.item(ask)
        url = self._url(ask, item)
        redirects, asked_to_log_in = 0, False
        while True:
            answer = await self._send(ask, url, item)
            if answer.status == 401 and self._is_ours(url) and not asked_to_log_in:
                asked_to_log_in = True
                await _finish(answer)
                await self._auth.meet(answer.headers.get_list("www-authenticate"), ask.scope)
            elif answer.status in _REDIRECTS and "location" in answer.headers:
                redirects += 1
                await _finish(answer)
                url = self._redirected(ask, answer, redirects, item)
            else:
                return answer

    async def fault(self, answer: Answer, *, expected: frozenset[int]) -> Passing | Refusal:
        """What an answer with an unexpected status comes to; reads its body, closes nothing."""
        said = errors_said(await answer.beginning(max_bytes=MAX_ERROR_BYTES))
        if answer.status == 401 and not self._is_ours(answer.url):
            return Denied(
                answer.item,
                "a login is not sent to where the registry leads",
                expected=f"no login at {origin_of(answer.url)}, only at {origin_of(self._base)}",
                actual=f"401{said}",
            )
        refusal = refusal_of(answer.status, answer.item, said, expected=expected)
        if answer.status not in _MAY_PASS:
            return refusal
        asked_s = retry_after_s(answer.headers.get("retry-after"), answer.headers.get("date"))
        return Passing(refusal, maybe_done=answer.status not in _NOT_DONE, pause_s=asked_s)

    def discreet(self, error: Refusal) -> Refusal:
        """`error` as it may leave this package: bounded, without what authorizes us here."""
        return without_secrets(error, self._auth.secrets)

    async def _send(self, ask: Ask, url: httpx.URL, item: str) -> Answer:
        headers = dict(ask.headers)
        authorization = self._auth.header(ask.scope) if self._is_ours(url) else None
        if authorization is not None:
            headers["authorization"] = authorization
        return await self._exchange.send(
            ask.method, url, item=item, headers=headers, content=ask.content
        )

    def _url(self, ask: Ask, item: str) -> httpx.URL:
        if ask.path.startswith("/v2/"):
            return parse_url(ask.path, item=item, base=self._base)
        if not ask.path.startswith(("https://", "http://")):
            raise FormatError(item, "a request's path begins with /v2/", actual=ask.path[:80])
        url = parse_url(ask.path, item=item)
        if not self._is_ours(url):
            require_reachable(
                self._base, url, plain_http=self._plain_http, item=item, what="location"
            )
        return url

    def _redirected(self, ask: Ask, answer: Answer, redirects: int, item: str) -> httpx.URL:
        url = parse_url(answer.headers["location"], item=item, base=answer.url)
        if ask.method not in ("GET", "HEAD"):
            raise Untrusted(
                item,
                "a redirect is followed for GET and HEAD alone",
                expected=f"an answer from {origin_of(answer.url)}",
                actual=f"{ask.method} redirected to {origin_of(url)}",
            )
        if redirects > MAX_REDIRECTS:
            raise Untrusted(
                item,
                f"at most {MAX_REDIRECTS} redirects are followed",
                expected=f"an answer from {origin_of(answer.url)}",
                actual=f"another redirect to {origin_of(url)}",
            )
        require_reachable(answer.url, url, plain_http=self._plain_http, item=item, what="redirect")
        return url

    def _is_ours(self, url: httpx.URL) -> bool:
        return origin_of(url) == origin_of(self._base)


async def _finish(answer: Answer) -> None:
    """Read what little the body of a redirect or a demand has, to use its connection again."""
    try:
        await answer.beginning(max_bytes=MAX_ERROR_BYTES)
    finally:
        await answer.aclose()


def speaks_plainly(registry: str, config: RegistryConfig) -> bool:
    """Whether a registry is spoken to over plain HTTP: where its table says so, and on
    loopback, unless a CA is given for it there."""
    return config.plain_http or (config.ca_file is None and is_local(host_of(registry)))
