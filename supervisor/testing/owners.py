"""Owners who really sign, and the manifests that they sign."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from supervisor.formats import canonical_json
from supervisor.formats.digest import digest_of
from supervisor.formats.signature import sign_manifest, signer_id_of
from supervisor.operations import ManifestUpload

CERTIFICATE_DAYS = 365


class Owner:
    """Somebody who signs manifests, with a P-384 key and a self-signed certificate."""

    def __init__(self, name: str) -> None:
        self.key = ec.generate_private_key(ec.SECP384R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        begin = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(begin + datetime.timedelta(days=CERTIFICATE_DAYS))
            .sign(self.key, hashes.SHA384())
        )
        self.certificate_der = certificate.public_bytes(serialization.Encoding.DER)
        self.signer = signer_id_of(self.certificate_der)

    def sign(self, manifest_bytes: bytes) -> ManifestUpload:
        """The signed image, ready for `admit`."""
        return ManifestUpload(
            manifest=manifest_bytes,
            signature=sign_manifest(manifest_bytes, self.key, self.certificate_der),
            certificate_der=self.certificate_der,
        )


def manifest(
    *, name: str, layers: Sequence[str] | None = None, accepts: Sequence[str] = (), **fields: object
) -> bytes:
    """Canonical bytes of an executable image's manifest; `fields` are added as they are."""
    return canonical_json.encode_go(
        {
            "aconSpecVersion": [1, 0],
            "layers": [str(digest_of("sha384", name.encode()))] if layers is None else list(layers),
            "aliases": {"self": {".": [name]}},
            "entrypoint": ["/bin/true"],
            "policy": {"accepts": list(accepts), "rejectUnaccepted": bool(accepts)},
            **fields,
        }
    )
