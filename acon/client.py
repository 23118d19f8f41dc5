"""The daemon's management API (v2) from the other side: over its Unix socket, or a URL.

    async with Client.over_socket(Path("/run/acond/api.sock")) as client:
        await client.seal()

What the daemon refused is raised here as the same `Refusal` that it raised there. A
daemon that cannot be reached, or breaks off, is a `ConnectionFailed`. Answers are bounded
and checked: a relying party may well talk to a daemon that it does not trust.
"""

from __future__ import annotations

import base64
import errno
import functools
import os
import ssl
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import msgspec
import trio

from acon.answers import MAX_ANSWER_BYTES, read_bounded, refusal_of, typed
from acon.tar_source import Progress, TarBody, TarSource
from supervisor.background import background
from supervisor.errors import (
    Busy,
    ConfigError,
    Conflict,
    DeadlineExceeded,
    DigestMismatch,
    Refusal,
)
from supervisor.formats.digest import Digest
from supervisor.formats.evidence import MAX_EVIDENCE_BYTES
from supervisor.formats.status import MAX_STATUS_BYTES, Status, decode_status
from supervisor.operations import AdmissionResult, ContainerView, ImageView, ManifestUpload
from supervisor.seams import LayerSource

_CONNECT_TIMEOUT_S = 10.0
# The daemon bounds requests itself; these are a little longer, so that its reason arrives.
_REQUEST_TIMEOUT_S = 90.0
_TRANSFER_TIMEOUT_S = 3_700.0
_CLOSE_TIMEOUT_S = 2.0
# Attempts in a row that bring no byte further, before an upload is given up.
_UPLOAD_ATTEMPTS = 5
# The last of them begin anew, whatever is there: it may be another's.
_UPLOAD_ATTEMPTS_ANEW = 2
_UPLOAD_PAUSE_S = 0.5

# How often the daemon is asked how far a fetch is.
_PROGRESS_PAUSE_S = 0.25

# Bytes of the blob that came so far, and in all where that is known.
FetchProgress = Callable[[int, int | None], None]


class ConnectionFailed(Refusal):
    """The daemon was not reached, or broke off; `item` is the socket or URL."""

    kind = "connection"


class LayerState(msgspec.Struct, frozen=True, kw_only=True):
    """`state` is "absent", "incomplete" (an upload), "arriving" (a fetch) or "verified".

    Bytes are of the uncompressed tar, of the blob as it is stored while it is arriving; None
    where the daemon does not know.
    """

    state: str
    received_bytes: int | None
    total_bytes: int | None = None


class _Images(msgspec.Struct, frozen=True):
    images: tuple[ImageView, ...]


class _Containers(msgspec.Struct, frozen=True):
    containers: tuple[ContainerView, ...]


class _Started(msgspec.Struct, frozen=True):
    container_id: int


