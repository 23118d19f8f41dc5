"""The verdict for programs: one JSON object whose shape is stable."""

from __future__ import annotations

import json

import msgspec

from verifier.headline import headline, to_believe
from verifier.verdict import Verdict

VERDICT_FORMAT = "acon-verdict-v1"


def to_object(verdict: Verdict) -> dict[str, object]:
    """Fields: format, ok, headline, simulation, judged_at, trust_anchor, failures (ids),
    remains_to_be_believed (ids), checks (the tree), facts. Bytes are base64."""
    return {
        "format": VERDICT_FORMAT,
        "ok": verdict.ok,
        "headline": headline(verdict),
        "simulation": verdict.trust_anchor.kind != "intel",
        "judged_at": verdict.judged_at,
        "trust_anchor": msgspec.to_builtins(verdict.trust_anchor),
        "failures": [leaf.id for leaf in verdict.failures],
        "remains_to_be_believed": [leaf.id for leaf in to_believe(verdict)],
        "checks": msgspec.to_builtins(verdict.checks),
        "facts": msgspec.to_builtins(verdict.facts),
    }


def render_json(verdict: Verdict) -> str:
    """Indented JSON in ASCII, so that no text of the evidence reaches a terminal as it is."""
    return json.dumps(to_object(verdict), indent=2, ensure_ascii=True) + "\n"
