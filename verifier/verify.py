"""Evidence in, verdict out. No I/O, no clock, no network: the caller hands over everything.

1. Read the evidence file; what cannot be read at all is a `FormatError`, no verdict.
2. Judge the quote: from here on a field of the TD is believed as far as the quote is.
3. The request: the quote's REPORTDATA must bind it, and it the caller's nonce.
4. The log must replay to the quote's register; then its order is judged.
5. Images, starts, delegations, supervisor and status are recomputed from the signed
   manifests and compared with what the log says.
6. The facts are built from the very objects that were judged.
"""

from __future__ import annotations

from datetime import datetime

from supervisor.formats.base64_text import from_base64
from supervisor.formats.errors import FormatError
from supervisor.formats.evidence import Evidence, decode_evidence
from supervisor.formats.status import decode_status
from supervisor.formats.td_body import TdBody
from verifier.base_check import check_base, check_boot_log
from verifier.collateral import read_collateral
from verifier.delegations_check import check_delegations
from verifier.fact_finding import bare_facts, find_facts
from verifier.images import read_images
from verifier.images_check import check_images
from verifier.log_check import check_log, check_order
from verifier.log_reading import SupervisorLog, read_log
from verifier.policy import Policy
from verifier.policy_rules import allows_sha256
from verifier.quote_check import QuoteJudgement, check_quote
from verifier.request_check import Expectations, check_binding, check_speaker
from verifier.starts_check import check_starts
from verifier.status_check import check_status
from verifier.supervisor_check import check_supervisor
from verifier.trust import TrustedRoot, read_root
from verifier.verdict import Check, Verdict, group, judge, unmade


def verify(
    evidence_bytes: bytes,
    policy: Policy,
    *,
    nonce: bytes,
    collateral: str | None,
    at: datetime,
    trusted_root_pem: bytes | None = None,
    expected_container_key_sha384: str | None = None,
    expected_user_data: bytes | None = None,
    expected_container_image_id: str | None = None,
) -> Verdict:
    """Judge one evidence file.

    `nonce` is what the caller asked with (16 to 64 bytes). `collateral` is the JSON of
    `QuoteCollateralV3`; without it nothing can be believed and the verdict does not pass.
    `at` is the verifier's own time (aware): certificates, revocation lists and TCB info are
    judged at it. `trusted_root_pem` is the root to verify under, None for Intel's; any other
    makes the verdict a SIMULATION. Expectations of the asking container (its key's SHA-384
    in lower-case hex, its user data, its image) fail when the evidence says nothing of them.

    Raises `FormatError` for evidence, collateral, root or nonce that cannot be read, and
    `ValueError` for a time without zone or before 1970. Wrong content never raises.
    """
    if at.tzinfo is None or at.timestamp() < 0:
        raise ValueError("the time of the verdict must say its zone and be later than 1970")
    expected = Expectations(
        nonce=nonce,
        container_key_sha384=expected_container_key_sha384,
        user_data=expected_user_data,
        container_image_id=expected_container_image_id,
    )
    root = read_root(trusted_root_pem)
    readable_collateral = None if collateral is None else read_collateral(collateral)
    evidence = decode_evidence(evidence_bytes)
    judgement = check_quote(
        from_base64(evidence.quote, item="evidence.quote"),
        policy,
        collateral=readable_collateral,
        root=root,
        at=at,
    )
    if judgement.body is None:
        return _bare(evidence, judgement, root, at, [judgement.check, _not_reached("evidence")])
    body = judgement.body
    checks = [
        judgement.check,
        check_binding(evidence, body.report_data, expected, judgement.anchor),
        check_base(body, policy, judgement.anchor),
    ]
    try:
        log = read_log(
            from_base64(evidence.cc_eventlog, item="evidence.cc_eventlog"),
            rtmr_index=evidence.rtmr_index,
        )
    except FormatError as error:
        return _bare(
            evidence,
            judgement,
            root,
            at,
            [*checks, _unreadable_log(error), _not_reached("contents")],
        )
    return _whole(evidence, judgement, body, log, policy, expected, root, at, checks)


def _whole(
    evidence: Evidence,
    judgement: QuoteJudgement,
    body: TdBody,
    log: SupervisorLog,
    policy: Policy,
    expected: Expectations,
    root: TrustedRoot,
    at: datetime,
    checks: list[Check],
) -> Verdict:
    images = read_images(evidence.images, allow_sha256=allows_sha256(policy))
    status = decode_status(evidence.status.encode())
    checks += [
        check_boot_log(
            log.boot_events,
            body,
            rtmr_index=evidence.rtmr_index,
            at_start=log.at_start,
            anchor=judgement.anchor,
        ),
        check_log(log, body, policy, rtmr_index=evidence.rtmr_index, anchor=judgement.anchor),
        check_order(log, images),
        check_supervisor(log, evidence.config, policy),
        check_images(log, images, policy, at),
        check_starts(log, images),
        check_delegations(log, images, policy),
        check_status(status, log, images),
        check_speaker(evidence, expected, policy, log, images, status),
    ]
    return Verdict(
        judged_at=at.isoformat(),
        trust_anchor=root.anchor,
        checks=tuple(checks),
        facts=find_facts(evidence, judgement, log, images, status),
    )


def _bare(
    evidence: Evidence,
    judgement: QuoteJudgement,
    root: TrustedRoot,
    at: datetime,
    checks: list[Check],
) -> Verdict:
    return Verdict(
        judged_at=at.isoformat(),
        trust_anchor=root.anchor,
        checks=tuple(checks),
        facts=bare_facts(evidence, judgement),
    )


def _unreadable_log(error: FormatError) -> Check:
    return group(
        "log",
        "The supervisor's log",
        [
            judge(
                "log.format",
                "The log can be read, and its digests are those of its records",
                holds=False,
                expected=f"{error.item}: {error.rule}"
                + (f" ({error.expected})" if error.expected else ""),
                actual=error.actual or "not so",
                anchor="the log's own bytes",
            )
        ],
    )


def _not_reached(what: str) -> Check:
    return unmade(
        what,
        "Everything that the checks above are the ground of",
        why="what comes first could not be read",
        actual="not looked at",
        left_open=False,
    )
