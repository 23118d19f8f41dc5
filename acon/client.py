"""The daemon's management API (v2) from the other side: over its Unix socket, or a URL.

    async with Client.over_socket(Path("/run/acond/api.sock")) as client:
        await client.seal()

What the daemon refused is raised here as the same `Refusal` that it raised there. A
daemon that cannot be reached, or breaks off, is a `ConnectionFailed`. Answers are bounded
and checked: a relying party may well talk to a daemon that it does not trust.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
import trio

from acon.answers import typed
from acon.connection import Connection, ConnectionFailed
from acon.container_client import ContainerClient
from acon.tar_source import Progress, TarBody, TarSource
from supervisor.background import background
from supervisor.errors import Busy, Conflict, DeadlineExceeded, DigestMismatch, Refusal
from supervisor.formats.digest import Digest
from supervisor.formats.evidence import MAX_EVIDENCE_BYTES
from supervisor.formats.status import MAX_STATUS_BYTES, Status, decode_status
from supervisor.operations import AdmissionResult, ImageView, ManifestUpload
from supervisor.seams import LayerSource

# The daemon bounds transfers itself; this is a little longer, so that its reason arrives.
_TRANSFER_TIMEOUT_S = 3_700.0
# Attempts in a row that bring no byte further, before an upload is given up.
_UPLOAD_ATTEMPTS = 5
# The last of them begin anew, whatever is there: it may be another's.
_UPLOAD_ATTEMPTS_ANEW = 2
_UPLOAD_PAUSE_S = 0.5

# How often the daemon is asked how far a fetch is.
_PROGRESS_PAUSE_S = 0.25

# Bytes of the blob that came so far, and in all where that is known.
FetchProgress = Callable[[int, int | None], None]


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


class _Manifest(msgspec.Struct, frozen=True):
    manifest: str


class Client(ContainerClient):
    """Use `over_socket` or `over_url`, with `async with`. One trio task at a time or many.

    What is done with containers is in `ContainerClient`.
    """

    @classmethod
    def over_socket(cls, path: Path) -> Self:
        """The daemon of this machine."""
        return cls(Connection.over_socket(path))

    @classmethod
    def over_url(cls, url: str, *, verify: bool = True, ca_file: Path | None = None) -> Self:
        """A daemon that config opened on TCP: `https://HOST:PORT`.

        `ca_file` (PEM) replaces the system's roots; without `verify` whoever answers is
        believed, which evidence that is verified afterwards can bear. Raises `ConfigError`.
        """
        return cls(Connection.over_url(url, verify=verify, ca_file=ca_file))

    async def __aenter__(self) -> Self:
        await self._connection.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._connection.__aexit__(kind, error, traceback)

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
        answer = await self._connection.call("POST", "/api/v2/images", {"images": images})
        return typed(answer, AdmissionResult)

    async def images(self) -> tuple[ImageView, ...]:
        return typed(await self._connection.call("GET", "/api/v2/images"), _Images).images

    async def manifest(self, image_id: str) -> bytes:
        """An admitted image's manifest as its signer wrote it. Raises `UnknownItem`."""
        # v2 has no route for it: the evidence carries manifests. This is v1, for one alone.
        answer = await self._connection.call("GET", f"/api/v1/manifest/{image_id}")
        return typed(answer, _Manifest).manifest.encode()

    async def layer_state(self, digest: Digest) -> LayerState:
        return typed(await self._connection.call("GET", f"/api/v2/layers/{digest}"), LayerState)

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
            await self._connection.call(
                "POST", path, {"source": source}, timeout_s=_TRANSFER_TIMEOUT_S
            )
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
                    self._connection.where,
                    "took a part of the layer only",
                    actual=state.received_bytes,
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
            answer = await self._connection.send(
                "PUT",
                f"/api/v2/layers/{digest}",
                body,
                headers=headers,
                timeout_s=_TRANSFER_TIMEOUT_S,
            )
        finally:
            await body.aclose()
        return typed(answer, LayerState)

    async def seal(self) -> None:
        """End loading for good. Idempotent."""
        await self._connection.call("POST", "/api/v2/seal", {})

    # --- what the daemon says of itself -------------------------------------------------------

    async def status(self) -> Status:
        """The status document, checked."""
        return decode_status(
            await self._connection.call("GET", "/api/v2/status", max_bytes=MAX_STATUS_BYTES)
        )

    async def evidence(self, nonce: bytes) -> bytes:
        """An evidence file for 16 to 64 bytes of nonce, as it came: nothing here judges it."""
        return await self._connection.call(
            "POST", "/api/v2/evidence", {"nonce": nonce.hex()}, max_bytes=MAX_EVIDENCE_BYTES
        )


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
