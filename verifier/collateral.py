"""Intel's collateral: what a verifier must have beside the quote, as dcap-qvl reads it."""

from __future__ import annotations

from datetime import datetime

import msgspec
from cryptography import x509

from supervisor.formats.errors import FormatError
from verifier import dcap

MAX_COLLATERAL_BYTES = 4 << 20


class _Dated(msgspec.Struct, frozen=True):
    """What TCB info and QE identity have in common; Intel's field names, others ignored."""

    issueDate: datetime
    nextUpdate: datetime
    tcbEvaluationDataNumber: int
    pceId: str | None = None


class Validity(msgspec.Struct, frozen=True, kw_only=True):
    """From when until when one document holds, both included; aware times."""

    document: str
    not_before: datetime
    not_after: datetime


class Collateral(msgspec.Struct, frozen=True, kw_only=True):
    """Readable collateral. Nothing in it is believed before dcap-qvl has verified it."""

    qvl: dcap.QvlCollateral
    validities: tuple[Validity, ...]
    pce_id: str  # of the TCB info, lower-case hex
    evaluation_number: int  # of the TCB info


def read_collateral(text: str) -> Collateral:
    """Read `QuoteCollateralV3` JSON. Raises `FormatError` for what cannot be read."""
    item = "collateral"
    if len(text) > MAX_COLLATERAL_BYTES:
        raise FormatError(item, "too large", expected=f"at most {MAX_COLLATERAL_BYTES} bytes")
    try:
        qvl = dcap.read_collateral_json(text)
    except ValueError as error:
        raise FormatError(item, "QuoteCollateralV3 JSON", actual=str(error)[:200]) from None
    tcb_info = _dated(qvl.tcb_info, "collateral.tcb_info")
    qe_identity = _dated(qvl.qe_identity, "collateral.qe_identity")
    return Collateral(
        qvl=qvl,
        validities=(
            _validity("TCB info", tcb_info),
            _validity("QE identity", qe_identity),
            _crl_validity("PCK revocation list", qvl.pck_crl, "collateral.pck_crl"),
            _crl_validity("root revocation list", qvl.root_ca_crl, "collateral.root_ca_crl"),
        ),
        pce_id=(tcb_info.pceId or "").lower(),
        evaluation_number=tcb_info.tcbEvaluationDataNumber,
    )


def _dated(text: str, item: str) -> _Dated:
    try:
        dated = msgspec.json.decode(text, type=_Dated)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise FormatError(item, "Intel's JSON", actual=str(error)[:200]) from None
    if dated.issueDate.tzinfo is None or dated.nextUpdate.tzinfo is None:
        raise FormatError(item, "dates that say their time zone")
    return dated


def _validity(document: str, dated: _Dated) -> Validity:
    return Validity(document=document, not_before=dated.issueDate, not_after=dated.nextUpdate)


def _crl_validity(document: str, der: bytes, item: str) -> Validity:
    try:
        crl = x509.load_der_x509_crl(der)
        not_before, not_after = crl.last_update_utc, crl.next_update_utc
    except ValueError as error:
        raise FormatError(item, "a DER revocation list", actual=str(error)[:200]) from None
    if not_after is None:
        raise FormatError(item, "a revocation list says when the next one comes")
    return Validity(document=document, not_before=not_before, not_after=not_after)
