"""Whose signature is believed: Intel's root, or one that the caller hands over."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime

import msgspec
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from supervisor.formats.errors import FormatError
from verifier.verdict import TrustAnchor

MAX_ROOT_PEM_BYTES = 64 * 1024
# Intel SGX Root CA: SHA-384 of the uncompressed P-256 point, and when its certificate ends.
# The key itself is built into dcap-qvl; this names it in verdicts.
INTEL_ROOT_KEY_SHA384 = (
    "46e403bd34f05a3f2817ab9badcaacc7ffc98e0f261008cd30dae936cace18d5"
    "dcf58eef31463613de1570d516200993"
)
INTEL_ROOT_NOT_BEFORE = datetime(2018, 5, 21, 10, 45, 10, tzinfo=UTC)
INTEL_ROOT_NOT_AFTER = datetime(2049, 12, 31, 23, 59, 59, tzinfo=UTC)


class TrustedRoot(msgspec.Struct, frozen=True, kw_only=True):
    """A root to verify under; `der` is None for the one that dcap-qvl has built in."""

    anchor: TrustAnchor
    der: bytes | None
    not_before: datetime
    not_after: datetime


def intel_root() -> TrustedRoot:
    """Intel's root, which needs no file."""
    return TrustedRoot(
        anchor=TrustAnchor(
            kind="intel",
            name="Intel SGX Root CA (built in)",
            public_key_sha384=INTEL_ROOT_KEY_SHA384,
        ),
        der=None,
        not_before=INTEL_ROOT_NOT_BEFORE,
        not_after=INTEL_ROOT_NOT_AFTER,
    )


def read_root(pem: bytes | None) -> TrustedRoot:
    """The caller's root, or Intel's for None.

    `pem` is exactly one CA certificate with a P-256 key. Anything but Intel's own key counts
    as simulated, whatever the certificate calls itself. Raises `FormatError`.
    """
    if pem is None:
        return intel_root()
    item = "trusted root"
    if len(pem) > MAX_ROOT_PEM_BYTES:
        raise FormatError(item, "too large", expected=f"at most {MAX_ROOT_PEM_BYTES} bytes")
    try:
        certificates = x509.load_pem_x509_certificates(pem)
        key = certificates[0].public_key()
        constraints = certificates[0].extensions.get_extension_for_class(x509.BasicConstraints)
    except (
        ValueError,
        UnsupportedAlgorithm,
        x509.ExtensionNotFound,
        x509.DuplicateExtension,
    ) as error:
        raise FormatError(item, "one CA certificate in PEM", actual=str(error)[:200]) from None
    if len(certificates) != 1 or not constraints.value.ca:
        raise FormatError(item, "one CA certificate in PEM", actual=f"{len(certificates)}")
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise FormatError(item, "a P-256 key, as Intel's root has")
    point = key.public_bytes(
        serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
    )
    key_sha384 = hashlib.sha384(point).hexdigest()
    certificate = certificates[0]
    is_intel = key_sha384 == INTEL_ROOT_KEY_SHA384
    return TrustedRoot(
        anchor=TrustAnchor(
            kind="intel" if is_intel else "simulated",
            name=certificate.subject.rfc4514_string()[:300],
            public_key_sha384=key_sha384,
        ),
        der=certificate.public_bytes(serialization.Encoding.DER),
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
    )
