"""Is this TD one that keeps its secrets? Attributes bit by bit, XFAM, module, service TD."""

from __future__ import annotations

from supervisor.formats.td_body import TdBody
from verifier.pinning import pinned
from verifier.policy import Policy
from verifier.td_bits import attribute_names, attribute_problems, xfam_problems
from verifier.verdict import Check, equal, group, judge


def check_td(body: TdBody, policy: Policy, anchor: str) -> Check:
    """What dcap-qvl leaves to its caller about the TD itself."""
    return group(
        "quote.td",
        "The trust domain's own settings",
        [
            judge(
                "quote.td.attributes",
                "No debugging, no migration, no profiling by the host",
                holds=not (problems := attribute_problems(body.td_attributes)),
                expected="SEPT_VE_DISABLE set; besides it only LASS, PKS, KL, PERFMON",
                actual="; ".join(problems) or attribute_names(body.td_attributes),
                anchor=anchor,
            ),
            pinned(
                "quote.td.attributes_pin",
                "The TD's attributes are those expected",
                actual=body.td_attributes.hex(),
                expected=policy.td.attributes,
                anchor=anchor,
                policy_rule="td.attributes",
            ),
            judge(
                "quote.td.xfam",
                "The TD's processor features are within TDX' bounds",
                holds=not (problems := xfam_problems(body.xfam)),
                expected="contains 0x3, nothing outside 0x6dbe7",
                actual="; ".join(problems) or f"{int.from_bytes(body.xfam, 'little'):#x}",
                anchor=anchor,
            ),
            pinned(
                "quote.td.xfam_pin",
                "The TD's processor features are those expected",
                actual=body.xfam.hex(),
                expected=policy.td.xfam,
                anchor=anchor,
                policy_rule="td.xfam",
            ),
            pinned(
                "quote.td.mr_seam",
                "The TDX module is the one expected",
                actual=body.mr_seam.hex(),
                expected=policy.td.mr_seam,
                anchor=anchor,
                policy_rule="td.mr_seam",
            ),
            equal(
                "quote.td.mr_signer_seam",
                "The TDX module's signer is the one expected (zeros: Intel)",
                actual=body.mr_signer_seam.hex(),
                expected=policy.td.mr_signer_seam,
                anchor=anchor,
                policy_rule="td.mr_signer_seam",
            ),
            _service_td(body, anchor),
            _running_module(body, anchor),
        ],
    )


def _service_td(body: TdBody, anchor: str) -> Check:
    bound = {"MRSERVICETD": body.mr_service_td}
    if body.extended is not None:
        bound["INIT_SERVTD_HASH"] = body.extended.init_servtd_hash
        bound["CUR_SERVTD_HASH"] = body.extended.current_servtd_hash
    present = {name: value for name, value in bound.items() if value is not None and any(value)}
    return judge(
        "quote.td.service_td",
        "No service TD can act on this TD",
        holds=not present,
        expected="zero, or no such field (TD 1.0)",
        actual=", ".join(f"{name} {value.hex()}" for name, value in present.items())
        or ("no such field" if body.mr_service_td is None else "zero"),
        anchor=anchor,
    )


def _running_module(body: TdBody, anchor: str) -> Check:
    launched, running = body.tee_tcb_svn, body.tee_tcb_svn2
    holds = running is None or all(now >= then for now, then in zip(running, launched, strict=True))
    return judge(
        "quote.td.running_module_svn",
        "The TDX module that runs now is no older than the one that launched the TD",
        holds=holds,
        expected=f"every component at least that of {launched.hex()}",
        actual="no such field (TD 1.0)" if running is None else running.hex(),
        anchor=anchor,
    )