class Client:
    """Use `over_socket` or `over_url`, with `async with`. One trio task at a time or many."""

    def __init__(self, http: httpx.AsyncClient, *, where: str) -> None:
        self._http = http
        self._where = where

    @classmethod
    def over_socket(cls, path: Path) -> Self:
        """The daemon of this machine."""
        transport = httpx.AsyncHTTPTransport(uds=os.fspath(path))
        http = httpx.AsyncClient(
            transport=transport, base_url="http://acond", headers=_HEADERS, trust_env=False
        )
        return cls(http, where=str(path))

    @classmethod
    def over_url(cls, url: str, *, verify: bool = True, ca_file: Path | None = None) -> Self:
        """A daemon that config opened on TCP: `https://HOST:PORT`.

        `ca_file` (PEM) replaces the system's roots; without `verify` whoever answers is
        believed, which evidence that is verified afterwards can bear. Raises `ConfigError`.
        """
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

    # --- images and layers ------------------------------------------------------------------

    async def admit(self, group: Sequence[ManifestUpload]) -> AdmissionResult:
        """Admit a group as a whole. Raises what the daemon's admission raises."""
        images = [
            {
                "manifest": _base64(image.manifest),
                "signature": _base64(image.signature),
                "certificate": _base64(image.certificate_der),
            }
            for image in group
        ]
        answer = await self._call("POST", "/api/v2/images", {"images": images})
        return typed(answer, AdmissionResult)

    async def images(self) -> tuple[ImageView, ...]:
        return typed(await self._call("GET", "/api/v2/images"), _Images).images

    async def layer_state(self, digest: Digest) -> LayerState:
        return typed(await self._call("GET", f"/api/v2/layers/{digest}"), LayerState)

    async def fetch_layer(
        self, digest: Digest, source: LayerSource, *, progress: FetchProgress | None = None
    ) -> None:
        """Let the daemon read a layer from a file or registry that it can reach; returns once
        it is verified.

        `progress(received, total)` is told four times a second how many bytes of the blob
        have come, as far as the daemon says so, and once more at the end. Raises what the
        daemon refuses. Cancelling it closes the connection, by which the daemon gives up the
        transfer unless somebody else waits for it too.
        """
        path = f"/api/v2/layers/{digest}/fetch"
        async with AsyncExitStack() as stack:
            if progress is not None:
                watch = functools.partial(self._watch_fetch, digest, progress)
                await stack.enter_async_context(background(watch))
            await self._call("POST", path, {"source": source}, timeout_s=_TRANSFER_TIMEOUT_S)
        if progress is not None:
            progress(source.size_bytes, source.size_bytes)

    async def _watch_fetch(self, digest: Digest, progress: FetchProgress) -> None:
        while True:
            await trio.sleep(_PROGRESS_PAUSE_S)
            try:
                state = await self.layer_state(digest)
            except Refusal:
                continue  # the fetch itself will say what is wrong
            if state.state == "arriving":
                progress(state.received_bytes or 0, state.total_bytes)

    async def upload_layer(
        self, digest: Digest, source: TarSource, *, progress: Progress | None = None
    ) -> None:
        """Send a layer, going on where a broken connection ended; returns once it is verified.

        `progress(sent, total)` is called with bytes, at most once a chunk. Raises what the
        daemon refuses, and `ConnectionFailed` when five attempts bring no byte further.
        """
        total = source.size_bytes
        report = progress or (lambda sent, size: None)
        reached = -1
        attempts_left = _UPLOAD_ATTEMPTS
        while True:
            offset = 0
            failure: Refusal
            try:
                state = await self.layer_state(digest)
                if state.state == "arriving":
                    # Somebody else lets the daemon fetch it: most likely it will be here.
                    await self._wait_until_arrived(digest)
                    continue
                if state.state != "verified":
                    if attempts_left > _UPLOAD_ATTEMPTS_ANEW:
                        # All of it there and yet not verified: begin anew.
                        offset = (state.received_bytes or 0) % max(total, 1)
                    if offset > reached:
                        reached, attempts_left = offset, _UPLOAD_ATTEMPTS
                    state = await self._send_layer(digest, source, offset, total, report)
                if state.state == "verified":
                    report(total, total)
                    return
                failure = ConnectionFailed(
                    self._where, "took a part of the layer only", actual=state.received_bytes
                )
            except (ConnectionFailed, Conflict, Busy) as error:
                # Conflict: the daemon may not have noticed yet that our last attempt ended.
                failure = error
            except DigestMismatch as error:
                # Bytes that somebody else left there may be the wrong ones.
                if offset == 0:
                    raise
                failure = error
            attempts_left -= 1
            if attempts_left == 0:
                raise failure
            await trio.sleep(_UPLOAD_PAUSE_S)

    async def _wait_until_arrived(self, digest: Digest) -> None:
        with trio.move_on_after(_TRANSFER_TIMEOUT_S):
            while True:
                if (await self.layer_state(digest)).state != "arriving":
                    return
                await trio.sleep(_UPLOAD_PAUSE_S)
        raise DeadlineExceeded(
            str(digest), "somebody else's fetch must end", expected=f"{_TRANSFER_TIMEOUT_S:g} s"
        )

    async def _send_layer(
        self, digest: Digest, source: TarSource, offset: int, total: int, report: Progress
    ) -> LayerState:
        headers = {"Content-Length": str(total - offset)}
        if offset > 0:
            headers["Content-Range"] = f"bytes {offset}-{total - 1}/{total}"
        body = TarBody(source, offset, total, report)
        try:
            answer = await self._exchange(
                self._http.build_request("PUT", f"/api/v2/layers/{digest}", headers=headers),
                body=body,
                timeout_s=_TRANSFER_TIMEOUT_S,
                max_bytes=MAX_ANSWER_BYTES,
            )
        finally:
            await body.aclose()
        return typed(answer, LayerState)

    async def seal(self) -> None:
        """End loading for good. Idempotent."""
        await self._call("POST", "/api/v2/seal", {})

    # --- containers and evidence ------------------------------------------------------------

    async def start(self, image_id: str, environment: Sequence[str] = ()) -> int:
        """Start a container; `environment` holds NAME=VALUE requests. Returns its id."""
        body = {"image_id": image_id, "environment": list(environment)}
        return typed(await self._call("POST", "/api/v2/containers", body), _Started).container_id

    async def containers(self) -> tuple[ContainerView, ...]:
        return typed(await self._call("GET", "/api/v2/containers"), _Containers).containers

    async def signal(self, container_id: int, signum: int) -> None:
        """Send a signal that the manifest lists; negative: to the process group."""
        await self._call("POST", f"/api/v2/containers/{container_id}/signal", {"signal": signum})

    async def status(self) -> Status:
        """The status document, checked."""
        return decode_status(await self._call("GET", "/api/v2/status", max_bytes=MAX_STATUS_BYTES))

    async def evidence(self, nonce: bytes) -> bytes:
        """An evidence file for 16 to 64 bytes of nonce, as it came: nothing here judges it."""
        return await self._call(
            "POST", "/api/v2/evidence", {"nonce": nonce.hex()}, max_bytes=MAX_EVIDENCE_BYTES
        )

    # --- one exchange -----------------------------------------------------------------------

    async def _call(
        self,
        method: str,
        path: str,
        body: object | None = None,
        *,
        timeout_s: float = _REQUEST_TIMEOUT_S,
        max_bytes: int = MAX_ANSWER_BYTES,
    ) -> bytes:
        content = None if body is None else msgspec.json.encode(body)
        request = self._http.build_request(method, path, content=content)
        return await self._exchange(request, timeout_s=timeout_s, max_bytes=max_bytes)

    async def _exchange(
        self,
        request: httpx.Request,
        *,
        body: httpx.AsyncByteStream | None = None,
        timeout_s: float,
        max_bytes: int,
    ) -> bytes:
        item = f"{request.method} {request.url.path}"
        if body is not None:
            request.stream = body
        request.extensions["timeout"] = httpx.Timeout(
            timeout_s, connect=_CONNECT_TIMEOUT_S
        ).as_dict()
        try:
            with trio.fail_after(timeout_s):
                response = await self._http.send(request, stream=True)
                try:
                    answer = await read_bounded(response, item=item, max_bytes=max_bytes)
                finally:
                    with trio.move_on_after(_CLOSE_TIMEOUT_S, shield=True):
                        await response.aclose()
        except httpx.ConnectTimeout:
            raise ConnectionFailed(self._where, "must answer; the machine may be down") from None
        except (httpx.TimeoutException, trio.TooSlowError):
            raise DeadlineExceeded(
                item, "the daemon must answer in time", expected=f"{timeout_s:g} s"
            ) from None
        except httpx.HTTPError as error:
            raise self._connection_failed(error) from error
        if response.status_code >= 400:
            raise refusal_of(answer, response.status_code, item)
        return answer

    def _connection_failed(self, error: httpx.HTTPError) -> ConnectionFailed:
        if not isinstance(error, httpx.ConnectError):
            return ConnectionFailed(
                self._where,
                "the connection broke; the daemon's log may say why",
                actual=str(error) or type(error).__name__,
            )
        hint = "must be reachable: is acond running there?"
        cause = _os_error(error)
        if cause is not None:
            hint = _HINTS.get(cause.errno or 0, hint)
        return ConnectionFailed(
            self._where, hint, actual=error if cause is None else cause.strerror or cause
        )


_HEADERS = {"Accept-Encoding": "identity", "User-Agent": "acon"}

_HINTS = {
    errno.ENOENT: "is not there: is acond running? (--socket or ACON_SOCKET names another)",
    errno.ECONNREFUSED: "nobody listens: acond is not running",
    errno.EACCES: "may not be used by this user: try as root",
}


def _os_error(error: BaseException | None) -> OSError | None:
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
