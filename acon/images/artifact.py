"""The OCI artifact in which a signed manifest travels with its image.

An OCI image manifest (image-spec 1.1, "Guidelines for Artifact Usage") whose `subject` is the
image: the empty config, and four blobs told apart by media type. Bytes are a function of the
signed image, its sources and the subject alone, so that publishing again makes the same.

Whoever reads one trusts nothing in it but what the signature vouches for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import msgspec

from acon.images.documents import (
    OCI_MANIFEST,
    Descriptor,
    DigestText,
    ImageManifest,
    decode_document,
    decode_manifest,
)
from acon.images.repository import ImageRepository
from supervisor.formats.digest import parse_digest
from supervisor.formats.errors import FormatError, Refusal
from supervisor.formats.manifest import MAX_MANIFEST_BYTES
from supervisor.formats.signature import SignedManifest, verify_signed_manifest
from supervisor.seams import LayerSource, Size

ARTIFACT_TYPE = "application/vnd.acon.manifest.v1+json"
SIGNATURE_TYPE = "application/vnd.acon.signature.v1"
CERTIFICATE_TYPE = "application/pkix-cert"
SOURCES_TYPE = "application/vnd.acon.sources.v1+json"
EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
EMPTY = b"{}"

# Of the artifact's own manifest; the four blobs have bounds of their own.
MAX_ARTIFACT_BYTES = 64 << 10
_MAX_BLOB_BYTES = {
    ARTIFACT_TYPE: MAX_MANIFEST_BYTES,
    SIGNATURE_TYPE: 64 << 10,
    CERTIFICATE_TYPE: 64 << 10,
    SOURCES_TYPE: 1 << 20,
}
# As in a bundle, so that general tools that fetch an artifact into a folder make one.
_FILE_NAMES = {
    ARTIFACT_TYPE: "manifest.json",
    SIGNATURE_TYPE: "signature",
    CERTIFICATE_TYPE: "cert.der",
    SOURCES_TYPE: "sources.json",
}
_TITLE = "org.opencontainers.image.title"


class SourceBlob(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A layer's blob in the repository that the artifact lies in, whichever that is."""

    blob_digest: DigestText  # of the blob as it is stored, compressed or not
    media_type: str
    size_bytes: Size
    tar_size_bytes: Size | None = None


class ArtifactBlob(msgspec.Struct, frozen=True):
    """Bytes to be stored under a descriptor of theirs."""

    media_type: str
    data: bytes

    def descriptor(self, annotations: dict[str, str] | None = None) -> Descriptor:
        return Descriptor(
            media_type=self.media_type,
            digest=f"sha256:{hashlib.sha256(self.data).hexdigest()}",
            size=len(self.data),
            annotations=annotations,
        )


class Artifact(msgspec.Struct, frozen=True, kw_only=True):
    """What has to be pushed: `blobs` first, then `manifest`."""

    manifest: ArtifactBlob
    blobs: tuple[ArtifactBlob, ...]
    subject: str  # digest

    def listed(self) -> Descriptor:
        """As a list of referrers has it."""
        return msgspec.structs.replace(self.manifest.descriptor(), artifact_type=ARTIFACT_TYPE)


class PublishedImage(msgspec.Struct, frozen=True, kw_only=True):
    """A signed image that was found in an artifact; its signature is right."""

    signed: SignedManifest
    sources: dict[str, LayerSource]  # `HASH/HEX` of layers; trusted for nothing
    artifact: str  # digest


class _Sources(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    layers: dict[str, SourceBlob]


def make_artifact(
    signed: SignedManifest, sources: Mapping[str, SourceBlob], subject: Descriptor
) -> Artifact:
    """The artifact that says: this image, `subject`, is what was signed here."""
    listed = _Sources(dict(sources))
    blobs = (
        ArtifactBlob(ARTIFACT_TYPE, signed.manifest_bytes),
        ArtifactBlob(SIGNATURE_TYPE, signed.signature),
        ArtifactBlob(CERTIFICATE_TYPE, signed.certificate_der),
        ArtifactBlob(SOURCES_TYPE, msgspec.json.encode(listed, order="sorted")),
    )
    config = ArtifactBlob(EMPTY_TYPE, EMPTY)
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": ARTIFACT_TYPE,
        "config": config.descriptor(),
        "layers": [blob.descriptor({_TITLE: _FILE_NAMES[blob.media_type]}) for blob in blobs],
        "subject": Descriptor(
            media_type=subject.media_type, digest=subject.digest, size=subject.size
        ),
    }
    return Artifact(
        manifest=ArtifactBlob(OCI_MANIFEST, msgspec.json.encode(manifest)),
        blobs=(config, *blobs),
        subject=subject.digest,
    )


async def read_artifact(
    repository: ImageRepository,
    descriptor: Descriptor,
    *,
    subjects: frozenset[str] | None,
    unsafe_allow_sha256: bool = False,
) -> PublishedImage | None:
    """Fetch, check and verify one candidate; everything is bounded and digest-checked.

    `subjects` are digests of which one must be what it refers to; None: whatever it says.
    None for an artifact of another type. Raises `Untrusted`, or what the repository raises,
    with the reason why one of our type is not to be believed.
    """
    item = f"artifact {descriptor.digest}"
    raw = await repository.document(descriptor, max_bytes=MAX_ARTIFACT_BYTES)
    manifest = decode_manifest(raw, descriptor)
    if manifest.artifact_type != ARTIFACT_TYPE:
        return None
    subject = None if manifest.subject is None else manifest.subject.digest
    if subjects is not None and subject not in subjects:
        raise FormatError(
            item,
            "must refer to the image",
            expected=" or ".join(sorted(subjects)),
            actual=subject or "no subject",
        )
    parts = {
        media_type: await _part(repository, manifest, media_type, item=item)
        for media_type in _MAX_BLOB_BYTES
    }
    signed = verify_signed_manifest(
        parts[ARTIFACT_TYPE],
        parts[SIGNATURE_TYPE],
        parts[CERTIFICATE_TYPE],
        unsafe_allow_sha256=unsafe_allow_sha256,
    )
    return PublishedImage(
        signed=signed,
        sources=_located(repository, parts[SOURCES_TYPE], item=f"{item}: sources"),
        artifact=descriptor.digest,
    )


async def _part(
    repository: ImageRepository, manifest: ImageManifest, media_type: str, *, item: str
) -> bytes:
    found = [blob for blob in manifest.layers or () if blob.media_type == media_type]
    if len(found) != 1:
        raise FormatError(
            item, f"must hold one blob of type {media_type}", expected=1, actual=len(found)
        )
    return await repository.document(found[0], max_bytes=_MAX_BLOB_BYTES[media_type])


def _located(repository: ImageRepository, raw: bytes, *, item: str) -> dict[str, LayerSource]:
    """Where this repository has the blobs: the artifact itself can name no other place."""
    found: dict[str, LayerSource] = {}
    for name, blob in decode_document(raw, _Sources, item=item).layers.items():
        parse_digest(name, item=item, unsafe_allow_sha256=True)
        try:
            source = repository.layer_source(
                Descriptor(
                    media_type=blob.media_type, digest=blob.blob_digest, size=blob.size_bytes
                )
            )
        except Refusal:
            # It is not there. Whether that matters is seen once the layer is wanted.
            continue
        found[name] = msgspec.structs.replace(source, tar_size_bytes=blob.tar_size_bytes)
    return found
