"""A repository of a registry, for writing (OCI distribution specification 1.1, "Push").

Everything is named by its digest, so doing a thing twice changes nothing; what is there
already is not sent again. Blobs go in pieces, so that memory does not grow with them.
"""

from __future__ import annotations

import os
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from typing import TypeAlias

import msgspec
import trio

from acon.images.artifact import ArtifactBlob
from acon.images.documents import (
    INDEX_TYPES,
    MANIFEST_TYPES,
    MAX_DOCUMENT_BYTES,
    OCI_INDEX,
    Descriptor,
    decode_document,
    decode_index,
)
from acon.images.registry import describe_manifest, fallback_tag
from acon.output import Bar
from plugins.image_store.registry.client import RegistryAnswer, RegistryClient
from supervisor.errors import Busy, Conflict, DeadlineExceeded, RuntimeFailed
from supervisor.formats.errors import FormatError, Refusal
from supervisor.seams import FileBlob

# What one request carries; registries of some clouds want 5 MiB at least, but for the last.
PIECE_BYTES = 8 << 20
_BLOB_ATTEMPTS = 3
_LIST_ATTEMPTS = 10
_SETTLE_S = 0.2
_CLEANUP_TIMEOUT_S = 5
_ACCEPT = {"accept": ", ".join(sorted(INDEX_TYPES | MANIFEST_TYPES))}
_OCTETS = "application/octet-stream"


class RegistryPush:
    """Writes to one repository through a client that is open; closes nothing."""

    def __init__(self, client: RegistryClient, repository: str) -> None:
        self._client = client
        self._repository = repository
        self.sent_bytes = 0  # of blobs that were not there

    @property
    def name(self) -> str:
        return f"{self._client.registry}/{self._repository}"

    async def blob(self, blob: ArtifactBlob) -> None:
        """Store bytes that are at hand; raises as `RegistryClient.call`."""
        digest = blob.descriptor().digest
        if await self._has_blob(digest):
            return
        await self._in_session(
            lambda session: self._finish(session, digest, blob.data), item=digest
        )
        self.sent_bytes += len(blob.data)

    async def file(self, source: FileBlob, digest: str, bar: Bar) -> None:
        """Store the bytes of a file's part, whose digest is `digest` (ALGORITHM:HEX).

        `bar` is moved along. Raises `OSError` too.
        """
        if not await self._has_blob(digest):
            await self._in_session(
                lambda session: self._send_pieces(session, source, digest, bar), item=digest
            )
            self.sent_bytes += source.size_bytes
        bar.reach(source.size_bytes, source.size_bytes)

    async def manifest(self, manifest: ArtifactBlob, *, tag: str | None = None) -> bool:
        """Store a manifest, under a tag or by its digest alone.

        Returns whether the registry says that it lists it as a referrer of its subject
        (`OCI-Subject`).
        """
        descriptor = manifest.descriptor()
        answer = await self._put_manifest(tag or descriptor.digest, manifest)
        return "oci-subject" in answer.headers

    async def list_as_referrer(self, subject: str, referrer: Descriptor) -> str:
        """See to it that the tag which stands in for the referrers API lists `referrer`.

        Distribution specification, "Pushing Manifests with Subject". What others wrote stays.
        Two who write at the same time: each looks again and repeats itself until its entry
        stands. Returns the tag; raises `Conflict` when others kept overwriting it.
        """
        tag = fallback_tag(subject)
        item = f"{self.name}:{tag}"
        for attempt in range(_LIST_ATTEMPTS + 1):
            answer = await self._call("GET", f"manifests/{tag}", statuses=frozenset({200, 404}))
            known = None if answer.status == 404 else answer
            index, listed = _list_of(known, item=item)
            if referrer.digest in listed:
                return tag
            if attempt == _LIST_ATTEMPTS:
                break
            listing = _with_entry(index, referrer, item=item)
            # Not every registry heeds If-Match. So what stands there is read again once those
            # who read before this write had time to write: they would have dropped the entry.
            etag = {} if known is None else _if_match(known.headers)
            await self._put_manifest(tag, listing, headers=etag, or_status=412)
            await trio.sleep(random.uniform(_SETTLE_S, 2 * _SETTLE_S))
        raise Conflict(
            item,
            "others kept changing the list of what refers to the image: publish again",
            actual=f"{_LIST_ATTEMPTS} attempts",
        )

    # --- blobs ------------------------------------------------------------------------------

    async def _has_blob(self, digest: str) -> bool:
        answer = await self._call("HEAD", f"blobs/{digest}", statuses=frozenset({200, 404}))
        return answer.status == 200

    async def _in_session(self, send: Send, *, item: str) -> None:
        """`send` in an upload of its own, anew if it breaks; one that is left is deleted."""
        for attempt in range(1, _BLOB_ATTEMPTS + 1):
            session = _Session(await self._begin(), f"{self.name}: blob {item}")
            try:
                await send(session)
                return
            except (RuntimeFailed, DeadlineExceeded, Busy):
                await self._give_up(session)
                if attempt == _BLOB_ATTEMPTS:
                    raise
            except BaseException:
                await self._give_up(session)
                raise

    async def _begin(self) -> RegistryAnswer:
        return await self._call(
            "POST",
            "blobs/uploads/",
            headers={"content-length": "0"},
            content=b"",
            statuses=frozenset({202}),
        )

    async def _send_pieces(
        self, session: _Session, source: FileBlob, digest: str, bar: Bar
    ) -> None:
        sent_bytes = 0
        bar.reach(0, source.size_bytes)
        async with aclosing(_pieces(source)) as pieces:
            async for piece in pieces:
                end = sent_bytes + len(piece)
                span = f"{sent_bytes}-{end - 1}"
                answer = await self._client.call(
                    "PATCH",
                    session.location,
                    repository=self._repository,
                    actions="pull,push",
                    headers={"content-type": _OCTETS, "content-range": span},
                    content=piece,
                    statuses=frozenset({202}),
                )
                session.moved(answer)
                sent_bytes = end
                bar.reach(sent_bytes, source.size_bytes)
        await self._finish(session, digest, b"")

    async def _finish(self, session: _Session, digest: str, content: bytes) -> None:
        """The registry compares the digest: 400 if the bytes have another."""
        joint = "&" if "?" in session.location else "?"
        await self._client.call(
            "PUT",
            f"{session.location}{joint}digest={digest}",
            repository=self._repository,
            actions="pull,push",
            headers={"content-type": _OCTETS},
            content=content,
            statuses=frozenset({201}),
        )

    async def _give_up(self, session: _Session) -> None:
        # The registry forgets it in time anyway.
        with trio.move_on_after(_CLEANUP_TIMEOUT_S, shield=True), suppress(Refusal):
            await self._client.call(
                "DELETE",
                session.location,
                repository=self._repository,
                actions="pull,push",
                statuses=frozenset({200, 202, 204, 404, 405}),
            )

    # --- requests ---------------------------------------------------------------------------

    async def _put_manifest(
        self,
        reference: str,
        manifest: ArtifactBlob,
        *,
        headers: Mapping[str, str] | None = None,
        or_status: int = 201,
    ) -> RegistryAnswer:
        return await self._call(
            "PUT",
            f"manifests/{reference}",
            headers={"content-type": manifest.media_type, **(headers or {})},
            content=manifest.data,
            statuses=frozenset({201, or_status}),
        )

    async def _call(
        self,
        method: str,
        path: str,
        *,
        statuses: frozenset[int],
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
    ) -> RegistryAnswer:
        return await self._client.call(
            method,
            f"/v2/{self._repository}/{path}",
            repository=self._repository,
            actions="pull,push",
            headers=_ACCEPT if headers is None else headers,
            content=content,
            statuses=statuses,
        )


