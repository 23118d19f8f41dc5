"""Loads bundles into a daemon: checked here first, admitted in groups, then uploaded."""

from __future__ import annotations

import secrets
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path

import msgspec

from acon.bundle import Bundle, LayerSource
from acon.client import Client
from acon.errors import UsageError
from acon.layer_bytes import LayerReader, hash_layer, open_source, require_digest
from acon.output import Progress
from supervisor.formats.digest import Digest
from supervisor.formats.errors import SignatureInvalid
from supervisor.formats.evidence import decode_evidence, from_base64
from supervisor.formats.signature import SignedManifest, verify_signed_manifest
from supervisor.operations import ManifestUpload

_NONCE_BYTES = 32


class LocalLayer(msgspec.Struct, frozen=True):
    """A layer whose bytes were found, and were right when they were looked at."""

    digest: Digest
    source: LayerSource
    path: Path
    size_bytes: int  # of the uncompressed tar

    def chunks(self, offset: int) -> Generator[bytes, None, None]:
        """The uncompressed bytes from `offset` on (`acon.client.TarSource`).

        A compressed layer is decompressed again from its beginning: only a broken
        connection asks for an offset.
        """
        skip = offset
        for piece in open_source(self.source, self.path):
            if skip >= len(piece):
                skip -= len(piece)
                continue
            yield piece[skip:]
            skip = 0


class Loaded(msgspec.Struct, frozen=True):
    """One image as it was read from its bundle."""

    bundle: Bundle
    signed: SignedManifest


def read_bundles(directories: Sequence[Path], *, unsafe_allow_sha256: bool) -> list[Loaded]:
    """Read and verify every image. Raises `SignatureInvalid`, `FormatError` or `UsageError`."""
    found = []
    for directory in directories:
        bundle = Bundle(directory)
        found.append(Loaded(bundle, bundle.signed(unsafe_allow_sha256=unsafe_allow_sha256)))
    return found


def digests_of(images: Iterable[Loaded]) -> list[tuple[Digest, str]]:
    """Every layer that is named by its digest, once, with the image that names it first."""
    found: dict[Digest, str] = {}
    for image in images:
        for reference in image.signed.manifest.layers:
            if isinstance(reference, Digest):
                found.setdefault(reference, str(image.signed.image_id))
    return list(found.items())


def find_source(images: Sequence[Loaded], digest: Digest) -> tuple[LayerSource, Path]:
    """Where some bundle says that the layer is, if there is such a file."""
    for image in images:
        source = image.bundle.sources().get(str(digest))
        if source is not None:
            path = image.bundle.source_path(source)
            if path.is_file():
                return source, path
    raise UsageError(
        str(digest),
        "a bundle's sources.json must say where the layer is, and there must be such a file",
    )


def check_layer(source: LayerSource, path: Path, digest: Digest, bars: Progress) -> LocalLayer:
    """Read the layer once and compare its digest, before anything is asked of the daemon."""
    bars.begin(f"check  {digest.hex[:12]}", path.stat().st_size)
    reader: LayerReader = open_source(source, path, advance=bars.advance)
    digests = hash_layer(reader)
    require_digest(digests, digest, item=str(path))
    return LocalLayer(digest, source, path, digests.size_bytes)


async def loaded_images(client: Client, known: Iterable[Loaded]) -> list[SignedManifest]:
    """The signed manifests of what the daemon has, verified here.

    Those that are not among `known` come out of a piece of evidence, which carries them.
    """
    present = [image.image_id for image in await client.images()]
    at_hand = {str(image.signed.image_id): image.signed for image in known}
    if not set(present) <= set(at_hand):
        evidence = decode_evidence(await client.evidence(secrets.token_bytes(_NONCE_BYTES)))
        for number, image in enumerate(evidence.images):
            item = f"images[{number}]"
            signed = verify_signed_manifest(
                from_base64(image.manifest, item=item),
                from_base64(image.signature, item=item),
                from_base64(image.certificate, item=item),
                # The daemon admitted it; what counts here is only whom it accepts.
                unsafe_allow_sha256=True,
            )
            at_hand[str(signed.image_id)] = signed
    lacking = [image_id for image_id in present if image_id not in at_hand]
    if lacking:
        raise SignatureInvalid(
            lacking[0], "the daemon's evidence must hold every image that it lists"
        )
    return [at_hand[image_id] for image_id in present]


def as_upload(signed: SignedManifest) -> ManifestUpload:
    return ManifestUpload(
        manifest=signed.manifest_bytes,
        signature=signed.signature,
        certificate_der=signed.certificate_der,
    )
