"""A repository of a registry, for reading (OCI distribution specification 1.1).

Manifests are read by tag once and by digest from then on, so that one which changes between
two requests cannot mix two images. What a registry says about digests is believed nowhere.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

import httpx
import msgspec
import trio

from acon.images.documents import (
    INDEX_TYPES,
    MANIFEST_TYPES,
    MAX_DOCUMENT_BYTES,
    OCI_INDEX,
    Descriptor,
    decode_document,
    decode_index,
    require_bytes,
    require_manifest_type,
)
from plugins.image_store.registry.client import RegistryAnswer, RegistryClient
from supervisor.errors import UnknownItem
from supervisor.formats.errors import FormatError
from supervisor.seams import RegistryBlob

# Of one answer's pages; nobody reads more manifests than these hold.
_MAX_PAGES = 16
_MAX_REFERRERS = 20_000
_ACCEPT = {"accept": ", ".join(sorted(INDEX_TYPES | MANIFEST_TYPES))}
# Registries without the API answer 404 as they should, or another of these.
_REFERRERS_STATUSES = frozenset({200, 400, 404, 405, 406, 501})
_NEXT_PAGE = re.compile(r'<([^<>]{1,4096})>\s*;[^,]*\brel="?next"?')
# What registries list that take the config's type for the artifact's.
_SAYS_NOTHING = "application/vnd.oci.empty.v1+json"


class _Head(msgspec.Struct, rename="camel"):
    media_type: str | None = None


class RegistryRepository:
    """Implements `ImageRepository` over a client that is open; closes nothing."""

    def __init__(self, client: RegistryClient, repository: str) -> None:
        self._client = client
        self._repository = repository
        # What was resolved, so that it need not be read twice.
        self._resolved: tuple[Descriptor, bytes] | None = None

    @property
    def name(self) -> str:
        return f"{self._client.registry}/{self._repository}"

    async def resolve(self, tag: str | None, digest: str | None) -> Descriptor:
        """Raises `UnknownItem` when there is no such manifest, and as `RegistryClient.call`."""
        reference = digest or tag or "latest"
        answer = await self._get(f"manifests/{reference}")
        descriptor = describe_manifest(answer, item=f"{self.name}:{reference}")
        if digest is not None:
            descriptor = msgspec.structs.replace(descriptor, digest=digest)
            require_bytes(answer.body, descriptor, item=f"{self.name}@{digest}")
        self._resolved = (descriptor, answer.body)
        return descriptor

    async def document(self, descriptor: Descriptor, *, max_bytes: int) -> bytes:
        item = f"{self.name}@{descriptor.digest}"
        if descriptor.size > max_bytes:
            raise FormatError(
                item,
                "a document must not be larger than its limit",
                expected=f"{max_bytes} bytes",
                actual=f"{descriptor.size} bytes",
            )
        if self._resolved is not None and self._resolved[0].digest == descriptor.digest:
            await trio.lowlevel.checkpoint()
            return require_bytes(self._resolved[1], descriptor, item=item)
        if descriptor.media_type in INDEX_TYPES | MANIFEST_TYPES:
            answer = await self._get(f"manifests/{descriptor.digest}", max_bytes=max_bytes)
            return require_bytes(answer.body, descriptor, item=item)
        raw = bytearray()
        async with self._client.download(
            self._repository, descriptor.digest, size_bytes=descriptor.size
        ) as chunks:
            async for chunk in chunks:
                raw += chunk
        return require_bytes(bytes(raw), descriptor, item=item)

    async def referrers(
        self, digest: str, artifact_type: str | None = None
    ) -> tuple[Descriptor, ...]:
        """As listed by the registry's API; where it has none, or lists none, by the tag that
        stands in for it ("Referrers Tag Schema").

        Lists that tools copied leave `artifact_type` out: entries without are returned
        whatever type is asked for, and whoever reads them sees. Raises `FormatError` for more
        than anyone would read.
        """
        listed = await self._referrers_listed(digest, artifact_type)
        if not listed:
            listed = await self._referrers_tagged(digest)
        found = {one.digest: _told(one) for one in listed}
        return tuple(
            one
            for one in found.values()
            if artifact_type is None or one.artifact_type in (None, artifact_type)
        )

    def layer_source(self, descriptor: Descriptor) -> RegistryBlob:
        return RegistryBlob(
            registry=self._client.registry,
            repository=self._repository,
            blob_digest=descriptor.digest,
            media_type=descriptor.media_type,
            size_bytes=descriptor.size,
        )

    async def _referrers_listed(
        self, digest: str, artifact_type: str | None
    ) -> tuple[Descriptor, ...]:
        query = f"?artifactType={artifact_type.replace('+', '%2B')}" if artifact_type else ""
        page: str | None = f"{self._path(f'referrers/{digest}')}{query}"
        found: list[Descriptor] = []
        for _number in range(_MAX_PAGES):
            if page is None:
                return tuple(found)
            answer = await self._call("GET", page, statuses=_REFERRERS_STATUSES)
            if answer.status != 200 or _media_type(answer.headers) != OCI_INDEX:
                return tuple(found)
            listing = Descriptor(
                media_type=OCI_INDEX, digest=_sha256(answer.body), size=len(answer.body)
            )
            found += decode_index(answer.body, listing).manifests or ()
            if len(found) > _MAX_REFERRERS:
                break
            page = _next_page(answer.headers)
        raise FormatError(
            f"{self.name}@{digest}",
            "a bounded number of manifests may refer to an image",
            expected=f"{_MAX_REFERRERS} on {_MAX_PAGES} pages at most",
            actual=f"{len(found)} and more",
        )

    async def _referrers_tagged(self, digest: str) -> tuple[Descriptor, ...]:
        try:
            answer = await self._get(f"manifests/{fallback_tag(digest)}")
        except UnknownItem:
            return ()
        descriptor = describe_manifest(answer, item=f"{self.name}:{fallback_tag(digest)}")
        if descriptor.media_type in INDEX_TYPES:
            return decode_index(answer.body, descriptor).manifests or ()
        # Copied without `--all` it is the one manifest that the tool chose of the index.
        return (descriptor,)

    async def _get(self, path: str, *, max_bytes: int = MAX_DOCUMENT_BYTES) -> RegistryAnswer:
        return await self._call("GET", self._path(path), max_bytes=max_bytes)

    async def _call(
        self,
        method: str,
        path: str,
        *,
        statuses: frozenset[int] = frozenset({200}),
        max_bytes: int = MAX_DOCUMENT_BYTES,
    ) -> RegistryAnswer:
        return await self._client.call(
            method,
            path,
            repository=self._repository,
            headers=_ACCEPT,
            statuses=statuses,
            max_bytes=max_bytes,
        )

    def _path(self, rest: str) -> str:
        return f"/v2/{self._repository}/{rest}"


def fallback_tag(digest: str) -> str:
    """The tag whose index lists what refers to `digest`, at registries without the API."""
    algorithm, _, hex_digits = digest.partition(":")
    return f"{algorithm[:32]}-{hex_digits[:64]}"


def describe_manifest(answer: RegistryAnswer, *, item: str) -> Descriptor:
    """The descriptor of a manifest or index that was got by its name: made of its bytes.

    Raises `FormatError` for what is neither, or is both.
    """
    said = _media_type(answer.headers)
    head = decode_document(answer.body, _Head, item=item)
    media_type = head.media_type or said
    require_manifest_type(media_type, item=item)
    if said in INDEX_TYPES | MANIFEST_TYPES and said != media_type:
        # Two readers of such a document would see two images (CVE-2021-41190).
        raise FormatError(
            item,
            "a manifest must be of the type that the registry says",
            expected=said,
            actual=media_type,
        )
    return Descriptor(media_type=media_type, digest=_sha256(answer.body), size=len(answer.body))


def _told(descriptor: Descriptor) -> Descriptor:
    """Without an artifact type that is none."""
    if descriptor.artifact_type == _SAYS_NOTHING:
        return msgspec.structs.replace(descriptor, artifact_type=None)
    return descriptor


def _media_type(headers: Mapping[str, str]) -> str:
    return headers.get("content-type", "").partition(";")[0].strip()


def _next_page(headers: Mapping[str, str]) -> str | None:
    """Of a `Link` (RFC 8288), the rest of a long list: its path, since it is asked for at the
    registry and nowhere else."""
    found = _NEXT_PAGE.search(headers.get("link", "")[:8192])
    if found is None:
        return None
    try:
        return httpx.URL(found[1]).raw_path.decode("ascii")
    except (httpx.InvalidURL, ValueError):
        return None


def _sha256(raw: bytes) -> str:
    return f"sha256:{hashlib.sha256(raw).hexdigest()}"
