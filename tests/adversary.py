"""The untrusted host and operator: forges, truncates, swaps and replays what it handles."""

from __future__ import annotations

import msgspec

from supervisor.operations import ManifestUpload


def with_other_manifest(upload: ManifestUpload, other: bytes) -> ManifestUpload:
    """The owner's signature under somebody else's words."""
    return msgspec.structs.replace(upload, manifest=other)


def with_flipped_bit(data: bytes, at: int) -> bytes:
    """One bit changed in transit."""
    changed = bytearray(data)
    changed[at % len(changed)] ^= 1
    return bytes(changed)


def with_signature_of(upload: ManifestUpload, other: ManifestUpload) -> ManifestUpload:
    """A genuine signature and certificate of another image."""
    return msgspec.structs.replace(
        upload, signature=other.signature, certificate_der=other.certificate_der
    )


def reordered_json(manifest: bytes) -> bytes:
    """The same meaning in other bytes: no longer what was signed."""
    return b" " + manifest