class _Session:
    """An upload that the registry began; it moves with each answer."""

    def __init__(self, answer: RegistryAnswer, item: str) -> None:
        self._item = item
        self.location = ""
        self.moved(answer)

    def moved(self, answer: RegistryAnswer) -> None:
        location = answer.headers.get("location")
        if location is None:
            raise FormatError(self._item, "the registry must say where an upload goes (Location)")
        self.location = location


Send: TypeAlias = Callable[[_Session], Awaitable[None]]


async def _pieces(source: FileBlob) -> AsyncGenerator[bytes, None]:
    """Of `PIECE_BYTES`. Raises `FormatError` when the file is shorter, and `OSError`."""
    fd = await trio.to_thread.run_sync(os.open, source.file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        at, end = source.offset_bytes, source.offset_bytes + source.size_bytes
        while at < end:
            count = min(PIECE_BYTES, end - at)
            piece = await trio.to_thread.run_sync(os.pread, fd, count, at)
            if not piece:
                raise FormatError(source.file, "a blob does not shrink while it is read")
            at += len(piece)
            yield piece
    finally:
        os.close(fd)


def _list_of(
    known: RegistryAnswer | None, *, item: str
) -> tuple[dict[str, object], frozenset[str]]:
    """The index as it stands, with whatever others put into it, and the digests it lists."""
    empty: dict[str, object] = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}
    if known is None:
        return empty, frozenset()
    descriptor = describe_manifest(known, item=item)
    if descriptor.media_type not in INDEX_TYPES:
        # Tools that copy one image of a list leave that one's manifest under the tag: no list.
        return {**empty, "manifests": [descriptor]}, frozenset()
    listed = decode_index(known.body, descriptor).manifests or ()
    document = decode_document(known.body, dict[str, object], item=item)
    return document, frozenset(one.digest for one in listed)


def _with_entry(index: dict[str, object], entry: Descriptor, *, item: str) -> ArtifactBlob:
    entries = index.get("manifests")
    before = entries if isinstance(entries, list) else []
    # Already there when a lone manifest under the tag becomes a list of one.
    others = [
        one for one in before if not isinstance(one, Descriptor) or one.digest != entry.digest
    ]
    raw = msgspec.json.encode({**index, "manifests": [*others, entry]})
    if len(raw) > MAX_DOCUMENT_BYTES:
        raise FormatError(
            item,
            "the list of what refers to the image is full",
            expected=f"{MAX_DOCUMENT_BYTES} bytes at most",
            actual=len(raw),
        )
    media_type = index.get("mediaType")
    return ArtifactBlob(media_type if isinstance(media_type, str) else OCI_INDEX, raw)


def _if_match(headers: Mapping[str, str]) -> dict[str, str]:
    etag = headers.get("etag")
    return {} if etag is None else {"if-match": etag}
