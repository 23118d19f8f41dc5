"""What a whole verdict says, of honest evidence and of policies that leave things open."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Sequence

import evidence_factory as factory
import msgspec
import pytest
from evidence_factory import AT, NONCE, Built, Scenario
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.tdx_sim.pki import SimPki
from supervisor.formats.delegation import AliasStatement, ResolvedLayer, resolve_layers
from supervisor.formats.errors import FormatError
from supervisor.formats.evidence import Evidence
from supervisor.formats.log_events import StartContainerEvent
from supervisor.formats.references import LayerReference
from supervisor.formats.td_body import TdBodyExtension
from verifier import (
    ImageEntry,
    Outcome,
    Policy,
    Verdict,
    headline,
    parse_policy,
    policy_from_evidence,
    starts_check,
    verify,
)
from verifier.headline import to_believe

replace = msgspec.structs.replace


def judge(built: Built, policy: Policy, **changes: object) -> Verdict:
    arguments: dict[str, object] = {
        "nonce": NONCE,
        "collateral": built.collateral,
        "at": AT,
        "trusted_root_pem": built.root_pem,
        **changes,
    }
    return verify(built.evidence, policy, **arguments)  # type: ignore[arg-type]  # any of them


def judged(scenario: Scenario, pki: SimPki, policy: Policy, **changes: object) -> Verdict:
    return judge(factory.build(scenario, pki), policy, **changes)


def failing(verdict: Verdict) -> set[str]:
    return {leaf.id for leaf in verdict.failures}


# --- honest evidence ------------------------------------------------------------------------


@pytest.mark.parametrize("version", [4, 5])
def test_honest_evidence_passes_with_nothing_left_open(
    version: int, pki: SimPki, policy: Policy
) -> None:
    scenario = factory.honest()
    scenario.quote_version = version
    verdict = judged(scenario, pki, policy)
    assert verdict.ok
    assert not verdict.failures
    assert not verdict.unchecked
    assert "Exactly the 2 programs" in headline(verdict)
    assert "nothing else" in headline(verdict)


def test_a_root_that_is_not_intels_is_called_a_simulation(pki: SimPki, policy: Policy) -> None:
    verdict = judged(factory.honest(), pki, policy)
    assert verdict.trust_anchor.kind == "simulated"
    assert headline(verdict).startswith("SIMULATION, NOT HARDWARE: ")


def test_the_simulator_fails_under_intels_root_alone(pki: SimPki, policy: Policy) -> None:
    intel = replace(policy, trust=replace(policy.trust, root="intel"))
    verdict = judged(factory.honest(), pki, intel, trusted_root_pem=None)
    assert failing(verdict) == {"quote.chain"}
    assert not verdict.facts.authentic
    assert "Nobody vouches" in headline(verdict)


def test_another_simulators_root_does_not_verify_this_ones_quote(
    pki: SimPki, other_pki: SimPki, policy: Policy
) -> None:
    verdict = judged(factory.honest(), pki, policy, trusted_root_pem=other_pki.root.pem)
    assert failing(verdict) == {"quote.chain"}


def test_another_platforms_collateral_does_not_verify_this_ones_quote(
    pki: SimPki, other_pki: SimPki, policy: Policy
) -> None:
    foreign = factory.build(factory.honest(), other_pki).collateral
    assert failing(judged(factory.honest(), pki, policy, collateral=foreign)) == {"quote.chain"}


def test_without_collateral_nothing_fails_and_nothing_passes(pki: SimPki, policy: Policy) -> None:
    verdict = judged(factory.honest(), pki, policy, collateral=None)
    assert not verdict.failures
    assert {leaf.id for leaf in verdict.unchecked} == {"quote.chain", "quote.tcb"}
    assert not verdict.ok
    assert not verdict.facts.authentic
    assert headline(verdict).startswith("SIMULATION, NOT HARDWARE: FAILED")


def test_the_facts_are_the_logs_in_its_order(pki: SimPki, policy: Policy) -> None:
    facts = judged(factory.honest(), pki, policy).facts
    assert [image.names for image in facts.images] == [("gateway:1",), ("model:1",)]
    assert [image.signer_subject for image in facts.images] == ["CN=alice", "CN=bob"]
    assert [image.names for image in facts.layer_only_images] == [("python:2", "python:3")]
    assert [start.container_ids for start in facts.starts] == [(1,), (2,)]
    hop = facts.starts[1].layers[0].delegation[0]
    assert (hop.alias, hop.svn, hop.signer) == ("python:3", 3, factory.signer_id("csp"))
    assert facts.starts[1].layers[0].digest == factory.PYTHON_3
    assert facts.sealed
    assert facts.tcb_status == "UpToDate"
    assert [c.name for c in facts.supervisors[0].components] == [
        "supervisor",
        "tdx_sim",
        "image_store",
    ]


def test_a_vendors_update_passes_under_the_policy_that_followed_the_vendor(pki: SimPki) -> None:
    before = factory.honest()
    before.images[0] = factory.lender("csp", factory.PYTHON_2, "python:2")
    factory.rewrite_log(before)
    policy = parse_policy(
        policy_from_evidence(factory.build(before, pki).evidence, follow_vendors=True)
    )
    after = judged(factory.honest(), pki, policy)
    assert after.ok
    assert after.facts.starts[1].layers[0].delegation[0].svn == 3


def test_one_quote_answers_several_requests(pki: SimPki, policy: Policy) -> None:
    scenario = factory.honest()
    scenario.other_requests = 5
    assert judged(scenario, pki, policy).ok


def test_a_log_in_the_other_register_passes_where_the_policy_says_so(pki: SimPki) -> None:
    scenario = factory.honest()
    scenario.rtmr_index = 2
    scenario.has_boot_log = False  # firmware's events in RTMR2 could not be told from ours
    scenario.register_before = factory.booted(scenario.base_image)[2]
    factory.rewrite_log(scenario)
    text = policy_from_evidence(factory.build(scenario, pki).evidence)
    policy = parse_policy(text)
    assert policy.log.register_index == 2
    assert judged(scenario, pki, policy).ok
    # What the kernel measured before the supervisor is pinned through the register's start.
    other = replace(policy, log=replace(policy.log, register_at_start="ab" * 48))
    assert failing(judged(scenario, pki, other)) == {"log.register_at_start"}
    # A register that nobody accounts for must be zero.
    scenario.body = {"rtmrs": lambda rtmrs: (*rtmrs[:3], b"\1" * 48)}
    assert failing(judged(scenario, pki, policy)) == {"base.rtmr3"}
    # A policy that names no register expects RTMR3.
    strict = parse_policy(text.replace("register_index = 2", "register_index = 3"))
    scenario.body = {}
    assert "log.register" in failing(judged(scenario, pki, strict))


def test_a_missing_boot_log_is_said_and_weakens_nothing(pki: SimPki, policy: Policy) -> None:
    scenario = factory.honest()
    scenario.has_boot_log = False
    verdict = judged(scenario, pki, policy)
    assert verdict.ok
    assert [leaf.id for leaf in verdict.unchecked] == ["boot_log"]
    assert "and nothing else." in headline(verdict)


def test_images_whose_manifests_are_missing_leave_the_launch_policy_unchecked(
    pki: SimPki, policy: Policy
) -> None:
    scenario = factory.honest()
    scenario.ship = lambda evidence: replace(evidence, images=evidence.images[:2])
    verdict = judged(scenario, pki, policy)
    groups = verdict.find("images.launch_policy.group")
    assert [check.outcome for check in groups] == [Outcome.PASS, Outcome.NOT_CHECKED]
    assert not verdict.ok


def test_an_extended_body_passes_and_its_service_td_is_refused(pki: SimPki, policy: Policy) -> None:
    scenario = factory.honest()
    scenario.quote_version = 5
    extension = TdBodyExtension(
        vm_id=0,
        td_id=b"\1" * 32,
        dev_info=b"\2" * 48,
        init_servtd_hash=bytes(48),
        init_servtd_attributes=bytes(8),
        init_cpu_svn=b"\3" * 16,
        init_tee_tcb_svn=b"\4" * 16,
        init_tee_fmspc=b"\5" * 12,
        current_servtd_hash=bytes(48),
        current_servtd_attributes=bytes(8),
    )
    scenario.body = {"extended": extension}
    assert judged(scenario, pki, policy).ok
    for name in ("init_servtd_hash", "current_servtd_hash"):
        scenario.body = {"extended": replace(extension, **{name: b"\1" * 48})}
        assert "quote.td.service_td" in failing(judged(scenario, pki, policy))


def test_an_unknown_event_that_does_not_matter_is_shown_and_passed_over(
    pki: SimPki, policy: Policy
) -> None:
    scenario = factory.honest()
    scenario.events.insert(1, ("Weather", b'{"critical":false,"sky":"blue"}'))
    verdict = judged(scenario, pki, policy)
    assert verdict.ok
    assert [(e.operation, e.critical) for e in verdict.facts.unknown_events] == [("Weather", False)]


def test_a_restart_of_the_same_supervisor_passes(pki: SimPki, policy: Policy) -> None:
    scenario = factory.honest()
    scenario.events.append(scenario.start())
    assert judged(scenario, pki, policy).ok


# --- owners who tolerate strangers ----------------------------------------------------------


def tolerant(*names: tuple[str, str]) -> Scenario:
    scenario = factory.honest()
    scenario.images = [
        factory.python_3(),
        *(factory.program(owner, name, reject=False) for owner, name in names),
    ]
    factory.rewrite_log(scenario)
    return scenario


def test_an_image_side_loaded_among_the_tolerant_is_admitted_and_named(pki: SimPki) -> None:
    expected = tolerant(("alice", "gateway"), ("bob", "model"))
    policy = parse_policy(policy_from_evidence(factory.build(expected, pki).evidence))
    loaded = tolerant(("alice", "gateway"), ("bob", "model"), ("mallory", "spy"))
    verdict = judged(loaded, pki, policy)
    assert failing(verdict) == {"images.unexpected"}
    assert "spy:1" in (verdict.failures[0].actual or "")


def test_a_policy_that_is_not_exact_shows_further_images_and_claims_less(pki: SimPki) -> None:
    expected = tolerant(("alice", "gateway"))
    text = policy_from_evidence(factory.build(expected, pki).evidence)
    policy = parse_policy(text.replace("exact = true", "exact = false"))
    verdict = judged(tolerant(("alice", "gateway"), ("mallory", "spy")), pki, policy)
    assert verdict.ok
    assert [leaf.id for leaf in to_believe(verdict)] == ["images.unexpected"]
    assert "and nothing else." not in headline(verdict)


def test_a_second_image_of_the_same_name_does_not_hide_behind_the_first(
    pki: SimPki, policy: Policy
) -> None:
    assert not isinstance(policy.images, str)
    entry = ImageEntry(signer=factory.signer_id("alice"), name="gateway", minimum_svn=1)
    by_name = replace(policy, images=replace(policy.images, executable=(entry,)))
    scenario = factory.honest()
    twin = factory.program("alice", "gateway", workingDir="/elsewhere")
    scenario.images = [factory.python_3(), factory.gateway(), twin]
    factory.rewrite_log(scenario)
    assert failing(judged(scenario, pki, by_name)) == {"images.unexpected"}


def test_entries_by_name_and_by_id_share_the_images_out_among_themselves(
    pki: SimPki, policy: Policy
) -> None:
    assert not isinstance(policy.images, str)
    twin = factory.program("alice", "gateway", workingDir="/elsewhere")
    by_name = ImageEntry(signer=factory.signer_id("alice"), name="gateway", minimum_svn=0)
    by_id = ImageEntry(id=str(factory.gateway().image_id))
    scenario = factory.honest()
    scenario.images = [factory.python_3(), factory.gateway(), twin]
    factory.rewrite_log(scenario)
    shared = replace(policy, images=replace(policy.images, executable=(by_name, by_id)))
    assert judged(scenario, pki, shared).ok


def test_a_delegation_is_judged_before_the_program_is_ever_started(
    pki: SimPki, policy: Policy
) -> None:
    scenario = factory.honest()
    scenario.events = [e for e in scenario.events if type(e).__name__ != "StartContainerEvent"]
    scenario.status = factory.status_of(scenario)
    assert judged(scenario, pki, policy).ok
    none_accepted = replace(policy, delegations=())
    assert failing(judged(scenario, pki, none_accepted)) == {"delegations.possible"}


def test_a_sha256_image_needs_the_policys_express_permission(pki: SimPki) -> None:
    strong = factory.build(factory.honest(), pki)
    key, certificate = factory.signer("weak", sha256=True)
    scenario = factory.honest()

    def weaken(evidence: Evidence) -> Evidence:
        images = list(evidence.images)
        images[1] = replace(images[1], certificate=base64.b64encode(certificate).decode())
        return replace(evidence, images=tuple(images))

    scenario.ship = weaken
    assert key is not None
    policy = parse_policy(policy_from_evidence(strong.evidence))
    verdict = judged(scenario, pki, policy)
    assert failing(verdict) == {"images.signatures", "images.complete"}
    assert "sha256" in (verdict.failures[0].actual or "")


# --- what a policy leaves open --------------------------------------------------------------

UNPINNED = {
    "base.mr_td": lambda p: replace(p, base=replace(p.base, mr_td="unpinned")),
    "base.rtmr0": lambda p: replace(p, base=replace(p.base, rtmr0="unpinned")),
    "base.rtmr1": lambda p: replace(p, base=replace(p.base, rtmr1="unpinned")),
    "base.rtmr2": lambda p: replace(p, base=replace(p.base, rtmr2="unpinned")),
    "supervisor.component": lambda p: replace(p, supervisor="unpinned"),
    "supervisor.component_digest_sha384": lambda p: replace(
        p, supervisor=replace(p.supervisor, digest_sha384="unpinned")
    ),
    "supervisor.plugin": lambda p: replace(p, plugins="unpinned"),
    "supervisor.config": lambda p: replace(p, config=replace(p.config, digest_sha384="unpinned")),
    "images.expected": lambda p: replace(p, images="unpinned"),
    "delegations": lambda p: replace(p, delegations="unpinned"),
    "quote.advisories": lambda p: replace(p, tcb=replace(p.tcb, accept_advisories="unpinned")),
}


@pytest.mark.parametrize("id", UNPINNED)
def test_what_is_unpinned_is_said_and_the_headline_claims_less(
    id: str, pki: SimPki, policy: Policy
) -> None:
    verdict = judged(factory.honest(), pki, UNPINNED[id](policy))
    assert verdict.ok
    assert {leaf.id for leaf in to_believe(verdict)} == {id}
    assert id in headline(verdict)
    assert "and nothing else." not in headline(verdict)


def test_a_missing_seal_that_is_not_required_weakens_the_headline(
    pki: SimPki, policy: Policy
) -> None:
    scenario = factory.honest()
    scenario.events.pop()
    scenario.status = factory.status_of(scenario)
    verdict = judged(scenario, pki, replace(policy, log=replace(policy.log, seal_required=False)))
    assert verdict.ok
    assert [leaf.id for leaf in to_believe(verdict)] == ["log.sealed"]


def test_host_chosen_fields_left_open_do_not_weaken_the_headline(
    pki: SimPki, policy: Policy
) -> None:
    verdict = judged(
        factory.honest(), pki, replace(policy, base=replace(policy.base, mr_owner="unpinned"))
    )
    assert verdict.ok
    assert [leaf.id for leaf in verdict.unchecked] == ["base.mr_owner"]
    assert "and nothing else." in headline(verdict)


def test_ignored_certificate_dates_are_reported_as_not_checked(pki: SimPki, policy: Policy) -> None:
    ignored = replace(policy, certificates=replace(policy.certificates, dates="ignored"))
    verdict = judged(factory.honest(), pki, ignored)
    (check,) = verdict.find("images.certificate_dates")
    assert check.outcome is Outcome.NOT_CHECKED
    assert verdict.ok


def test_an_earlier_configuration_that_nobody_pinned_does_not_pass(
    pki: SimPki, policy: Policy
) -> None:
    scenario = factory.honest()
    first = scenario.events[0]
    scenario.config["plugin"] = {"image_store": {"limit": 7}}
    scenario.events.append(scenario.start())
    assert scenario.events[0] is first
    open_policy = replace(policy, config=replace(policy.config, digest_sha384="unpinned"))
    verdict = judged(scenario, pki, open_policy)
    assert not verdict.failures
    assert not verdict.ok
    assert "supervisor.earlier_config" in {leaf.id for leaf in verdict.unchecked}


# --- the container that speaks --------------------------------------------------------------


def speaking() -> Scenario:
    scenario = factory.honest()
    factory.speak_as(scenario, 1)
    scenario.public_key_sha384 = "aa" * 48
    return scenario


def test_a_containers_key_counts_only_with_the_image_it_must_come_from(
    pki: SimPki, policy: Policy
) -> None:
    built = factory.build(speaking(), pki)
    key = {"expected_container_key_sha384": "aa" * 48}
    unnamed = judge(built, policy, **key)
    assert not unnamed.ok
    assert not unnamed.failures
    assert {leaf.id for leaf in unnamed.unchecked} == {"speaker.image"}
    gateway = str(factory.gateway().image_id)
    assert judge(built, policy, **key, expected_container_image_id=gateway).ok
    entry = ImageEntry(signer=factory.signer_id("alice"), name="gateway", minimum_svn=1)
    assert judge(built, replace(policy, speaker=entry), **key).ok
    assert judge(built, replace(policy, speaker="unpinned"), **key).ok
    other = replace(entry, name="model")
    assert failing(judge(built, replace(policy, speaker=other), **key)) == {"speaker.image"}


def test_a_key_that_nobody_asked_about_is_shown_as_not_checked(pki: SimPki, policy: Policy) -> None:
    verdict = judged(speaking(), pki, policy)
    assert verdict.ok
    assert {leaf.id for leaf in verdict.unchecked} == {"request.key", "speaker.image"}
    assert verdict.facts.public_key_sha384 == "aa" * 48


def test_empty_user_data_is_not_the_same_as_none(pki: SimPki, policy: Policy) -> None:
    scenario = speaking()
    verdict = judged(scenario, pki, policy, expected_user_data=b"")
    assert "request.user_data" in failing(verdict)
    scenario.user_data = b""
    assert "request.user_data" not in failing(judged(scenario, pki, policy, expected_user_data=b""))


# --- input that cannot be read --------------------------------------------------------------


def test_unreadable_input_is_a_format_error(pki: SimPki, policy: Policy) -> None:
    built = factory.build(factory.honest(), pki)
    for broken in (b"", b"{}", b"\xff", built.evidence[:-1], b"[" * 100_000):
        with pytest.raises(FormatError):
            judge(dataclasses.replace(built, evidence=broken), policy)
    for change in (
        {"nonce": b"short"},
        {"nonce": bytes(65)},
        {"collateral": ""},
        {"collateral": "{}"},
        {"collateral": json.dumps(dict.fromkeys(json.loads(built.collateral or ""), "00"))},
        {"trusted_root_pem": b"no pem"},
        {"trusted_root_pem": pki.pck.pem},
        {"trusted_root_pem": pki.root.pem * 2},
    ):
        with pytest.raises(FormatError):
            judge(built, policy, **change)


def test_one_images_many_starts_are_resolved_once(
    pki: SimPki, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log holds a hundred thousand starts, manifests as many statements: not each by each."""
    calls: list[object] = []

    def counted(
        layers: Sequence[LayerReference], statements: Sequence[AliasStatement]
    ) -> tuple[ResolvedLayer, ...]:
        calls.append(layers)
        return resolve_layers(layers, statements)

    monkeypatch.setattr(starts_check, "resolve_layers", counted)
    scenario = factory.honest()
    starts = [event for event in scenario.events if isinstance(event, StartContainerEvent)]
    seal = scenario.events.pop()
    scenario.events += [*starts * 3, seal]
    verdict = judged(scenario, pki, policy)
    assert verdict.ok
    assert len(verdict.find("starts.container")) == 4 * len(starts)
    assert len(calls) == len(starts)


def test_a_time_without_a_zone_is_the_callers_mistake(pki: SimPki, policy: Policy) -> None:
    with pytest.raises(ValueError, match="zone"):
        judged(factory.honest(), pki, policy, at=AT.replace(tzinfo=None))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_altered_byte_changes_what_a_passing_verdict_says(data: st.DataObject) -> None:
    raw, policy, built = _mutable()
    at = data.draw(st.integers(0, len(raw) - 1))
    value = data.draw(st.integers(0, 255))
    altered = raw[:at] + bytes([value]) + raw[at + 1 :]
    try:
        verdict = judge(dataclasses.replace(built, evidence=altered), policy)
    except FormatError:
        return
    # What may change unnoticed is JSON's own space, and text of boot events that no digest
    # covers: neither is shown.
    if verdict.ok:
        assert verdict == judge(built, policy)


_STATE: list[tuple[bytes, Policy, Built]] = []


@pytest.fixture(autouse=True, scope="module")
def _built_once(pki: SimPki, policy: Policy) -> None:
    built = factory.build(factory.honest(), pki)
    _STATE[:] = [(built.evidence, policy, built)]


def _mutable() -> tuple[bytes, Policy, Built]:
    return _STATE[0]
