"""Collateral for the simulated platform: TCB info, QE identity and CRLs.

In the JSON form of dcap-qvl's `QuoteCollateralV3`. Signatures are over the exact bytes of
the inner objects, whose fields are in Intel's order with upper-case hex: Trustee re-encodes
what it reads before it verifies.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from plugins.tdx_sim import platform_identity as identity
from plugins.tdx_sim.pki import CertifiedKey, SimPki

VALIDITY = timedelta(days=30)
TCB_EVALUATION_DATA_NUMBER = 18

PlatformStatus = Literal[
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
    "Revoked",
]

_TCB_DATE = "2024-03-13T00:00:00Z"
_OLD_TCB_DATE = "2023-08-09T00:00:00Z"
_OLD_ADVISORIES = ["SIMULATED-SA-00001"]
_COMPONENT_KINDS = (
    {"category": "BIOS", "type": "Early Microcode Update"},
    {"category": "OS/VMM", "type": "SGX Late Microcode Update"},
)


def issue(
    pki: SimPki,
    at: datetime,
    *,
    platform_status: PlatformStatus = "UpToDate",
    evaluation_data_number: int = TCB_EVALUATION_DATA_NUMBER,
    pck_revoked: bool = False,
) -> str:
    """Collateral issued at `at` (aware; whole seconds are kept), valid for 30 days.

    `platform_status` is what the TCB info says of this platform's present level, and
    `pck_revoked` puts its PCK certificate on the CRL, so that refusals can be shown.
    Returns the JSON of `QuoteCollateralV3`. Raises `ValueError` for a naive `at`.
    """
    if at.tzinfo is None:
        raise ValueError("the time of issue must say its time zone")
    issued = at.astimezone(UTC).replace(microsecond=0)
    dates = {"issueDate": _rfc3339(issued), "nextUpdate": _rfc3339(issued + VALIDITY)}
    tcb_info = _compact(_tcb_info(dates, platform_status, evaluation_data_number))
    qe_identity = _compact(_qe_identity(dates, evaluation_data_number))
    revoked = [pki.pck.certificate.serial_number] if pck_revoked else []
    signing_chain = (pki.tcb_signing.pem + pki.root.pem).decode("ascii")
    return json.dumps(
        {
            "pck_crl_issuer_chain": (pki.platform_ca.pem + pki.root.pem).decode("ascii"),
            "root_ca_crl": _crl(pki.root, issued, []).hex(),
            "pck_crl": _crl(pki.platform_ca, issued, revoked).hex(),
            "tcb_info_issuer_chain": signing_chain,
            "tcb_info": tcb_info,
            "tcb_info_signature": _sign(pki.tcb_signing, tcb_info).hex(),
            "qe_identity_issuer_chain": signing_chain,
            "qe_identity": qe_identity,
            "qe_identity_signature": _sign(pki.tcb_signing, qe_identity).hex(),
        }
    )


def _tcb_info(
    dates: dict[str, str], platform_status: PlatformStatus, evaluation_data_number: int
) -> dict[str, object]:
    module = {
        "mrsigner": _hex(identity.MR_SIGNER_SEAM),
        "attributes": _hex(identity.SEAM_ATTRIBUTES),
        "attributesMask": "F" * 16,
    }
    return {
        "id": "TDX",
        "version": 3,
        **dates,
        "fmspc": _hex(identity.FMSPC),
        "pceId": _hex(identity.PCE_ID),
        "tcbType": 0,
        "tcbEvaluationDataNumber": evaluation_data_number,
        "tdxModule": module,
        "tdxModuleIdentities": [
            {
                "id": f"TDX_{identity.TDX_MODULE_MAJOR:02X}",
                **module,
                "tcbLevels": [
                    _level({"isvsvn": identity.TDX_MODULE_ISV_SVN}, "UpToDate"),
                    _level({"isvsvn": 2}, "OutOfDate"),
                ],
            }
        ],
        "tcbLevels": [
            _level(_platform_tcb(identity.PCE_SVN), platform_status),
            _level(_platform_tcb(identity.PCE_SVN - 6), "OutOfDate"),
        ],
    }


def _platform_tcb(pce_svn: int) -> dict[str, object]:
    components: list[dict[str, object]] = [{"svn": svn} for svn in identity.SGX_TCB_COMPONENTS]
    for component, kind in zip(components, _COMPONENT_KINDS, strict=False):
        component.update(kind)
    return {
        "sgxtcbcomponents": components,
        "pcesvn": pce_svn,
        "tdxtcbcomponents": [{"svn": svn} for svn in identity.TEE_TCB_SVN],
    }


def _qe_identity(dates: dict[str, str], evaluation_data_number: int) -> dict[str, object]:
    return {
        "id": "TD_QE",
        "version": 2,
        **dates,
        "tcbEvaluationDataNumber": evaluation_data_number,
        "miscselect": _hex(identity.QE_MISC_SELECT.to_bytes(4, "little")),
        "miscselectMask": "FFFFFFFF",
        "attributes": _hex(identity.QE_ATTRIBUTES[:8] + bytes(8)),
        "attributesMask": "FBFFFFFFFFFFFFFF0000000000000000",
        "mrsigner": _hex(identity.QE_MR_SIGNER),
        "isvprodid": identity.QE_ISV_PROD_ID,
        "tcbLevels": [_level({"isvsvn": identity.QE_ISV_SVN}, "UpToDate")],
    }


def _level(tcb: dict[str, object], status: PlatformStatus) -> dict[str, object]:
    if status == "UpToDate":
        return {"tcb": tcb, "tcbDate": _TCB_DATE, "tcbStatus": status}
    return {
        "tcb": tcb,
        "tcbDate": _OLD_TCB_DATE,
        "tcbStatus": status,
        "advisoryIDs": _OLD_ADVISORIES,
    }


def _crl(issuer: CertifiedKey, issued: datetime, revoked_serials: list[int]) -> bytes:
    """DER."""
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.private_key.public_key())
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.certificate.subject)
        .last_update(issued)
        .next_update(issued + VALIDITY)
        .add_extension(x509.CRLNumber(1), critical=False)
        .add_extension(authority, critical=False)
    )
    for serial in revoked_serials:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(issued)
        builder = builder.add_revoked_certificate(entry.build())
    crl = builder.sign(issuer.private_key, hashes.SHA256())
    return crl.public_bytes(serialization.Encoding.DER)


def _sign(signer: CertifiedKey, text: str) -> bytes:
    """r || s, 64 bytes big-endian, as Intel's service writes signatures."""
    der = signer.private_key.sign(text.encode("ascii"), ec.ECDSA(hashes.SHA256()))
    r, s = decode_dss_signature(der)
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def _compact(document: dict[str, object]) -> str:
    return json.dumps(document, separators=(",", ":"))


def _hex(data: bytes) -> str:
    return data.hex().upper()


def _rfc3339(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
