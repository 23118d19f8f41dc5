"""Keys and certificates as people keep them: PEM or DER."""

from __future__ import annotations

import getpass
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from acon.errors import UsageError
from acon.files import read_bounded

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

_MAX_BYTES = 64 * 1024


def load_certificate_der(path: Path) -> bytes:
    """The DER bytes of the (first) certificate in a PEM or DER file."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    raw = read_bounded(path, max_bytes=_MAX_BYTES)
    try:
        if b"-----BEGIN" in raw:
            return x509.load_pem_x509_certificate(raw).public_bytes(Encoding.DER)
        x509.load_der_x509_certificate(raw)
    except ValueError as error:
        raise UsageError(
            str(path), "must be an X.509 certificate in PEM or DER", actual=error
        ) from None
    return raw


def load_private_key(path: Path) -> PrivateKeyTypes:
    """A private key in PEM or DER; asks for the passphrase of an encrypted one on a terminal."""
    from cryptography.hazmat.primitives import serialization

    raw = read_bounded(path, max_bytes=_MAX_BYTES)
    load = (
        serialization.load_pem_private_key
        if b"-----BEGIN" in raw
        else serialization.load_der_private_key
    )
    password: bytes | None = None
    try:
        try:
            return load(raw, None)
        except TypeError:
            # cryptography's way of saying "encrypted, and no passphrase was given".
            if not sys.stdin.isatty():
                raise UsageError(
                    str(path),
                    "the key is encrypted and there is no terminal to ask for its passphrase; "
                    "sign elsewhere and use --signature",
                ) from None
            password = getpass.getpass(f"Passphrase of {path}: ").encode()
            return load(raw, password)
    except ValueError as error:
        raise UsageError(str(path), "must be a private key in PEM or DER", actual=error) from None


def require_pair(private_key: PrivateKeyTypes, certificate_der: bytes, *, item: str) -> None:
    """Refuse a key that is not the certificate's."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    spki = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    certificate = x509.load_der_x509_certificate(certificate_der)
    if private_key.public_key().public_bytes(*spki) != certificate.public_key().public_bytes(*spki):
        raise UsageError(item, "the private key must be the one that the certificate is about")
