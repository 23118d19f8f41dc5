"""Who vouches for a manifest (ACON image spec 1.0, "Signing").

The signature is over the manifest's bytes as received, never over a re-encoding. The
certificate only carries a key and names a hash algorithm: its issuer and its dates are
not judged here, since inside the TD the host sets the clock.
"""

from __future__ import annotations

import hashlib
from typing import Self, final

from cryptography import x509
from cryptography.exceptions import InternalError, InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

from supervisor.formats.canonical_json import decode, encode, encode_go
from supervisor.formats.digest import STRONG_ALGORITHMS
from supervisor.formats.errors import FormatError, SignatureInvalid
from supervisor.formats.ids import ImageId, SignerId
from supervisor.formats.manifest import MAX_MANIFEST_BYTES, Manifest, parse_manifest

MAX_CERTIFICATE_BYTES = 64 * 1024
MAX_SIGNATURE_BYTES = 4 * 1024
MIN_RSA_BITS = 3072
# OpenSSL verifies no larger keys; said here so that the refusal names the rule.
MAX_RSA_BITS = 16384
CURVES = frozenset({"secp256r1", "secp384r1", "secp521r1"})

PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey
_HASHES: dict[str, type[hashes.HashAlgorithm]] = {
    "sha256": hashes.SHA256,
    "sha384": hashes.SHA384,
    "sha512": hashes.SHA512,
}
# Whatever the DER reader and OpenSSL raise for bytes that they do not like; warnings are
# there for interpreters that are told to raise them.
_UNREADABLE = (
    ValueError,
    TypeError,
    OverflowError,
    UnsupportedAlgorithm,
    InternalError,
    x509.InvalidVersion,
    Warning,
)


@final
class SignedManifest:
    """A manifest whose signature was verified. Immutable; made by `verify_signed_manifest` only.

    `image_id` and `signer` are computed from the bytes. `manifest_bytes`, `signature` and
    `certificate_der` are what was verified, byte for byte.
    """

    __slots__ = (
        "certificate_der",
        "image_id",
        "manifest",
        "manifest_bytes",
        "signature",
        "signer",
    )

    manifest: Manifest
    image_id: ImageId
    signer: SignerId
    manifest_bytes: bytes
    signature: bytes
    certificate_der: bytes

    def __new__(cls) -> Self:
        raise TypeError("a SignedManifest is made by verify_signed_manifest only")

    def __init_subclass__(cls) -> None:
        raise TypeError("SignedManifest has no subclasses")

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a SignedManifest does not change")

    def __delattr__(self, name: str) -> None:
        raise AttributeError("a SignedManifest does not change")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SignedManifest):
            return NotImplemented
        return (self.manifest_bytes, self.signature, self.certificate_der) == (
            other.manifest_bytes,
            other.signature,
            other.certificate_der,
        )

    def __hash__(self) -> int:
        return hash(self.image_id)

    def __repr__(self) -> str:
        return f"<SignedManifest {self.image_id}>"


def verify_signed_manifest(
    manifest_bytes: bytes,
    signature: bytes,
    certificate_der: bytes,
    *,
    unsafe_allow_sha256: bool = False,
) -> SignedManifest:
    """Verify, then parse. The manifest is not parsed before its signature holds.

    Raises `SignatureInvalid` (weak or foreign algorithm, wrong signature) and `FormatError`
    (sizes, the certificate's DER, the manifest).
    """
    _check_size("manifest", manifest_bytes, MAX_MANIFEST_BYTES)
    certificate, algorithm = _read_certificate(certificate_der, unsafe_allow_sha256)
    _verify(_public_key(certificate), algorithm, signature, manifest_bytes)
    manifest = parse_manifest(manifest_bytes, unsafe_allow_sha256=unsafe_allow_sha256)
    signer = _digest(algorithm, certificate_der)
    signed = object.__new__(SignedManifest)
    values: dict[str, object] = {
        "manifest": manifest,
        "image_id": ImageId(algorithm, signer, _digest(algorithm, manifest_bytes)),
        "signer": SignerId(algorithm, signer),
        "manifest_bytes": bytes(manifest_bytes),
        "signature": bytes(signature),
        "certificate_der": bytes(certificate_der),
    }
    for name, value in values.items():
        object.__setattr__(signed, name, value)
    return signed


def certificate_hash_algorithm(
    certificate: x509.Certificate, *, unsafe_allow_sha256: bool = False
) -> str:
    """The hash algorithm of all ids under this certificate: that of its own signature.

    "sha384" or "sha512" (Ed25519 mandates SHA-512), "sha256" only where allowed. Raises
    `SignatureInvalid` for all others.
    """
    try:
        oid = certificate.signature_algorithm_oid
        chosen = certificate.signature_hash_algorithm
    except _UNREADABLE as error:
        raise SignatureInvalid(
            "certificate", "its own signature's algorithm must be known", actual=str(error)[:160]
        ) from None
    if oid == x509.SignatureAlgorithmOID.ED25519:
        return "sha512"
    name = oid.dotted_string if chosen is None else chosen.name
    if name in STRONG_ALGORITHMS or (unsafe_allow_sha256 and name == "sha256"):
        return name
    raise SignatureInvalid(
        "certificate",
        "the hash of the certificate's own signature must be SHA-384 or stronger",
        expected="sha384 or sha512",
        actual=name,
    )


def signer_id_of(certificate_der: bytes, *, unsafe_allow_sha256: bool = False) -> SignerId:
    """`HASH/SIGNER` of a certificate. Raises as `verify_signed_manifest` does."""
    certificate, algorithm = _read_certificate(certificate_der, unsafe_allow_sha256)
    _public_key(certificate)
    return SignerId(algorithm, _digest(algorithm, certificate_der))


