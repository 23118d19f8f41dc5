"""A registry's API for those who pull from it and push to it: mirrors, retries, bounds.

OCI distribution specification 1.1. Digests that a registry states (Docker-Content-Digest)
are believed nowhere; whoever asks compares bytes.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager

import msgspec
import trio

from plugins.image_store.config import RegistryConfig
from plugins.image_store.registry.auth import Scope
from plugins.image_store.registry.credentials import Credentials
from plugins.image_store.registry.download import Download
from plugins.image_store.registry.endpoint import Ask, Endpoint
from plugins.image_store.registry.exchange import Exchange
from plugins.image_store.registry.names import (
    check_repository,
    parse_blob_digest,
    parse_registry,
)
from plugins.image_store.registry.patience import Patience, persist
from plugins.image_store.registry.said import with_mirrors
from plugins.image_store.registry.urls import parse_url
from supervisor import ConfigError, Denied, Refusal

MAX_ANSWER_BYTES = 4 * 2**20
OK = frozenset({200})
_IDEMPOTENT = frozenset({"GET", "HEAD", "PUT"})
_READING = frozenset({"GET", "HEAD"})


class RegistryAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """An answer and its whole body. `headers` by lower-case name; a `location` is absolute."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class RegistryClient:
    """One registry and its mirrors. An async context manager; connections end with it.

    `registry` is HOST or HOST:PORT. `registries` has the tables of all registries by name
    ("*": all others), for the mirrors: one without a table is asked over TLS with the
    system's roots. Plain HTTP is spoken to a registry whose table says so, and on loopback
    unless the table gives a CA. Environment variables (proxies, CA files) mean nothing.

    Raises `FormatError` for a bad name, `ConfigError` for a CA file that cannot be read.
    May be used by several tasks at once.
    """

    def __init__(
        self,
        registry: str,
        config: RegistryConfig,
        credentials: Credentials,
        *,
        registries: Mapping[str, RegistryConfig] | None = None,
        patience: Patience | None = None,
    ) -> None:
        self._patience = Patience() if patience is None else patience
        self._credentials = credentials
        self.registry = parse_registry(registry)
        names = [parse_registry(name, item="mirrors") for name in config.mirrors]
        tables = {} if registries is None else registries
        self._places = [
            *((name, table_of(tables, name) or RegistryConfig()) for name in names),
            (self.registry, config),
        ]
        self._endpoints: list[Endpoint] = []
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> RegistryClient:
        endpoints = []
        async with AsyncExitStack() as stack:
            for place in self._places:
                name, config = place
                tls = await trio.to_thread.run_sync(_tls, config.ca_file)
                exchange = await stack.enter_async_context(Exchange(tls, self._patience))
                is_last = place is self._places[-1]
                attempts = self._patience.attempts if is_last else self._patience.mirror_attempts
                endpoints.append(
                    Endpoint(name, config, self._credentials, exchange, attempts=attempts)
                )
            self._stack = stack.pop_all()
        self._endpoints = endpoints
        return self

    async def __aexit__(self, *_: object) -> None:
        self._endpoints = []
        await self._stack.aclose()

    async def call(
        self,
        method: str,
        path: str,
        *,
        repository: str,
        actions: str = "pull",
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
        max_bytes: int = MAX_ANSWER_BYTES,
        statuses: frozenset[int] = OK,
    ) -> RegistryAnswer:
        """Ask and read the whole answer; it has one of `statuses` and `max_bytes` at most.

        `path` begins with `/v2/` and may have a query, or is a `location` of an earlier answer
        (another origin than the registry's sees no login). GET and HEAD ask the mirrors first,
        where only a status below 400 counts. POST and PATCH are repeated only if the registry
        cannot have done them. Raises `Denied` (401, 403), `UnknownItem` (404), `Busy` (429),
        `RuntimeFailed` (unreachable, 5xx), `DeadlineExceeded`, `Untrusted` (all else).
        """
        check_repository(repository)
        ask = Ask(
            method=method,
            path=path,
            scope=Scope(repository, actions),
            headers={} if headers is None else headers,
            content=content,
        )
        failed: list[str] = []
        for endpoint in self._asked(method, path):
            is_last = endpoint is self._endpoints[-1]
            wanted = statuses if is_last else frozenset(one for one in statuses if one < 400)
            try:
                return await self._call(endpoint, ask, wanted, max_bytes)
            except Refusal as error:
                shown = endpoint.discreet(error)
                if is_last:
                    raise with_mirrors(shown, failed) from None
                failed.append(str(shown))
        raise RuntimeError("a client is used inside its context only")

    @asynccontextmanager
    async def download(
        self, repository: str, blob_digest: str, *, size_bytes: int
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """The blob's bytes in chunks of some 64 KiB, exactly `size_bytes` of them.

        The iterator resumes broken transfers and raises as `call` does; the digest is for the
        reader to compare. Holds one chunk at a time and reads no further than it is asked.
        """
        check_repository(repository)
        parse_blob_digest(blob_digest)
        download = Download(repository, blob_digest, size_bytes, self._patience)
        async with aclosing(download.chunks(self._asked("GET", "/"))) as chunks:
            yield chunks

    def _asked(self, method: str, path: str) -> list[Endpoint]:
        if not self._endpoints:
            raise RuntimeError("a client is used inside its context only")
        reads_all = method in _READING and path.startswith("/")
        return self._endpoints if reads_all else self._endpoints[-1:]

    async def _call(
        self, endpoint: Endpoint, ask: Ask, statuses: frozenset[int], max_bytes: int
    ) -> RegistryAnswer:
        async def attempt() -> RegistryAnswer:
            answer = await endpoint.answer(ask)
            try:
                if answer.status not in statuses:
                    raise await endpoint.fault(answer, expected=statuses)
                headers = dict(answer.headers)
                if "location" in headers:
                    location = parse_url(headers["location"], item=answer.item, base=answer.url)
                    headers["location"] = str(location)
                body = b"" if ask.method == "HEAD" else await answer.read(max_bytes=max_bytes)
                return RegistryAnswer(status=answer.status, headers=headers, body=body)
            finally:
                await answer.aclose()

        return await persist(
            attempt,
            self._patience,
            item=endpoint.item(ask),
            attempts=endpoint.attempts,
            idempotent=ask.method in _IDEMPOTENT,
        )


def table_of(registries: Mapping[str, RegistryConfig], registry: str) -> RegistryConfig | None:
    """The table of a registry, however its name is spelled, or that of "*"; None: neither."""
    for name, config in registries.items():
        if name != "*" and parse_registry(name, item="registries") == registry:
            return config
    return registries.get("*")


def require_table(registries: Mapping[str, RegistryConfig], registry: str) -> RegistryConfig:
    """As `table_of`. Raises `Denied` when the configuration does not allow the registry."""
    config = table_of(registries, registry)
    if config is None:
        raise Denied(
            "registry",
            "only registries that the configuration names are asked (registries)",
            expected=", ".join(registries) or "none configured",
            actual=registry,
        )
    return config


def _tls(ca_file: str | None) -> ssl.SSLContext:
    """A client's context: the roots in `ca_file`, else the system's."""
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            ca_file or "the system's CA certificates",
            "must hold CA certificates (PEM)",
            actual=error.strerror or "no certificate",
        ) from None
