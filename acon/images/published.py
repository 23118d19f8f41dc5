"""Signed manifests that were published with an image: found, verified, chosen among.

Whoever can write to a repository can add referrers, so one that is not signed, or wrongly, is
passed over and said so; only signatures decide, and where several are right, a person.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import msgspec

from acon.errors import UsageError
from acon.images.artifact import ARTIFACT_TYPE, PublishedImage, read_artifact
from acon.images.documents import (
    INDEX_TYPES,
    MAX_DOCUMENT_BYTES,
    Descriptor,
    Platform,
    choose_platform,
    decode_index,
    decode_manifest,
    require_manifest_type,
)
from acon.images.repository import ImageRepository
from supervisor.formats.errors import FormatError, Refusal, SignatureInvalid

# Each is some five requests; more of them are an attack, or are named one by one.
MAX_CANDIDATES = 100
# What a refusal shows of the reasons.
_MAX_SHOWN = 16

Warn = Callable[[str], None]


async def find_published(
    repository: ImageRepository,
    named: Descriptor,
    *,
    wanted: Platform,
    item: str,
    warn: Warn,
    unsafe_allow_sha256: bool = False,
) -> tuple[PublishedImage, ...]:
    """Every signed image that refers to the image (or to the index) `named`, verified.

    `named` may be such an artifact itself: then it is the only one, whatever it refers to.
    `warn` is told of each that was passed over and why. Raises `SignatureInvalid` that lists
    these reasons when none is left, `FormatError` beyond `MAX_CANDIDATES`, and what the
    repository raises.
    """
    chosen, subjects = await _subjects(repository, named, wanted, item=item)
    raw = await repository.document(chosen, max_bytes=MAX_DOCUMENT_BYTES)
    if decode_manifest(raw, chosen).artifact_type == ARTIFACT_TYPE:
        own = await read_artifact(
            repository, chosen, subjects=None, unsafe_allow_sha256=unsafe_allow_sha256
        )
        return (own,) if own is not None else ()
    candidates: dict[str, Descriptor] = {}
    for subject in sorted(subjects):
        for candidate in await repository.referrers(subject, ARTIFACT_TYPE):
            candidates.setdefault(candidate.digest, candidate)
    if len(candidates) > MAX_CANDIDATES:
        raise FormatError(
            item,
            "too many artifacts refer to the image to read them all: name one by its digest "
            "(docker://HOST/NAME@DIGEST)",
            expected=f"{MAX_CANDIDATES} at most",
            actual=len(candidates),
        )
    found: list[PublishedImage] = []
    reasons: list[str] = []
    for candidate in candidates.values():
        try:
            one = await read_artifact(
                repository,
                candidate,
                subjects=subjects,
                unsafe_allow_sha256=unsafe_allow_sha256,
            )
        except Refusal as error:
            reasons.append(f"{candidate.digest}: {error}")
            warn(f"{item}: passed over {candidate.digest}: {error}")
            continue
        if one is not None:
            found.append(one)
    if not found:
        raise SignatureInvalid(
            item,
            "a signed manifest must be published with the image (`acon image publish`)",
            expected="one that refers to " + " or ".join(sorted(subjects)),
            actual="; ".join(reasons[:_MAX_SHOWN]) or "none",
        )
    return _merged(found)


def choose_published(
    found: Sequence[PublishedImage], signers: Collection[str], *, item: str
) -> PublishedImage:
    """The one that is meant: the only one, or the only one that one of `signers` signed.

    `signers` are `HASH/SIGNER`; none: whoever. Raises `UsageError` that lists what there is.
    """
    left = [one for one in found if not signers or str(one.signed.signer) in signers]
    if len(left) == 1:
        return left[0]
    listed = ", ".join(f"{one.signed.image_id} in {one.artifact}" for one in found[:_MAX_SHOWN])
    if not left:
        raise UsageError(
            item,
            "a signed manifest by a signer that --signed-by names must be published with the image",
            expected=" or ".join(sorted(signers)),
            actual=listed,
        )
    raise UsageError(
        item,
        "several signed manifests are published with the image: "
        "--signed-by SIGNER chooses one, or the artifact's digest in place of the tag",
        actual=listed,
    )


async def _subjects(
    repository: ImageRepository, named: Descriptor, wanted: Platform, *, item: str
) -> tuple[Descriptor, frozenset[str]]:
    """The platform's manifest, and the digests that a signed manifest may refer to."""
    require_manifest_type(named.media_type, item=item)
    if named.media_type not in INDEX_TYPES:
        return named, frozenset({named.digest})
    raw = await repository.document(named, max_bytes=MAX_DOCUMENT_BYTES)
    chosen = choose_platform(decode_index(raw, named).manifests or (), wanted, item=item)
    require_manifest_type(chosen.media_type, item=item)
    return chosen, frozenset({named.digest, chosen.digest})


def _merged(found: Sequence[PublishedImage]) -> tuple[PublishedImage, ...]:
    """One for each image: it may have been published twice, with other signature bytes."""
    by_id: dict[str, PublishedImage] = {}
    for one in found:
        key = str(one.signed.image_id)
        first = by_id.setdefault(key, one)
        if first is not one:
            sources = {**one.sources, **first.sources}
            by_id[key] = msgspec.structs.replace(first, sources=sources)
    return tuple(by_id.values())
