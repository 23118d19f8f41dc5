"""The simulated quoting enclave: an attestation key, certified by the PCK, that signs quotes.

What it takes is a TD's report, what it gives is a quote, as hardware does; the layouts are
in `supervisor.formats.quote`.
"""

from __future__ import annotations

import hashlib
import secrets

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from plugins.tdx_sim import platform_identity as identity
from plugins.tdx_sim.pki import SimPki
from supervisor.formats.quote import (
    QE_AUTH_DATA_BYTES,
    QeReport,
    QuoteAuth,
    build_header,
    pack_qe_report,
    pack_quote,
    pack_signed_part,
    qe_report_data,
)
from supervisor.formats.td_report import TdReport, body_of_report

_QE_ID_BYTES = 16
_COORDINATE_BYTES = 32


class QuotingEnclave:
    """One attestation key and what certifies it. Made at each boot, as a new key is then."""

    def __init__(self, pki: SimPki) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        point = self._key.public_key().public_numbers()
        self._public_key = _raw_pair(point.x, point.y)
        self._auth_data = secrets.token_bytes(QE_AUTH_DATA_BYTES)
        self._report = pack_qe_report(
            QeReport(
                cpu_svn=identity.CPU_SVN,
                misc_select=identity.QE_MISC_SELECT,
                attributes=identity.QE_ATTRIBUTES,
                mr_enclave=identity.QE_MR_ENCLAVE,
                mr_signer=identity.QE_MR_SIGNER,
                isv_prod_id=identity.QE_ISV_PROD_ID,
                isv_svn=identity.QE_ISV_SVN,
                report_data=qe_report_data(self._public_key, self._auth_data),
            )
        )
        self._report_signature = _sign(pki.pck.private_key, self._report)
        self._chain_pem = pki.pck_chain_pem
        # A platform keeps its QE ID: the same in each quote and boot, and it tells nothing else.
        self._qe_id = hashlib.sha256(pki.pck.der).digest()[:_QE_ID_BYTES]

    def quote(self, report: TdReport, *, version: int) -> bytes:
        """A whole quote of `report`: version 4 with a TD 1.0 body, or 5 with a TD 1.5 body."""
        body = body_of_report(report, td15=version == 5)
        header = build_header(version=version, user_data=self._qe_id + bytes(4))
        auth = QuoteAuth(
            signature=_sign(self._key, pack_signed_part(header, body)),
            attestation_public_key=self._public_key,
            qe_report=self._report,
            qe_report_signature=self._report_signature,
            qe_auth_data=self._auth_data,
            certificate_chain_pem=self._chain_pem,
        )
        return pack_quote(header, body, auth)


def _sign(key: ec.EllipticCurvePrivateKey, data: bytes) -> bytes:
    return _raw_pair(*decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256()))))


def _raw_pair(first: int, second: int) -> bytes:
    return first.to_bytes(_COORDINATE_BYTES, "big") + second.to_bytes(_COORDINATE_BYTES, "big")
