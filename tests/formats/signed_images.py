"""Keys, certificates and signed manifests made on the spot, for the tests of this folder."""

from __future__ import annotations

import datetime
from functools import cache

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import (
    CertificateIssuerPrivateKeyTypes,
    CertificatePublicKeyTypes,
)
from cryptography.hazmat.primitives.serialization import Encoding

from supervisor.formats.canonical_json import encode
from supervisor.formats.signature import SignedManifest, sign_manifest, verify_signed_manifest

SignerKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey


def certificate_der(
    public_key: CertificatePublicKeyTypes,
    issuer_key: CertificateIssuerPrivateKeyTypes,
    hash_algorithm: hashes.SHA256 | hashes.SHA384 | hashes.SHA512 | hashes.SHA224 | None,
    name: str = "signer",
) -> bytes:
    """A certificate that expired long ago, since dates must not be judged."""
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(public_key)
        .serial_number(1)
        .not_valid_before(datetime.datetime(2001, 1, 1))
        .not_valid_after(datetime.datetime(2002, 1, 1))
        .sign(issuer_key, hash_algorithm)
        .public_bytes(Encoding.DER)
    )


@cache
def signer(name: str) -> tuple[ed25519.Ed25519PrivateKey, bytes]:
    """A key and its certificate, the same for the same name."""
    key = ed25519.Ed25519PrivateKey.generate()
    return key, certificate_der(key.public_key(), key, None, name)


def manifest_bytes(**fields: object) -> bytes:
    """A canonical manifest of the spec's version with the given fields."""
    return encode({"aconSpecVersion": [1, 0], **fields})


def image(signer_name: str = "owner", **fields: object) -> SignedManifest:
    """A verified image, signed by the key of `signer_name`."""
    key, certificate = signer(signer_name)
    raw = manifest_bytes(**fields)
    return verify_signed_manifest(raw, sign_manifest(raw, key, certificate), certificate)
