"""The signed manifests of the evidence, verified once; names and matching by policy entries."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from cryptography import x509

from supervisor.formats.base64_text import from_base64
from supervisor.formats.errors import Untrusted
from supervisor.formats.evidence import EvidenceImage
from supervisor.formats.references import split_alias
from supervisor.formats.signature import SignedManifest, verify_signed_manifest
from verifier.policy import ImageEntry


class BrokenImage(msgspec.Struct, frozen=True, kw_only=True):
    """An image of the evidence whose signature does not hold, and why."""

    index: int
    error: Untrusted


class ImageSet(msgspec.Struct, frozen=True, kw_only=True):
    """Images by their ids, which were computed from their bytes; and those that are none."""

    by_id: dict[str, SignedManifest]
    broken: tuple[BrokenImage, ...]
    count: int  # of images in the evidence, duplicates and broken ones included

    def get(self, image_id: str) -> SignedManifest | None:
        return self.by_id.get(image_id)

    def of(self, image_ids: Sequence[str]) -> tuple[SignedManifest, ...]:
        """Those of the ids that are there, in the ids' order."""
        return tuple(self.by_id[id] for id in image_ids if id in self.by_id)


def read_images(images: Sequence[EvidenceImage], *, allow_sha256: bool) -> ImageSet:
    """Verify every signature. Nothing is raised: what does not hold is in `broken`."""
    by_id: dict[str, SignedManifest] = {}
    broken = []
    for index, image in enumerate(images):
        try:
            signed = verify_signed_manifest(
                from_base64(image.manifest, item="manifest"),
                from_base64(image.signature, item="signature"),
                from_base64(image.certificate, item="certificate"),
                unsafe_allow_sha256=allow_sha256,
            )
        except Untrusted as error:
            broken.append(BrokenImage(index=index, error=error))
        else:
            by_id[str(signed.image_id)] = signed
    return ImageSet(by_id=by_id, broken=tuple(broken), count=len(images))


def names_of(signed: SignedManifest) -> tuple[str, ...]:
    """What an image may be called by: its own aliases; for one that only lends layers also
    the aliases that it gives them."""
    own = signed.manifest.self_aliases
    if signed.manifest.is_executable:
        return own
    lent = (alias for _, aliases in signed.manifest.content_aliases for alias in aliases)
    return tuple(dict.fromkeys((*own, *lent)))


def satisfies(alias: str, name: str, minimum_svn: int) -> bool:
    """Whether `alias` is `name` at this SVN or later; an alias without SVN counts as 0."""
    alias_name, svn = split_alias(alias)
    return alias_name == name and (svn or 0) >= minimum_svn


def matches(entry: ImageEntry, image_id: str, signed: SignedManifest | None) -> bool:
    """Whether an admitted image is the one that a policy entry means.

    `signed` is None for an image whose manifest the evidence lacks: only its id can match.
    """
    if entry.id is not None:
        return entry.id == image_id
    if signed is None or entry.name is None or entry.minimum_svn is None:
        return False
    return str(signed.signer) == entry.signer and any(
        satisfies(alias, entry.name, entry.minimum_svn) for alias in names_of(signed)
    )


def certificate_of(signed: SignedManifest) -> x509.Certificate:
    """The signer's certificate, which `verify_signed_manifest` has read before."""
    return x509.load_der_x509_certificate(signed.certificate_der)


def subject_of(signed: SignedManifest) -> str:
    """What the signer calls itself. Anyone can call himself anything."""
    try:
        return certificate_of(signed).subject.rfc4514_string()[:300]
    except ValueError:
        return "unreadable"