def sign_manifest(
    manifest_bytes: bytes, private_key: PrivateKeyTypes, certificate_der: bytes
) -> bytes:
    """Sign bytes as `verify_signed_manifest` verifies them: ECDSA in DER, Ed25519, or RSA
    PKCS#1 v1.5, with the hash that the certificate names.

    Raises `SignatureInvalid` when the key is not the certificate's, or the certificate weak.
    """
    certificate, algorithm = _read_certificate(certificate_der, unsafe_allow_sha256=False)
    public_key = _public_key(certificate)
    if not isinstance(
        private_key, ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey
    ):
        raise SignatureInvalid(
            "private key", "must be ECDSA, Ed25519 or RSA", actual=type(private_key).__name__
        )
    if private_key.public_key() != public_key:
        raise SignatureInvalid("private key", "must be the one of the certificate")
    if isinstance(private_key, ed25519.Ed25519PrivateKey):
        return private_key.sign(manifest_bytes)
    digest = _HASHES[algorithm]()
    if isinstance(private_key, rsa.RSAPrivateKey):
        return private_key.sign(manifest_bytes, padding.PKCS1v15(), digest)
    return private_key.sign(manifest_bytes, ec.ECDSA(digest))


def matching_form(
    manifest_json: bytes,
    signature: bytes,
    certificate_der: bytes,
    *,
    unsafe_allow_sha256: bool = False,
) -> tuple[str, bytes]:
    """Which form of a manifest was signed, and its bytes, to be used from there on.

    Repositories of ACON keep manifests pretty-printed beside a signature over another form.
    Tried in order: "as received", "canonical" (RFC 8785), "go" (Go's encoder). Raises
    `SignatureInvalid` when none verifies.
    """
    _check_size("manifest", manifest_json, MAX_MANIFEST_BYTES)
    certificate, algorithm = _read_certificate(certificate_der, unsafe_allow_sha256)
    public_key = _public_key(certificate)
    value = decode(manifest_json, item="$", max_bytes=MAX_MANIFEST_BYTES)
    forms = (
        ("as received", manifest_json),
        ("canonical", encode(value)),
        ("go", encode_go(value)),
    )
    for name, form in forms:
        try:
            _verify(public_key, algorithm, signature, form)
        except SignatureInvalid:
            continue
        return name, form
    raise SignatureInvalid(
        "signature",
        "must be the certificate's key's, over one of the manifest's forms",
        expected=" or ".join(name for name, _ in forms),
    )


def _digest(algorithm: str, data: bytes) -> str:
    return hashlib.new(algorithm, data).hexdigest()


def _check_size(item: str, data: bytes, limit: int) -> None:
    if len(data) > limit:
        raise FormatError(
            item, "must not be larger than its limit", expected=f"{limit} bytes", actual=len(data)
        )


def _read_certificate(
    certificate_der: bytes, unsafe_allow_sha256: bool
) -> tuple[x509.Certificate, str]:
    _check_size("certificate", certificate_der, MAX_CERTIFICATE_BYTES)
    try:
        certificate = x509.load_der_x509_certificate(certificate_der)
    except _UNREADABLE as error:
        raise FormatError(
            "certificate", "must be one X.509 certificate in DER", actual=str(error)[:160]
        ) from None
    return certificate, certificate_hash_algorithm(
        certificate, unsafe_allow_sha256=unsafe_allow_sha256
    )


def _public_key(certificate: x509.Certificate) -> PublicKey:
    """The certificate's key, if it is of a kind and strength that may vouch for images."""
    try:
        key = certificate.public_key()
        oid = certificate.public_key_algorithm_oid
    except _UNREADABLE as error:
        raise SignatureInvalid(
            "certificate", "its key must be readable", actual=str(error)[:160]
        ) from None
    if isinstance(key, ed25519.Ed25519PublicKey):
        return key
    if isinstance(key, ec.EllipticCurvePublicKey):
        if key.curve.name in CURVES:
            return key
        raise SignatureInvalid(
            "certificate",
            "an ECDSA key must be on a NIST curve of 256 bits at least",
            expected=", ".join(sorted(CURVES)),
            actual=key.curve.name,
        )
    if isinstance(key, rsa.RSAPublicKey):
        # A key marked for PSS must not be used with PKCS#1 v1.5.
        if oid != x509.PublicKeyAlgorithmOID.RSAES_PKCS1_v1_5:
            raise SignatureInvalid(
                "certificate", "an RSA key must be for PKCS#1 v1.5", actual=oid.dotted_string
            )
        if MIN_RSA_BITS <= key.key_size <= MAX_RSA_BITS:
            return key
        raise SignatureInvalid(
            "certificate",
            "an RSA key must be strong",
            expected=f"{MIN_RSA_BITS} to {MAX_RSA_BITS} bits",
            actual=key.key_size,
        )
    raise SignatureInvalid(
        "certificate", "its key must be ECDSA, Ed25519 or RSA", actual=type(key).__name__
    )


def _verify(key: PublicKey, algorithm: str, signature: bytes, data: bytes) -> None:
    _check_size("signature", signature, MAX_SIGNATURE_BYTES)
    try:
        if isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(signature, data)
        elif isinstance(key, rsa.RSAPublicKey):
            key.verify(signature, data, padding.PKCS1v15(), _HASHES[algorithm]())
        else:
            key.verify(signature, data, ec.ECDSA(_HASHES[algorithm]()))
    except (InvalidSignature, *_UNREADABLE):
        raise SignatureInvalid(
            "signature", "must be the certificate's key's, over the manifest's bytes as received"
        ) from None
