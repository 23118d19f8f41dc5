"""Is this a genuine quote of an acceptable TD? Signatures by dcap-qvl, the rest here.

dcap-qvl verifies chain, revocation lists, TCB info, QE identity and signatures, and leaves
to its caller: TEE type, TCB status, attributes, XFAM, the TDX module, service TDs, the
running module's SVN, unsigned trailing bytes, PCEID and the dates of a root of one's own.
"""

from __future__ import annotations

from datetime import datetime

import msgspec

from supervisor.formats.errors import FormatError
from supervisor.formats.quote import Quote, parse_quote
from supervisor.formats.td_body import TdBody
from verifier import dcap
from verifier.collateral import Collateral
from verifier.field_agreement import disagreements
from verifier.policy import Policy
from verifier.td_check import check_td
from verifier.trust import TrustedRoot
from verifier.verdict import Check, group, judge, unmade

TEE_TYPE_TDX = 0x81
_TEE_TYPE_AT = 4


class _Level(msgspec.Struct, frozen=True):
    status: str
    advisory_ids: tuple[str, ...]
    eval_data_number: int


class _Pck(msgspec.Struct, frozen=True):
    pce_id: tuple[int, ...]


class _Platform(msgspec.Struct, frozen=True):
    pck: _Pck
    root_key_id: tuple[int, ...]


class _Qe(msgspec.Struct, frozen=True):
    tcb_eval_data_number: int


class _Claims(msgspec.Struct, frozen=True):
    """The part of dcap-qvl's claims that is used; `report` is compared field by field."""

    tcb: _Level
    platform: _Platform
    qe: _Qe
    report: dict[str, dict[str, object]]


class QuoteJudgement(msgspec.Struct, frozen=True, kw_only=True):
    """What the quote is worth. `quote` is None when it could not even be read.

    `authentic` is true only if dcap-qvl verified it under the root that `anchor` names;
    only then do `tcb_status` and `advisory_ids` exist.
    """

    check: Check
    quote: Quote | None
    authentic: bool
    anchor: str
    tcb_status: str | None = None
    advisory_ids: tuple[str, ...] = ()

    @property
    def body(self) -> TdBody | None:
        return None if self.quote is None else self.quote.body


def check_quote(
    raw: bytes,
    policy: Policy,
    *,
    collateral: Collateral | None,
    root: TrustedRoot,
    at: datetime,
) -> QuoteJudgement:
    """Judge a raw quote, trailing bytes included, at the verifier's own time `at` (aware)."""
    checks = [_trust_anchor(policy, root), _root_dates(root, at), _tee_type(raw)]
    try:
        quote = parse_quote(raw)
    except FormatError as error:
        checks.append(
            judge(
                "quote.format",
                "The quote is a TDX quote of version 4 or 5, with nothing behind it",
                holds=False,
                expected=f"{error.item}: {error.rule}",
                actual=error.actual or f"{len(raw)} bytes",
                anchor="the bytes themselves",
            )
        )
        return QuoteJudgement(
            check=group("quote", "The quote", checks),
            quote=None,
            authentic=False,
            anchor="no quote that could be read",
        )
    # What is verified, hashed and compared ends with the last signed or signing byte.
    stripped = raw[: len(raw) - quote.trailing_bytes]
    checks.append(_format(quote))
    claims, chain = _chain(stripped, collateral, root, at)
    anchor = (
        f"the quote's signatures, under {root.anchor.name}"
        if claims is not None
        else "the quote, whose signatures did NOT verify"
    )
    checks.append(chain)
    if collateral is not None:
        checks.append(_collateral_dates(collateral, at))
    checks.append(_agreement(stripped, quote, claims))
    checks += _tcb(policy, collateral, claims, root)
    checks.append(check_td(quote.body, policy, anchor))
    return QuoteJudgement(
        check=group("quote", "The quote", checks),
        quote=quote,
        authentic=claims is not None,
        anchor=anchor,
        tcb_status=None if claims is None else claims.tcb.status,
        advisory_ids=() if claims is None else claims.tcb.advisory_ids,
    )


def _trust_anchor(policy: Policy, root: TrustedRoot) -> Check:
    return judge(
        "quote.trust_anchor",
        "The root that decides is of the kind that the policy demands",
        holds=root.anchor.kind == policy.trust.root,
        expected=policy.trust.root,
        actual=f"{root.anchor.kind}: {root.anchor.name}",
        anchor="the caller",
        policy_rule="trust.root",
    )


def _root_dates(root: TrustedRoot, at: datetime) -> Check:
    return judge(
        "quote.root_dates",
        "The root's certificate is in date",
        holds=root.not_before <= at <= root.not_after,
        expected=f"{root.not_before.isoformat()} to {root.not_after.isoformat()}",
        actual=at.isoformat(),
        anchor="the verifier's clock",
    )


def _tee_type(raw: bytes) -> Check:
    tee_type = int.from_bytes(raw[_TEE_TYPE_AT : _TEE_TYPE_AT + 4], "little")
    return judge(
        "quote.tee_type",
        "The quote speaks of a TDX trust domain",
        holds=tee_type == TEE_TYPE_TDX,
        expected="0x81 (TDX)",
        actual=f"{tee_type:#x}" + (" (SGX)" if tee_type == 0 else ""),
        anchor="the bytes themselves",
    )


