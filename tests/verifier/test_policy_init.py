"""The policy that accepts just what one piece of evidence shows."""

from __future__ import annotations

import evidence_factory as factory
import pytest
from evidence_factory import AT, NONCE, Scenario

from plugins.tdx_sim.pki import SimPki
from supervisor.formats.errors import FormatError
from verifier import Policy, Verdict, parse_policy, policy_from_evidence, verify


def judged(scenario: Scenario, pki: SimPki, policy: Policy) -> Verdict:
    built = factory.build(scenario, pki)
    return verify(
        built.evidence,
        policy,
        nonce=NONCE,
        collateral=built.collateral,
        at=AT,
        trusted_root_pem=built.root_pem,
    )


def written(scenario: Scenario, pki: SimPki, *, follow_vendors: bool = False) -> str:
    built = factory.build(scenario, pki)
    return policy_from_evidence(
        built.evidence, collateral=built.collateral, follow_vendors=follow_vendors
    )


@pytest.mark.parametrize("follow_vendors", [False, True])
def test_the_evidence_it_was_written_from_passes_wholly(follow_vendors: bool, pki: SimPki) -> None:
    text = written(factory.honest(), pki, follow_vendors=follow_vendors)
    verdict = judged(factory.honest(), pki, parse_policy(text))
    assert verdict.ok
    assert not verdict.unchecked


def test_it_says_that_nothing_was_verified_and_that_it_is_a_simulation(pki: SimPki) -> None:
    text = written(factory.honest(), pki)
    assert "NOTHING here was verified" in text
    assert 'root = "simulated"' in text
    assert "SIMULATION" in text


def test_it_warns_of_a_missing_seal_and_of_unsafe_settings(pki: SimPki) -> None:
    scenario = factory.honest()
    scenario.config["unsafe_allow_swap"] = True
    factory.rewrite_log(scenario)
    scenario.events.pop()
    scenario.status = factory.status_of(scenario)
    text = written(scenario, pki)
    assert text.count("WARNING") == 2
    policy = parse_policy(text)
    assert policy.config.allow_unsafe == ("unsafe_allow_swap",)
    assert not policy.log.seal_required
    assert judged(scenario, pki, policy).ok


def test_it_repeats_a_register_that_did_not_start_at_zero_with_a_warning(pki: SimPki) -> None:
    scenario = factory.honest()
    scenario.register_before = b"\x05" * 48
    factory.rewrite_log(scenario)
    text = written(scenario, pki)
    assert "BEFORE the supervisor" in text
    assert judged(scenario, pki, parse_policy(text)).ok


def test_a_vendor_that_is_not_followed_needs_a_new_policy_after_its_update(pki: SimPki) -> None:
    before = factory.honest()
    before.images[0] = factory.lender("csp", factory.PYTHON_2, "python:2")
    factory.rewrite_log(before)
    policy = parse_policy(written(before, pki))
    assert {leaf.id for leaf in judged(factory.honest(), pki, policy).failures} == {
        "images.expected.entry",
        "images.unexpected",
    }


def test_evidence_that_names_no_program_or_lacks_a_manifest_makes_no_policy(pki: SimPki) -> None:
    empty = factory.honest()
    empty.images = []
    factory.rewrite_log(empty)
    with pytest.raises(FormatError):
        written(empty, pki)
    lacking = factory.honest()
    full = factory.build(lacking, pki)
    assert full.evidence
    lacking.images.pop()
    with pytest.raises(FormatError):
        written(lacking, pki)
