"""What runs at the relying party: evidence -> verdict. A library: no I/O, no clock, no network."""

from verifier.headline import headline
from verifier.policy import ImageEntry, Policy, parse_policy
from verifier.policy_init import policy_from_evidence
from verifier.report_json import render_json
from verifier.report_text import render_text
from verifier.verdict import Check, Outcome, TrustAnchor, Verdict
from verifier.verify import verify

__all__ = [
    "Check",
    "ImageEntry",
    "Outcome",
    "Policy",
    "TrustAnchor",
    "Verdict",
    "headline",
    "parse_policy",
    "policy_from_evidence",
    "render_json",
    "render_text",
    "verify",
]
