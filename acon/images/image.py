"""Opens images wherever they are: one way in for everything that `acon` does with them."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec
import trio

from acon.arguments import RegistryAccess
from acon.errors import UsageError
from acon.images.archive import read_archive
from acon.images.docker_archive import open_docker_archive
from acon.images.documents import (
    CONFIG_TYPES,
    INDEX_TYPES,
    MAX_DOCUMENT_BYTES,
    Descriptor,
    ImageConfig,
    ImageManifest,
    Platform,
    ProcessConfig,
    choose_platform,
    decode_document,
    decode_index,
    decode_manifest,
    host_platform,
    parse_platform,
    require_manifest_type,
)
from acon.images.layout import FolderFiles, read_layout
from acon.images.reference import ImageReference
from acon.images.repository import ImageRepository
from plugins.image_store.arrival.media_types import compression_of
from plugins.image_store.config import RegistryConfig
from plugins.image_store.registry.client import RegistryClient
from plugins.image_store.registry.credentials import load_credentials
from plugins.image_store.registry.names import parse_blob_digest
from supervisor.formats.errors import DigestMismatch, FormatError
from supervisor.seams import FileBlob, LayerSource

Advance = Callable[[int], None]


class ImageLayer(msgspec.Struct, frozen=True, kw_only=True):
    """One layer; `diff_id` (ALGORITHM:HEX) is what its uncompressed tar must be, if it is known."""

    diff_id: str | None
    source: LayerSource


class OciImage(msgspec.Struct, frozen=True, kw_only=True):
    """One image for one platform; `layers` lowest first.

    `manifest` leads to its image manifest, not to an index that it was found in. That of a
    docker-archive is made when it is read: nobody else has it.
    """

    manifest: Descriptor
    platform: Platform
    process: ProcessConfig
    layers: tuple[ImageLayer, ...]


def open_registry(registry: str, access: RegistryAccess) -> RegistryClient:
    """A client of a registry, to be entered with `async with`. Blocking: reads the logins.

    Raises `Refusal` for logins or roots that cannot be read, and `OSError`.
    """
    config = RegistryConfig(
        ca_file=None if access.ca_file is None else str(access.ca_file),
        plain_http=access.plain_http,
    )
    return RegistryClient(registry, config, load_credentials(access.auth_file))


@asynccontextmanager
async def open_repository(
    reference: ImageReference, access: RegistryAccess
) -> AsyncIterator[ImageRepository]:
    """The place that `reference` names, until the body ends.

    Raises `UsageError` for an ACON repository, which holds signed manifests
    (`acon.images.acon_repository`), and what the place itself raises.
    """
    if reference.transport == "docker":
        # A command that touches no registry need not wait for what speaks to them.
        from acon.images.registry import RegistryRepository

        registry, repository = reference.remote
        client = await trio.to_thread.run_sync(open_registry, registry, access)
        async with client:
            yield RegistryRepository(client, repository)
    else:
        yield await trio.to_thread.run_sync(_open_local, reference)


async def open_image(
    reference: ImageReference, *, platform_name: str | None, access: RegistryAccess
) -> OciImage:
    """Find and read the image that `reference` names; raises as `read_image` does."""
    async with open_repository(reference, access) as repository:
        return await read_image(
            repository, reference.tag, reference.digest, platform_name=platform_name
        )


async def read_image(
    repository: ImageRepository,
    tag: str | None,
    digest: str | None,
    *,
    platform_name: str | None,
) -> OciImage:
    """An image's manifest and configuration, every document checked against its digest.

    Of several platforms `platform_name` (OS/ARCH[/VARIANT]) is taken, None: this machine's;
    an image that stands alone must be of the platform if one is named. Raises `UsageError`
    for what is not there or no image, `FormatError` and `DigestMismatch` for what is wrong,
    also for layers of a kind that cannot be read (foreign, encrypted).
    """
    wanted = parse_platform(platform_name or host_platform())
    descriptor = await repository.resolve(tag, digest)
    require_manifest_type(descriptor.media_type, item=repository.name)
    if descriptor.media_type in INDEX_TYPES:
        raw = await repository.document(descriptor, max_bytes=MAX_DOCUMENT_BYTES)
        manifests = decode_index(raw, descriptor).manifests or ()
        descriptor = choose_platform(manifests, wanted, item=repository.name)
        require_manifest_type(descriptor.media_type, item=repository.name)
        if descriptor.media_type in INDEX_TYPES:
            raise FormatError(descriptor.digest, "an index for one platform must not nest another")
    raw = await repository.document(descriptor, max_bytes=MAX_DOCUMENT_BYTES)
    manifest = decode_manifest(raw, descriptor)
    config = await _config(repository, manifest)
    if platform_name is not None and config.platform.is_known:
        choose_platform(
            (msgspec.structs.replace(descriptor, platform=config.platform),),
            wanted,
            item=repository.name,
        )
    return OciImage(
        manifest=descriptor,
        platform=config.platform,
        process=config.config or ProcessConfig(),
        layers=_layers(repository, manifest, config, item=descriptor.digest),
    )


@asynccontextmanager
async def local_blob(
    source: LayerSource, access: RegistryAccess, *, advance: Advance = lambda _count_bytes: None
) -> AsyncIterator[FileBlob]:
    """The blob as a file on this machine, until the body ends.

    A registry's is downloaded into a temporary file, which is removed afterwards whatever
    happens; `advance` is told of the bytes as they come. Its size and digest were compared:
    raises what the registry's client raises. Of a file nothing is checked here.
    """
    if isinstance(source, FileBlob):
        yield source
        return
    algorithm, expected = parse_blob_digest(source.blob_digest)
    hasher = hashlib.new(algorithm)
    client = await trio.to_thread.run_sync(open_registry, source.registry, access)
    with tempfile.NamedTemporaryFile(prefix="acon-layer-") as file:

        def take(chunk: bytes) -> None:
            hasher.update(chunk)
            file.write(chunk)

        async with (
            client,
            client.download(
                source.repository, source.blob_digest, size_bytes=source.size_bytes
            ) as chunks,
        ):
            async for chunk in chunks:
                await trio.to_thread.run_sync(take, chunk)
                advance(len(chunk))
        if hasher.hexdigest() != expected:
            raise DigestMismatch(
                f"{source.registry}/{source.repository}",
                "a blob must have the digest that names it",
                expected=source.blob_digest,
                actual=f"{algorithm}:{hasher.hexdigest()}",
            )
        file.flush()
        yield FileBlob(
            file=file.name,
            size_bytes=source.size_bytes,
            media_type=source.media_type,
            blob_digest=source.blob_digest,
            tar_size_bytes=source.tar_size_bytes,
        )


def _open_local(reference: ImageReference) -> ImageRepository:
    place = reference.place
    if reference.transport == "oci":
        if not place.is_dir():
            raise UsageError(str(place), "must be the folder of an OCI layout")
        return read_layout(FolderFiles(place))
    if reference.transport == "oci-archive":
        return read_layout(read_archive(place))
    if reference.transport == "docker-archive":
        return open_docker_archive(place)
    raise UsageError(
        str(reference), "a repository of ACON holds signed manifests, not images to be signed"
    )


async def _config(repository: ImageRepository, manifest: ImageManifest) -> ImageConfig:
    if manifest.artifact_type is not None or manifest.config.media_type not in CONFIG_TYPES:
        raise UsageError(
            repository.name,
            "must be an image of a container, not another artifact",
            expected=" or ".join(sorted(CONFIG_TYPES)),
            actual=manifest.kind[:160],
        )
    raw = await repository.document(manifest.config, max_bytes=MAX_DOCUMENT_BYTES)
    return decode_document(raw, ImageConfig, item=manifest.config.digest)


def _layers(
    repository: ImageRepository, manifest: ImageManifest, config: ImageConfig, *, item: str
) -> tuple[ImageLayer, ...]:
    layers, diff_ids = manifest.layers or (), config.rootfs.diff_ids or ()
    if len(diff_ids) != len(layers):
        raise FormatError(
            item,
            "manifest and configuration must tell of as many layers",
            expected=len(layers),
            actual=len(diff_ids),
        )
    found = []
    for number, (layer, diff_id) in enumerate(zip(layers, diff_ids, strict=True)):
        # Here, since a foreign layer is not even there: nothing is hashed before all are known.
        compression_of(layer.media_type, item=f"{item}: layer {number}")
        found.append(ImageLayer(diff_id=diff_id, source=repository.layer_source(layer)))
    return tuple(found)
