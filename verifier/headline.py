"""The one sentence that a hurried reader takes away. It never claims more than was checked."""

from __future__ import annotations

from collections.abc import Iterable

from verifier.verdict import Check, Verdict

# What may stay unchecked, as the policy asked, without weakening "nothing else runs".
# Everything that is not in this list weakens it.
_HARMLESS_WHEN_OPEN = frozenset(
    {
        "boot_log",
        "images.certificate_dates",
        "quote.td.attributes_pin",
        "quote.td.mr_seam",
        "quote.td.xfam_pin",
        "quote.tcb_evaluation_number",
        "base.mr_config_id",
        "base.mr_owner",
        "base.mr_owner_config",
        "request.key",
        "request.user_data",
        "speaker.image",
    }
)
SIMULATION = "SIMULATION, NOT HARDWARE: "


def to_believe(verdict: Verdict) -> tuple[Check, ...]:
    """What the policy left unchecked and "nothing else runs" rests on."""
    return tuple(
        leaf for leaf in verdict.unchecked if leaf.left_open and leaf.id not in _HARMLESS_WHEN_OPEN
    )


def headline(verdict: Verdict) -> str:
    """One paragraph of plain words."""
    prefix = "" if verdict.trust_anchor.kind == "intel" else SIMULATION
    return prefix + (_passed(verdict) if verdict.ok else _failed(verdict))


def _failed(verdict: Verdict) -> str:
    failures = verdict.failures
    unmade = [leaf for leaf in verdict.unchecked if not leaf.left_open]
    if not verdict.facts.authentic:
        ground = "Nobody vouches for anything in this evidence: the quote's signatures "
        ground += "do not verify. " if _chain_failed(failures) else "were not checked. "
    else:
        ground = ""
    if failures:
        number = "One check" if len(failures) == 1 else f"{len(failures)} checks, among them one"
        first = f'{number} failed. This does not hold: "{failures[0].title}" ({failures[0].id}).'
    else:
        first = f'Not checked, though needed: "{unmade[0].title}" ({unmade[0].id}).'
    return f"FAILED. {ground}{first} Send it nothing."


def _chain_failed(failures: Iterable[Check]) -> bool:
    return any(leaf.id in ("quote.chain", "quote.format") for leaf in failures)


def _passed(verdict: Verdict) -> str:
    count = len(verdict.facts.images)
    programs = "1 program" if count == 1 else f"{count} programs"
    believed = to_believe(verdict)
    if not believed:
        return (
            f"PASSED. Exactly the {programs} listed below can run in this trust domain, "
            "and nothing else."
        )
    what = "; ".join(dict.fromkeys(leaf.id for leaf in believed))
    return (
        f"PASSED as far as the policy asks. The log lists {programs}. Whether nothing else runs "
        f"remains to be believed, because the policy leaves unchecked: {what}."
    )
