"""What is loaded: which images, which layers they name, and what the daemon has of them."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping

import msgspec

from acon.client import Client
from supervisor.formats.base64_text import from_base64
from supervisor.formats.digest import Digest
from supervisor.formats.errors import SignatureInvalid
from supervisor.formats.evidence import decode_evidence
from supervisor.formats.signature import SignedManifest, verify_signed_manifest
from supervisor.operations import ManifestUpload
from supervisor.seams import LayerSource

_NONCE_BYTES = 32


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """One image, read from wherever it is; its signature is right.

    `sources` (by `HASH/HEX`) only say where layers may be found; files by absolute paths.
    `origin` is how the person named it.
    """

    signed: SignedManifest
    sources: Mapping[str, LayerSource]
    origin: str


class WantedLayer(msgspec.Struct, frozen=True, kw_only=True):
    """A layer that an image pins, and all places where it may be; none is trusted."""

    digest: Digest
    sources: tuple[LayerSource, ...]
    named_by: str  # image id


def wanted_layers(images: Iterable[Loaded]) -> list[WantedLayer]:
    """Every layer that is named by its digest, once, in the order in which they are named."""
    known = list(images)
    found: dict[Digest, WantedLayer] = {}
    for image in known:
        for reference in image.signed.manifest.layers:
            if isinstance(reference, Digest) and reference not in found:
                places = [one.sources.get(str(reference)) for one in known]
                found[reference] = WantedLayer(
                    digest=reference,
                    sources=tuple(dict.fromkeys(one for one in places if one is not None)),
                    named_by=str(image.signed.image_id),
                )
    return list(found.values())


async def loaded_images(client: Client, known: Iterable[SignedManifest]) -> list[SignedManifest]:
    """The signed manifests of what the daemon has, verified here.

    Those that are not among `known` come out of a piece of evidence, which carries them.
    """
    present = [image.image_id for image in await client.images()]
    at_hand = {str(signed.image_id): signed for signed in known}
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