def _format(quote: Quote) -> Check:
    header = quote.header
    return judge(
        "quote.format",
        "The quote is a TDX quote of version 4 or 5, with nothing behind it",
        holds=True,  # `parse_quote` refuses everything else
        expected="version 4 or 5, ECDSA P-256, Intel's quoting enclave, only zeros behind",
        actual=f"version {header.version}, key type {header.attestation_key_type}, "
        f"vendor {header.qe_vendor_id.hex()}, {quote.trailing_bytes} zeros behind",
        anchor="the bytes themselves",
    )


def _chain(
    stripped: bytes, collateral: Collateral | None, root: TrustedRoot, at: datetime
) -> tuple[_Claims | None, Check]:
    id, title = "quote.chain", f"The quote is signed, link by link, under {root.anchor.name}"
    expected = "every certificate, revocation list and signature verifies (dcap-qvl)"
    if collateral is None:
        return None, unmade(
            id,
            title,
            why="no collateral was given, so nobody can say who signed this",
            actual="signatures not looked at",
            left_open=False,
        )
    now_s = int(at.timestamp())
    try:
        claims = msgspec.json.decode(
            dcap.verified_claims_json(stripped, collateral.qvl, root_der=root.der, now_s=now_s),
            type=_Claims,
        )
    except ValueError as error:  # msgspec's errors are ValueErrors too
        return None, judge(
            id,
            title,
            holds=False,
            expected=expected,
            actual=" ".join(str(error).split())[:400] or type(error).__name__,
            anchor=root.anchor.name,
        )
    key = bytes(claims.platform.root_key_id).hex()
    return claims, judge(
        id,
        title,
        holds=key == root.anchor.public_key_sha384,
        expected=f"{expected}; root key {root.anchor.public_key_sha384}",
        actual=f"verified; root key {key}",
        anchor=root.anchor.name,
    )


def _collateral_dates(collateral: Collateral, at: datetime) -> Check:
    return group(
        "quote.collateral_dates",
        "The collateral is in date",
        [
            judge(
                "quote.collateral_dates.document",
                f"The {validity.document} is in date",
                holds=validity.not_before <= at <= validity.not_after,
                expected=f"{validity.not_before.isoformat()} to {validity.not_after.isoformat()}",
                actual=at.isoformat(),
                anchor="the verifier's clock",
            )
            for validity in collateral.validities
        ],
    )


def _agreement(stripped: bytes, quote: Quote, claims: _Claims | None) -> Check:
    differing = disagreements(stripped, quote, None if claims is None else claims.report)
    return judge(
        "quote.agreement",
        "Two independent parsers read the same from the quote",
        holds=not differing,
        expected="every field alike, in this verifier and in dcap-qvl",
        actual="; ".join(differing)[:400] or "every field alike",
        anchor="the bytes themselves",
    )


def _tcb(
    policy: Policy, collateral: Collateral | None, claims: _Claims | None, root: TrustedRoot
) -> list[Check]:
    if claims is None or collateral is None:
        return [
            unmade(
                "quote.tcb",
                "Hardware and firmware of the platform are up to date",
                why="the quote's signatures did not verify, so nothing is known of its platform",
                actual="unknown",
                left_open=False,
            )
        ]
    anchor = f"TCB info signed under {root.anchor.name}"
    pce_id = bytes(claims.platform.pck.pce_id).hex()
    return [
        judge(
            "quote.tcb_status",
            "Hardware and firmware of the platform are as current as the policy demands",
            holds=claims.tcb.status in policy.tcb.accept_status,
            expected=" or ".join(policy.tcb.accept_status),
            actual=claims.tcb.status,
            anchor=anchor,
            policy_rule="tcb.accept_status",
        ),
        _advisories(policy, claims, anchor),
        _evaluation_number(policy, claims, anchor),
        judge(
            "quote.pce_id",
            "The TCB info is for the platform's own certification enclave",
            holds=pce_id == collateral.pce_id,
            expected=collateral.pce_id,
            actual=pce_id,
            anchor=anchor,
        ),
    ]


def _advisories(policy: Policy, claims: _Claims, anchor: str) -> Check:
    id, title = "quote.advisories", "No known weakness applies that the policy does not accept"
    actual = ", ".join(claims.tcb.advisory_ids) or "none"
    accepted = policy.tcb.accept_advisories
    if isinstance(accepted, str):
        return unmade(
            id,
            title,
            why='the policy says "unpinned"',
            actual=actual,
            left_open=True,
            policy_rule="tcb.accept_advisories",
        )
    return judge(
        id,
        title,
        holds=set(claims.tcb.advisory_ids) <= set(accepted),
        expected="at most " + ", ".join(accepted) if accepted else "none",
        actual=actual,
        anchor=anchor,
        policy_rule="tcb.accept_advisories",
    )


def _evaluation_number(policy: Policy, claims: _Claims, anchor: str) -> Check:
    id = "quote.tcb_evaluation_number"
    title = "The platform was judged by no older set of known weaknesses than demanded"
    minimum = policy.tcb.minimum_evaluation_number
    # TCB info and QE identity each have one; the older set is the one that hides something.
    actual = min(claims.tcb.eval_data_number, claims.qe.tcb_eval_data_number)
    if isinstance(minimum, str):
        return unmade(
            id,
            title,
            why='the policy says "unpinned"',
            actual=str(actual),
            left_open=True,
            policy_rule="tcb.minimum_evaluation_number",
        )
    return judge(
        id,
        title,
        holds=actual >= minimum,
        expected=f"at least {minimum}",
        actual=str(actual),
        anchor=anchor,
        policy_rule="tcb.minimum_evaluation_number",
    )
