"""The simulator's own PKI: root, platform CA, PCK certificate, TCB signing certificate.

Made once, at installation, on the machine that simulates; never shipped. The shape of
every certificate is what dcap-qvl, go-tdx-guest and Trustee demand of Intel's, the common
names included; organisation and unit say SIMULATION, and no verifier trusts the root
unless it is told to.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from plugins.tdx_sim import platform_identity as identity
from plugins.tdx_sim.sgx_extension import sgx_extension
from supervisor import ConfigError

# Fixed, so that making a PKI reads no clock and a wrong one does no harm.
VALID_FROM = datetime(2020, 1, 1, tzinfo=UTC)
VALID_TO = datetime(2049, 12, 31, 23, 59, 59, tzinfo=UTC)

# Nobody serves these: verifiers want the extension, and `.invalid` never resolves (RFC 6761).
_ROOT_CRL_URL = "https://simulation.invalid/root.crl"
_PCK_CRL_URL = "https://simulation.invalid/pck.crl"

_ROLES = ("root", "platform_ca", "pck", "tcb_signing")
_ROOT_PEM = "root.pem"


@dataclass(frozen=True, kw_only=True)
class CertifiedKey:
    """A P-256 key and the certificate for it."""

    certificate: x509.Certificate
    private_key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.DER)


@dataclass(frozen=True, kw_only=True)
class SimPki:
    """All keys of one simulated platform. `directory` is where they are kept."""

    directory: Path
    root: CertifiedKey
    platform_ca: CertifiedKey
    pck: CertifiedKey
    tcb_signing: CertifiedKey

    @property
    def root_pem_path(self) -> Path:
        """The file to give to a verifier that shall trust this simulator."""
        return self.directory / _ROOT_PEM

    @property
    def root_der(self) -> bytes:
        return self.root.der

    @property
    def pck_chain_pem(self) -> bytes:
        """PCK, platform CA, root: what a quote carries."""
        return self.pck.pem + self.platform_ca.pem + self.root.pem


def ensure_pki(directory: Path | str) -> SimPki:
    """Load the PKI kept in `directory`, or make it there if the folder is absent or empty.

    The folder has mode 0700, the keys 0600. It is filled elsewhere and put in its place by
    one rename, so that of several makers at once one wins and all return its PKI, and an
    interrupted one leaves nothing that looks like a PKI.
    Raises `ConfigError` for a folder that holds anything but a whole PKI of its owner's alone.
    """
    directory = Path(directory)
    try:
        if _is_vacant(directory):
            _make(directory)
        return _load(directory)
    except OSError as error:
        raise ConfigError(
            str(directory), "the PKI's folder can be read and made", actual=error
        ) from error


def _is_vacant(directory: Path) -> bool:
    return not directory.is_dir() or not any(directory.iterdir())


# --- making --------------------------------------------------------------------------------


def _make(directory: Path) -> None:
    parent = directory.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=parent))  # mode 0700
    try:
        for role, certified in _certify().items():
            _write(draft / f"{role}.pem", certified.pem, mode=0o644)
            key = certified.private_key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            _write(draft / f"{role}.key", key, mode=0o600)
        try:
            draft.rename(directory)
        except OSError:
            # Fine if another maker was faster: then its PKI is there.
            if _is_vacant(directory):
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write(path: Path, data: bytes, *, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(descriptor)


def _certify() -> dict[str, CertifiedKey]:
    keys = {role: ec.generate_private_key(ec.SECP256R1()) for role in _ROLES}
    root_name = _name("Intel SGX Root CA")
    ca_name = _name("Intel SGX PCK Platform CA")
    root_key, ca_key = keys["root"], keys["platform_ca"]

    root = _builder(root_name, root_name, keys["root"], root_key, _ROOT_CRL_URL)
    root = _as_ca(root, path_length=1)
    platform_ca = _builder(ca_name, root_name, ca_key, root_key, _ROOT_CRL_URL)
    platform_ca = _as_ca(platform_ca, path_length=0)
    tcb_signing = _builder(
        _name("Intel SGX TCB Signing"), root_name, keys["tcb_signing"], root_key, _ROOT_CRL_URL
    )
    pck = _builder(_name("Intel SGX PCK Certificate"), ca_name, keys["pck"], ca_key, _PCK_CRL_URL)
    extension = sgx_extension(
        ppid=secrets.token_bytes(16),
        tcb_components=identity.SGX_TCB_COMPONENTS,
        pce_svn=identity.PCE_SVN,
        cpu_svn=identity.CPU_SVN,
        pce_id=identity.PCE_ID,
        fmspc=identity.FMSPC,
        platform_instance_id=secrets.token_bytes(16),
    )
    signed = {
        "root": root.sign(root_key, hashes.SHA256()),
        "platform_ca": platform_ca.sign(root_key, hashes.SHA256()),
        "tcb_signing": _as_leaf(tcb_signing).sign(root_key, hashes.SHA256()),
        "pck": _as_leaf(pck).add_extension(extension, critical=False).sign(ca_key, hashes.SHA256()),
    }
    return {role: CertifiedKey(certificate=signed[role], private_key=keys[role]) for role in _ROLES}


def _name(common_name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "SIMULATION, not Intel Corporation"),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "SIMULATION: proves nothing"),
        ]
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer_key: ec.EllipticCurvePrivateKey,
    crl_url: str,
) -> x509.CertificateBuilder:
    crl_point = x509.DistributionPoint(
        full_name=[x509.UniformResourceIdentifier(crl_url)],
        relative_name=None,
        reasons=None,
        crl_issuer=None,
    )
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(VALID_FROM)
        .not_valid_after(VALID_TO)
        .add_extension(authority, critical=False)
        .add_extension(x509.CRLDistributionPoints([crl_point]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _as_ca(builder: x509.CertificateBuilder, *, path_length: int) -> x509.CertificateBuilder:
    constraints = x509.BasicConstraints(ca=True, path_length=path_length)
    return builder.add_extension(_key_usage(ca=True), critical=True).add_extension(
        constraints, critical=True
    )


def _as_leaf(builder: x509.CertificateBuilder) -> x509.CertificateBuilder:
    constraints = x509.BasicConstraints(ca=False, path_length=None)
    return builder.add_extension(_key_usage(ca=False), critical=True).add_extension(
        constraints, critical=True
    )


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=not ca,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


# --- loading -------------------------------------------------------------------------------


def _load(directory: Path) -> SimPki:
    _require_private(directory, mode=0o700)
    parts = {role: _load_certified_key(directory, role) for role in _ROLES}
    issuers = {"root": "root", "platform_ca": "root", "tcb_signing": "root", "pck": "platform_ca"}
    for role, issuer in issuers.items():
        try:
            parts[role].certificate.verify_directly_issued_by(parts[issuer].certificate)
        except (ValueError, TypeError, InvalidSignature) as error:
            raise ConfigError(
                str(directory / f"{role}.pem"), f"it is issued by {issuer}.pem", actual=error
            ) from error
    return SimPki(directory=directory, **parts)


def _load_certified_key(directory: Path, role: str) -> CertifiedKey:
    certificate_path, key_path = directory / f"{role}.pem", directory / f"{role}.key"
    try:
        certificate = x509.load_pem_x509_certificate(certificate_path.read_bytes())
        _require_private(key_path, mode=0o600)
        private_key = serialization.load_pem_private_key(key_path.read_bytes(), password=None)
    except (OSError, ValueError) as error:
        raise ConfigError(
            str(directory), "it holds a whole PKI; remove it to have a new one made", actual=error
        ) from error
    if (
        not isinstance(private_key, ec.EllipticCurvePrivateKey)
        or private_key.public_key() != certificate.public_key()
    ):
        raise ConfigError(str(key_path), f"it is the P-256 key of {certificate_path.name}")
    return CertifiedKey(certificate=certificate, private_key=private_key)


def _require_private(path: Path, *, mode: int) -> None:
    status = path.stat()
    if status.st_uid != os.geteuid():
        raise ConfigError(
            str(path),
            "it belongs to who runs the simulator",
            expected=os.geteuid(),
            actual=status.st_uid,
        )
    if stat.S_IMODE(status.st_mode) & ~mode:
        raise ConfigError(
            str(path),
            "nobody else may read or write it",
            expected=f"{mode:04o}",
            actual=f"{stat.S_IMODE(status.st_mode):04o}",
        )
