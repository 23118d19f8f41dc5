"""Publishes a signed bundle with its image: as an OCI artifact that refers to the image.

Each layer that the manifest pins is found in the image first, by its blob or by its diff_id,
so that whoever finds the artifact finds all bytes in the same repository. An image that is
not there yet is made of the bundle's own layers.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import msgspec
import trio

from acon.arguments import RegistryAccess
from acon.errors import UsageError
from acon.images.artifact import ArtifactBlob, SourceBlob, make_artifact
from acon.images.documents import (
    OCI_CONFIG,
    OCI_MANIFEST,
    TAR_MEDIA_TYPE,
    Descriptor,
    Platform,
)
from acon.images.image import OciImage, local_blob, open_registry, read_image
from acon.images.push import RegistryPush
from acon.images.reference import ImageReference
from acon.images.registry import RegistryRepository
from acon.layer_bytes import hash_layer, require_digest
from acon.local_layer import blob_sha256
from acon.output import Progress
from plugins.image_store.arrival.media_types import compression_of
from supervisor.errors import UnknownItem
from supervisor.formats.digest import Digest
from supervisor.formats.signature import SignedManifest
from supervisor.seams import FileBlob, LayerSource, RegistryBlob

_SHOWN_LAYERS = 16


class Bundled(msgspec.Struct, frozen=True, kw_only=True):
    """What a bundle holds: a signed image, and where its layers may be found."""

    signed: SignedManifest
    sources: Mapping[str, LayerSource]  # by `HASH/HEX`; files by absolute paths

    def pinned(self) -> list[Digest]:
        """The layers that the manifest names by digest, lowest first; one may be there twice."""
        return [one for one in self.signed.manifest.layers if isinstance(one, Digest)]

    def source_of(self, digest: Digest) -> LayerSource:
        """Raises `UsageError` naming the layer when nothing says where it is."""
        source = self.sources.get(str(digest))
        if source is None:
            raise UsageError(str(digest), "the bundle's sources.json must say where the layer is")
        return source


class Publication(msgspec.Struct, frozen=True, kw_only=True):
    """What was done. Digests are ALGORITHM:HEX."""

    image: str
    artifact: str
    pushed_image: bool
    fallback_tag: str | None  # None: the registry itself lists what refers to an image
    sent_bytes: int  # of blobs; none when all was there


class _PushedLayer(msgspec.Struct, frozen=True, kw_only=True):
    descriptor: Descriptor
    diff_id: str
    tar_size_bytes: int


class Publisher:
    """Publishes bundles in one repository. Made by `publisher`."""

    def __init__(
        self,
        repository: RegistryRepository,
        push: RegistryPush,
        access: RegistryAccess,
        bars: Progress,
    ) -> None:
        self._repository = repository
        self._push = push
        self._access = access
        self._bars = bars

    async def publish(
        self,
        bundled: Bundled,
        *,
        tag: str | None,
        digest: str | None,
        platform_name: str | None,
        new_platform: Platform,
    ) -> Publication:
        """Push the artifact, and the image before it if no image has that tag yet.

        `platform_name` chooses in an index, `new_platform` is what an image that is made here
        is for. Doing it again changes nothing and sends no blob again. Raises `UnknownItem`
        for a digest that is not there and, naming it, for a layer that the image does not
        have, `UsageError` for one of which nothing says where it is, `DigestMismatch` for one
        whose bytes are wrong, and what the registry raises.
        """
        try:
            await self._repository.resolve(tag, digest)
        except UnknownItem:
            if tag is None:
                raise
            manifest, sources = await self._push_image(bundled, tag, new_platform)
            pushed = True
        else:
            image = await read_image(self._repository, tag, digest, platform_name=platform_name)
            manifest, sources, pushed = image.manifest, await self._match(bundled, image), False
        artifact = make_artifact(bundled.signed, sources, manifest)
        for blob in artifact.blobs:
            await self._push.blob(blob)
        fallback_tag = None
        if not await self._push.manifest(artifact.manifest):
            fallback_tag = await self._push.list_as_referrer(artifact.subject, artifact.listed())
        return Publication(
            image=manifest.digest,
            artifact=artifact.listed().digest,
            pushed_image=pushed,
            fallback_tag=fallback_tag,
            sent_bytes=self._push.sent_bytes,
        )

    # --- an image that is there -------------------------------------------------------------

    async def _match(self, bundled: Bundled, image: OciImage) -> dict[str, SourceBlob]:
        """Where the image has each pinned layer."""
        return {
            str(digest): await self._find(digest, bundled.source_of(digest), image)
            for digest in dict.fromkeys(bundled.pinned())
        }

    async def _find(self, digest: Digest, source: LayerSource, image: OciImage) -> SourceBlob:
        if source.blob_digest is not None and source.tar_size_bytes is not None:
            for layer in image.layers:
                # The same stored bytes: that they are the right ones was found at convert.
                if layer.source.blob_digest == source.blob_digest:
                    return _source_blob(layer.source, source.tar_size_bytes)
        async with local_blob(source, self._access) as blob:
            diff_id, tar_size_bytes = await self._diff_id(digest, blob)
        for layer in image.layers:
            if layer.diff_id == diff_id:
                return _source_blob(layer.source, tar_size_bytes)
        raise UnknownItem(
            str(digest),
            "every layer that the manifest pins must be in the image that it is published with",
            expected=f"{diff_id} in {image.manifest.digest}",
            actual=", ".join(str(one.diff_id) for one in image.layers[:_SHOWN_LAYERS]) or "none",
        )

    async def _diff_id(self, digest: Digest, blob: FileBlob) -> tuple[str, int]:
        """`sha256:HEX` and size of the layer's tar, which must be what the manifest pins."""
        bar = self._bars.begin(f"check  {digest.hex[:12]}", blob.size_bytes)
        try:
            digests = await trio.to_thread.run_sync(
                lambda: hash_layer(
                    blob,
                    algorithms=tuple({digest.algorithm, "sha256"}),
                    advance=bar.advance,
                    between=trio.from_thread.check_cancelled,
                )
            )
        finally:
            bar.end()
        require_digest(digests, digest, item=blob.file)
        return f"sha256:{digests.hex_digests['sha256']}", digests.size_bytes

    # --- an image that is not ---------------------------------------------------------------

    async def _push_image(
        self, bundled: Bundled, tag: str, platform: Platform
    ) -> tuple[Descriptor, dict[str, SourceBlob]]:
        """Its layers as they lie, a configuration that says what the manifest does, the tag."""
        pinned = bundled.pinned()
        if not pinned:
            raise UsageError(
                str(bundled.signed.image_id),
                "an image is made of layers that the manifest pins, and it pins none: "
                "name an image that is there",
            )
        pushed: dict[Digest, _PushedLayer] = {}
        for digest in dict.fromkeys(pinned):
            pushed[digest] = await self._push_layer(digest, bundled.source_of(digest))
        config = ArtifactBlob(
            OCI_CONFIG,
            msgspec.json.encode(
                _config_of(bundled.signed, [pushed[one].diff_id for one in pinned], platform)
            ),
        )
        await self._push.blob(config)
        manifest = ArtifactBlob(
            OCI_MANIFEST,
            msgspec.json.encode(
                {
                    "schemaVersion": 2,
                    "mediaType": OCI_MANIFEST,
                    "config": config.descriptor(),
                    "layers": [pushed[one].descriptor for one in pinned],
                }
            ),
        )
        await self._push.manifest(manifest, tag=tag)
        sources = {
            str(digest): SourceBlob(
                blob_digest=layer.descriptor.digest,
                media_type=layer.descriptor.media_type,
                size_bytes=layer.descriptor.size,
                tar_size_bytes=layer.tar_size_bytes,
            )
            for digest, layer in pushed.items()
        }
        return manifest.descriptor(), sources

    async def _push_layer(self, digest: Digest, source: LayerSource) -> _PushedLayer:
        compression = compression_of(source.media_type, item=str(digest))
        async with local_blob(source, self._access) as blob:
            diff_id, tar_size_bytes = await self._diff_id(digest, blob)
            bar = self._bars.begin(f"push   {digest.hex[:12]}", blob.size_bytes)
            try:
                blob_digest = await self._sha256(blob)
                await self._push.file(blob, blob_digest, bar)
            finally:
                bar.end()
        return _PushedLayer(
            descriptor=Descriptor(
                media_type=TAR_MEDIA_TYPE
                if compression is None
                else f"{TAR_MEDIA_TYPE}+{compression}",
                digest=blob_digest,
                size=blob.size_bytes,
            ),
            diff_id=diff_id,
            tar_size_bytes=tar_size_bytes,
        )

    async def _sha256(self, blob: FileBlob) -> str:
        """What every registry can name a blob by; it was compared if the source has it."""
        if blob.blob_digest is not None and blob.blob_digest.startswith("sha256:"):
            return blob.blob_digest
        return await trio.to_thread.run_sync(
            lambda: blob_sha256(blob, between=trio.from_thread.check_cancelled)
        )


