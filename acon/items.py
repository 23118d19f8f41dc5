"""What `acon load` may be told to load, wherever it is: every item becomes verified images."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import msgspec
import trio

from acon.arguments import RegistryAccess
from acon.bundle import Bundle
from acon.errors import UsageError
from acon.images.acon_repository import AconRepository
from acon.images.documents import Platform
from acon.images.image import open_repository
from acon.images.published import Warn, choose_published, find_published
from acon.images.reference import ImageReference, is_reference, parse_reference
from acon.loading import Loaded


class ItemOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How items are read.

    `signers` (`HASH/SIGNER`) choose where several signed manifests belong to one image;
    `warn` is told of each that was passed over.
    """

    access: RegistryAccess
    platform: Platform
    warn: Warn
    signers: Collection[str] = ()
    unsafe_allow_sha256: bool = False


async def read_items(items: Sequence[str], options: ItemOptions) -> list[Loaded]:
    """Read and verify every image, in order; one that is named twice is there once.

    An item is a bundle's folder, or `oci:`, `oci-archive:`, `docker://` or `acon-repo:` and a
    place. Raises `SignatureInvalid`, `FormatError` or `UsageError`, and whatever a registry
    is refused for.
    """
    found: dict[str, Loaded] = {}
    for item in items:
        for image in await _read_item(item, options):
            found.setdefault(str(image.signed.image_id), image)
    return list(found.values())


async def _read_item(item: str, options: ItemOptions) -> Sequence[Loaded]:
    if ":" not in item or not is_reference(item):
        return await trio.to_thread.run_sync(_bundle, item, options)
    reference = parse_reference(item)
    if reference.transport == "docker-archive":
        raise UsageError(
            item,
            "a docker-archive holds no signed manifest: `acon image convert` it, "
            "`acon image sign` what that makes, and load the folder",
        )
    if reference.transport == "acon-repo":
        return await trio.to_thread.run_sync(_acon_images, reference, item, options)
    return [await _published(reference, item, options)]


def _bundle(item: str, options: ItemOptions) -> Sequence[Loaded]:
    bundle = Bundle(Path(item))
    signed = bundle.signed(unsafe_allow_sha256=options.unsafe_allow_sha256)
    return [Loaded(signed=signed, sources=bundle.sources(), origin=item)]


def _acon_images(reference: ImageReference, item: str, options: ItemOptions) -> Sequence[Loaded]:
    repository = AconRepository(reference.place, unsafe_allow_sha256=options.unsafe_allow_sha256)
    return [
        Loaded(signed=image.signed, sources=image.layer_files, origin=item)
        for image in repository.images(reference.tag)
    ]


async def _published(reference: ImageReference, item: str, options: ItemOptions) -> Loaded:
    async with open_repository(reference, options.access) as repository:
        named = await repository.resolve(reference.tag, reference.digest)
        found = await find_published(
            repository,
            named,
            wanted=options.platform,
            item=item,
            warn=options.warn,
            unsafe_allow_sha256=options.unsafe_allow_sha256,
        )
    chosen = choose_published(found, options.signers, item=item)
    return Loaded(signed=chosen.signed, sources=chosen.sources, origin=item)
