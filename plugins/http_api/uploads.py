"""Layers on their way in, kept between requests so that a broken transfer can go on.

An entry's life: claimed by one request (others get `Conflict`), then either finished,
or dropped because its bytes are wrong, or parked because its sender stopped or went
away. A parked one can be claimed again until its time is up; then its bytes are freed.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

import msgspec
import trio

from plugins.http_api.arrivals import LayerState
from plugins.http_api.exchange import ClientGone, Exchange
from supervisor import Busy, Conflict, DeadlineExceeded, FormatError

if TYPE_CHECKING:
    import structlog

    from plugins.http_api.settings import Settings
    from supervisor import LayerUpload, Operations
    from supervisor.formats.digest import Digest

_ABORT_TIMEOUT_S = 10
# RFC 9110, section 14.4, in the form that requests use.
_CONTENT_RANGE = re.compile(r"bytes (0|[1-9][0-9]{0,18})-([0-9]{1,19})/([0-9]{1,19}|\*)", re.ASCII)


class BodyRange(msgspec.Struct, frozen=True, kw_only=True):
    """Which bytes of the layer a request's body holds; None where the client did not say.

    `whole` without a Content-Range: the body is the layer, all of it.
    """

    start: int = 0
    size_bytes: int | None = None
    total_bytes: int | None = None
    whole: bool = True


def body_range(exchange: Exchange) -> BodyRange:
    """From Content-Range and Content-Length. Raises `FormatError` if they disagree."""
    text = exchange.headers.get("content-range")
    length = exchange.content_length
    if text is None:
        return BodyRange(size_bytes=length, total_bytes=length)
    match = _CONTENT_RANGE.fullmatch(text)
    if match is None:
        raise FormatError("Content-Range", "is written `bytes FIRST-LAST/TOTAL`", actual=text[:160])
    start, last = int(match[1]), int(match[2])
    total = None if match[3] == "*" else int(match[3])
    if last < start or (total is not None and last >= total):
        raise FormatError("Content-Range", "FIRST <= LAST < TOTAL", actual=text)
    size_bytes = last - start + 1
    if length is not None and length != size_bytes:
        raise FormatError(
            "Content-Length", "must agree with Content-Range", expected=size_bytes, actual=length
        )
    return BodyRange(start=start, size_bytes=size_bytes, total_bytes=total, whole=False)


class _Entry:
    """`expires_at` (trio's clock) is infinite while a request has the entry."""

    def __init__(self) -> None:
        self.upload: LayerUpload | None = None
        self.total_bytes: int | None = None
        self.expires_at = math.inf

    @property
    def is_parked(self) -> bool:
        return self.expires_at != math.inf


class Uploads:
    """All open uploads. `sweep` must run beside it; `abort_all` ends it."""

    def __init__(
        self, operations: Operations, settings: Settings, log: structlog.stdlib.BoundLogger
    ) -> None:
        self._operations = operations
        self._settings = settings
        self._log = log
        self._entries: dict[Digest, _Entry] = {}
        # Only layers that an admitted image names ever get verified, so it stays small.
        self._finished_bytes: dict[Digest, int] = {}
        self._parked = trio.Event()

    def state(self, digest: Digest) -> LayerState:
        """What is here of a layer, fetches left aside."""
        if self._operations.has_layer(digest):
            size_bytes = self._finished_bytes.get(digest)
            return LayerState(state="verified", received_bytes=size_bytes, total_bytes=size_bytes)
        entry = self._entries.get(digest)
        if entry is None or entry.upload is None:
            return LayerState(state="absent", received_bytes=0)
        return _incomplete(entry, entry.upload)

    async def receive(self, digest: Digest, exchange: Exchange) -> LayerState:
        """Take a request's body into the layer; verify the layer once all of it is here.

        A layer that is verified already is not read again. Raises `Conflict` when another
        request is sending it or the range does not begin where the bytes end, `Busy` when
        too many uploads are open, `Untrusted` for wrong bytes (all are freed then).
        """
        part = body_range(exchange)
        if self._operations.has_layer(digest):
            return self.state(digest)
        entry, upload = await self._claim(digest, part)
        parked = False
        try:
            await self._copy(digest, part, upload, exchange)
            if part.whole or upload.received_bytes == entry.total_bytes:
                size_bytes = upload.received_bytes
                entry.upload = None  # `finish_layer` owns it from here on
                await self._operations.finish_layer(digest, upload)
                self._finished_bytes[digest] = size_bytes
                return self.state(digest)
            parked = True
            return _incomplete(entry, upload)
        except (ClientGone, DeadlineExceeded, trio.Cancelled):
            parked = entry.upload is not None
            raise
        finally:
            if parked:
                self._park(digest, entry)
            else:
                await self._drop(digest, entry)

    async def sweep(self) -> None:
        """Free what nobody came back for. Runs until cancelled."""
        while True:
            next_end = min((entry.expires_at for entry in self._entries.values()), default=math.inf)
            with trio.move_on_at(next_end):
                await self._parked.wait()
            self._parked = trio.Event()
            now = trio.current_time()
            for digest, entry in list(self._entries.items()):
                if entry.expires_at <= now:
                    self._log.info("upload abandoned", layer=str(digest))
                    await self._drop(digest, entry)

    async def abort_all(self) -> None:
        """Free everything. Shielded, bounded, never raises."""
        for digest, entry in list(self._entries.items()):
            await self._drop(digest, entry)

    async def _claim(self, digest: Digest, part: BodyRange) -> tuple[_Entry, LayerUpload]:
        entry = self._entries.get(digest)
        if entry is not None and not entry.is_parked:
            raise Conflict(str(digest), "is being uploaded by somebody else")
        if entry is not None and entry.upload is not None and not part.whole:
            self._check_continues(digest, part, entry, entry.upload.received_bytes)
            entry.expires_at = math.inf
            return entry, entry.upload
        if part.start != 0:
            raise Conflict(
                str(digest), "continues an upload that is not here", expected=0, actual=part.start
            )
        if entry is not None:
            await self._drop(digest, entry)
        return await self._begin(digest, part)

    @staticmethod
    def _check_continues(
        digest: Digest, part: BodyRange, entry: _Entry, received_bytes: int
    ) -> None:
        if part.start != received_bytes:
            raise Conflict(
                str(digest),
                "an upload continues where its bytes end",
                expected=received_bytes,
                actual=part.start,
            )
        if entry.total_bytes is None:
            entry.total_bytes = part.total_bytes
        elif part.total_bytes not in (None, entry.total_bytes):
            raise Conflict(
                str(digest),
                "an upload's size does not change",
                expected=entry.total_bytes,
                actual=part.total_bytes,
            )

    async def _begin(self, digest: Digest, part: BodyRange) -> tuple[_Entry, LayerUpload]:
        # No checkpoint between the look and the entry: two clients cannot both get in.
        if digest in self._entries:
            raise Conflict(str(digest), "is being uploaded by somebody else")
        if len(self._entries) >= self._settings.max_uploads:
            raise Busy(
                "uploads",
                "the number of open uploads is bounded",
                expected=f"at most {self._settings.max_uploads}",
            )
        entry = self._entries[digest] = _Entry()
        entry.total_bytes = part.total_bytes
        try:
            upload = await self._operations.upload_layer(digest, size_bytes=part.total_bytes)
        except BaseException:
            del self._entries[digest]
            raise
        entry.upload = upload
        return entry, upload

    async def _copy(
        self, digest: Digest, part: BodyRange, upload: LayerUpload, exchange: Exchange
    ) -> None:
        left = math.inf if part.size_bytes is None else part.size_bytes
        while chunk := await exchange.read_chunk(pause_s=self._settings.upload_pause_s):
            if len(chunk) > left:
                raise FormatError(
                    str(digest),
                    "a body ends where its Content-Range ends",
                    expected=f"{part.size_bytes} bytes",
                    actual="more",
                )
            await upload.write(chunk)
            left -= len(chunk)
        if left not in (0, math.inf):
            raise FormatError(
                str(digest),
                "a body goes on to where its Content-Range ends",
                expected=f"{part.size_bytes} bytes",
                actual=f"{left:.0f} fewer",
            )

    def _park(self, digest: Digest, entry: _Entry) -> None:
        entry.expires_at = trio.current_time() + self._settings.upload_keep_s
        self._parked.set()
        self._log.info("upload waits for its sender", layer=str(digest))

    async def _drop(self, digest: Digest, entry: _Entry) -> None:
        if self._entries.get(digest) is entry:
            del self._entries[digest]
        if entry.upload is not None:
            with trio.move_on_after(_ABORT_TIMEOUT_S, shield=True):
                await entry.upload.abort()


def _incomplete(entry: _Entry, upload: LayerUpload) -> LayerState:
    return LayerState(
        state="incomplete", received_bytes=upload.received_bytes, total_bytes=entry.total_bytes
    )