@asynccontextmanager
async def publisher(
    reference: ImageReference, access: RegistryAccess, bars: Progress
) -> AsyncIterator[Publisher]:
    """For the repository of a `docker://` reference; its connections end with the block."""
    registry, repository = reference.remote
    client = await trio.to_thread.run_sync(open_registry, registry, access)
    async with client:
        yield Publisher(
            RegistryRepository(client, repository), RegistryPush(client, repository), access, bars
        )


def _source_blob(source: LayerSource, tar_size_bytes: int) -> SourceBlob:
    """Of a layer of the image, which lies in its repository."""
    if not isinstance(source, RegistryBlob):
        raise RuntimeError("layers of a registry's image lie in it")
    return SourceBlob(
        blob_digest=source.blob_digest,
        media_type=source.media_type,
        size_bytes=source.size_bytes,
        tar_size_bytes=tar_size_bytes,
    )


def _config_of(
    signed: SignedManifest, diff_ids: Sequence[str], platform: Platform
) -> dict[str, object]:
    """An image configuration (image-spec, "config") that says what the manifest does.

    Without times: pushing the same bundle makes the same image.
    """
    manifest = signed.manifest
    config: dict[str, object] = {"WorkingDir": manifest.working_dir}
    if manifest.entrypoint:
        config["Entrypoint"] = manifest.entrypoint
    environment = _environment(manifest.env)
    if environment:
        config["Env"] = environment
    described: dict[str, object] = {"architecture": platform.architecture, "os": platform.os}
    if platform.variant is not None:
        described["variant"] = platform.variant
    return {
        **described,
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": list(diff_ids)},
    }


def _environment(rules: Sequence[str]) -> list[str]:
    """The values that a start without requests gets: of each name, its first rule's."""
    first: dict[str, str] = {}
    for rule in rules:
        first.setdefault(rule.partition("=")[0], rule)
    return [rule for rule in first.values() if rule.partition("=")[2]]
