"""The attack table: one thing altered, and the very check that must fire.

Each row names the checks that fail, and that no other does; `derived` are those that
cannot but fail with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta

import attack_moves as moves
import evidence_factory as factory
import msgspec
import pytest
from evidence_factory import NONCE, Scenario

from plugins.tdx_sim.firmware import BaseImage
from plugins.tdx_sim.pki import SimPki
from supervisor.formats.event_log import encode_record
from verifier import Policy, Verdict, parse_policy, verify

replace = msgspec.structs.replace


@dataclass(frozen=True, kw_only=True)
class Attack:
    """`fires` is the check that must fail, `derived` what fails with it, nothing else does."""

    name: str
    alter: Callable[[Scenario], None]
    fires: str
    derived: frozenset[str] = frozenset()
    expectations: Mapping[str, str | bytes] = field(default_factory=dict)
    policy_edit: tuple[str, str] | None = None


_KEY = {"expected_container_key_sha384": "aa" * 48}
_UNSIGNED = frozenset({"quote.chain", "quote.td.attributes_pin"})
_MINE = "expected_container_image_id"

ATTACKS = [
    # the request
    Attack(
        name="evidence replayed for another nonce",
        alter=moves.fields(nonce=NONCE[::-1]),
        fires="request.nonce",
    ),
    Attack(
        name="a proof from another tree",
        alter=moves.ship(moves.path_of_another_tree),
        fires="request.proof",
    ),
    Attack(
        name="another one's place in the tree",
        alter=moves.fields(
            other_requests=3, ship=lambda e: replace(e, proof=replace(e.proof, index=1))
        ),
        fires="request.proof",
    ),
    Attack(
        name="the nonce in the request altered",
        alter=moves.ship(
            lambda e: replace(e, request=replace(e.request, nonce=e.request.nonce[::-1]))
        ),
        fires="request.proof",
        derived=frozenset({"request.nonce"}),
    ),
    Attack(
        name="a quote made for another purpose",
        alter=moves.body(report_data=lambda data: data[:48] + b"another-format--"),
        fires="request.format_tag",
    ),
    Attack(
        name="the status altered", alter=moves.ship(moves.altered_status), fires="request.status"
    ),
    # the quote
    Attack(name="the quote of another TD", alter=moves.other_td, fires="log.replay"),
    Attack(
        name="a byte of the quote's signature altered",
        alter=moves.fields(ship_quote=lambda q: moves.flip(q, 640)),
        fires="quote.chain",
    ),
    Attack(
        name="a byte of MRTD altered in the quote",
        alter=moves.fields(ship_quote=lambda q: moves.flip(q, 48 + 136)),
        fires="quote.chain",
        derived=frozenset({"base.mr_td"}),
    ),
    Attack(
        name="bytes behind the quote",
        alter=moves.fields(ship_quote=lambda q: q + b"\1"),
        fires="quote.format",
    ),
    Attack(
        name="an SGX quote",
        alter=moves.fields(ship_quote=moves.sgx_quote),
        fires="quote.tee_type",
        derived=frozenset({"quote.format"}),
    ),
    Attack(
        name="a debug TD",
        alter=moves.attributes(0, 28),
        fires="quote.td.attributes",
        derived=_UNSIGNED,
    ),
    Attack(
        name="a TD that the host can profile",
        alter=moves.attributes(5, 28),
        fires="quote.td.attributes",
        derived=_UNSIGNED,
    ),
    Attack(
        name="a migratable TD",
        alter=moves.attributes(28, 29),
        fires="quote.td.attributes",
        derived=_UNSIGNED,
    ),
    Attack(
        name="a TD without SEPT_VE_DISABLE",
        alter=moves.attributes(30),
        fires="quote.td.attributes",
        derived=_UNSIGNED,
    ),
    Attack(
        name="a reserved attribute bit",
        alter=moves.attributes(28, 40),
        fires="quote.td.attributes",
        derived=_UNSIGNED,
    ),
    Attack(
        name="harmless attributes, but not those expected",
        alter=moves.attributes(28, 63),
        fires="quote.td.attributes_pin",
    ),
    Attack(
        name="XFAM out of bounds",
        alter=moves.body(xfam=(1 << 40 | 0xE7).to_bytes(8, "little")),
        fires="quote.td.xfam",
        derived=frozenset({"quote.td.xfam_pin"}),
    ),
    Attack(
        name="XFAM without SSE",
        alter=moves.body(xfam=(0xE5).to_bytes(8, "little")),
        fires="quote.td.xfam",
        derived=frozenset({"quote.td.xfam_pin"}),
    ),
    Attack(
        name="another TDX module", alter=moves.body(mr_seam=b"\7" * 48), fires="quote.td.mr_seam"
    ),
    Attack(
        name="a TDX module by another signer",
        alter=moves.body(mr_signer_seam=b"\7" * 48),
        fires="quote.td.mr_signer_seam",
        derived=frozenset({"quote.chain"}),
    ),
    Attack(
        name="a service TD",
        alter=moves.body(version=5, mr_service_td=b"\7" * 48),
        fires="quote.td.service_td",
        derived=frozenset({"quote.chain"}),
    ),
    Attack(
        name="a running TDX module older than the one that launched the TD",
        alter=moves.body(version=5, tee_tcb_svn2=lambda svn: bytes([3]) + svn[1:]),
        fires="quote.td.running_module_svn",
    ),
    Attack(
        name="an old TCB",
        alter=moves.fields(platform_status="OutOfDate"),
        fires="quote.tcb_status",
        derived=frozenset({"quote.advisories"}),
    ),
    Attack(
        name="a TCB that needs hardening",
        alter=moves.fields(platform_status="SWHardeningNeeded"),
        fires="quote.tcb_status",
        derived=frozenset({"quote.advisories"}),
    ),
    Attack(name="a revoked platform", alter=moves.fields(pck_revoked=True), fires="quote.chain"),
    Attack(
        name="expired collateral",
        alter=moves.fields(at=factory.AT + timedelta(days=31)),
        fires="quote.collateral_dates.document",
        derived=frozenset({"quote.chain"}),
    ),
    Attack(
        name="collateral from the future",
        alter=moves.fields(at=factory.AT - timedelta(days=1)),
        fires="quote.collateral_dates.document",
        derived=frozenset({"quote.chain"}),
    ),
    Attack(
        name="collateral of an older evaluation",
        alter=moves.fields(evaluation_number=17),
        fires="quote.tcb_evaluation_number",
    ),
    Attack(
        name="a digit of the TCB info altered",
        alter=moves.fields(
            collateral=lambda text: text.replace('\\"pcesvn\\":11', '\\"pcesvn\\":10')
        ),
        fires="quote.chain",
    ),
    Attack(
        name="a simulated quote where the policy demands Intel's root",
        alter=moves.honest,
        policy_edit=('root = "simulated"', 'root = "intel"'),
        fires="quote.trust_anchor",
    ),
    # firmware, kernel, boot
    Attack(
        name="other firmware",
        alter=moves.body(mr_td=b"\7" * 48),
        fires="base.mr_td",
    ),
    Attack(
        name="another kernel",
        alter=moves.fields(base_image=BaseImage(kernel="SIMULATION: kernel, version 0")),
        fires="base.rtmr1",
    ),
    Attack(
        name="a command line that lets the operator log in",
        alter=moves.fields(base_image=BaseImage(command_line="console=hvc0 init=/bin/sh")),
        fires="base.rtmr2",
    ),
    Attack(
        name="a boot log that is not the registers'",
        alter=moves.body(rtmrs=lambda rtmrs: (b"\7" * 48, *rtmrs[1:])),
        fires="boot_log.rtmr0",
        derived=frozenset({"base.rtmr0"}),
    ),
    Attack(
        name="a boot event that says secure boot was on",
        alter=moves.ship(moves.secure_boot_claimed),
        fires="boot_log.texts",
    ),
    Attack(
        name="another MRCONFIGID",
        alter=moves.body(mr_config_id=bytes(48)),
        fires="base.mr_config_id",
    ),
    Attack(name="another MROWNER", alter=moves.body(mr_owner=bytes(48)), fires="base.mr_owner"),
    # the log
    Attack(
        name="the seal dropped from the log",
        alter=moves.shipped(lambda records: records[:-1]),
        fires="log.replay",
        derived=frozenset({"log.sealed", "status.sealed"}),
    ),
    Attack(
        name="a start dropped from the log",
        alter=moves.shipped(lambda records: records[:3] + records[4:]),
        fires="log.replay",
        derived=frozenset({"status.containers"}),
    ),
    Attack(
        name="two starts swapped in the log",
        alter=moves.shipped(lambda r: [*r[:3], r[4], r[3], *r[5:]]),
        fires="log.replay",
    ),
    Attack(
        name="a start twice in the log",
        alter=moves.shipped(lambda r: [*r[:4], r[3], *r[4:]]),
        fires="log.replay",
    ),
    Attack(
        name="a record put in",
        alter=moves.shipped(
            lambda r: [*r[:1], encode_record(3, "Note", b'{"critical":false}'), *r[1:]]
        ),
        fires="log.replay",
    ),
    Attack(
        name="a record's text altered, its digest kept",
        alter=moves.shipped(
            lambda r: [*r[:-1], replace(r[-1], raw=r[-1].raw.replace(b"critical", b"kritical"))]
        ),
        fires="log.format",
    ),
    Attack(
        name="a record of another register",
        alter=moves.shipped(lambda r: [*r[:-1], encode_record(2, r[-1].operation, r[-1].content)]),
        fires="log.format",
    ),
    Attack(
        name="evidence that names another register",
        alter=moves.ship(lambda e: replace(e, rtmr_index=2)),
        fires="log.format",
    ),
    Attack(
        name="an unknown event that matters",
        alter=moves.critical_stranger,
        fires="log.known_events",
    ),
    Attack(
        name="a register that did not start at zero",
        alter=moves.dirty_register,
        fires="log.register_at_start",
    ),
    Attack(
        name="a start before its image was admitted",
        alter=moves.start_before_admission,
        fires="order.start_before_admission",
    ),
    Attack(
        name="a start of an image without entry point",
        alter=moves.remeasured(moves.start_of_a_lender),
        fires="order.start_without_entry_point",
        derived=frozenset({"starts.arguments"}),
    ),
    Attack(
        name="an admission after the seal",
        alter=moves.sealed_too_early,
        fires="order.admission_after_seal",
    ),
    Attack(name="a second seal", alter=moves.sealed_twice, fires="order.second_seal"),
    Attack(
        name="something before the Start", alter=moves.late_first_start, fires="order.start_first"
    ),
    Attack(
        name="an image admitted twice",
        alter=moves.remeasured(moves.admitted_twice),
        fires="order.admitted_once",
    ),
    Attack(
        name="a restart that tells another beginning",
        alter=moves.restart_that_forgets_the_register,
        fires="order.register_at_start_once",
    ),
    Attack(name="not sealed", alter=moves.remeasured(moves.unsealed), fires="log.sealed"),
    Attack(name="a seal that leaves a door", alter=moves.open_seal, fires="log.open_delegations"),
    # supervisor, plugins, configuration
    Attack(
        name="a plugin more",
        alter=moves.components(moves.plugin_more),
        fires="supervisor.plugin_unexpected",
    ),
    Attack(
        name="a plugin more after a restart",
        alter=moves.restarted_with_a_plugin_more,
        fires="supervisor.plugin_unexpected",
    ),
    Attack(
        name="a plugin less", alter=moves.components(moves.plugin_less), fires="supervisor.plugin"
    ),
    Attack(name="a plugin's file changed", alter=moves.file_changed(1), fires="supervisor.plugin"),
    Attack(
        name="the supervisor's file changed",
        alter=moves.file_changed(0),
        fires="supervisor.component",
    ),
    Attack(
        name="an unsafe_ setting more",
        alter=moves.unsafe,
        fires="supervisor.unsafe_setting",
        derived=frozenset({"supervisor.config"}),
    ),
    Attack(name="another configuration", alter=moves.other_config, fires="supervisor.config"),
    Attack(
        name="a configuration shown that was not measured",
        alter=moves.ship(moves.unmeasured_config),
        fires="supervisor.config_digest",
    ),
    # images
    Attack(
        name="an image side-loaded among owners who reject it",
        alter=moves.remeasured(moves.side_loaded),
        fires="images.unexpected",
        derived=frozenset({"images.launch_policy.group"}),
    ),
    Attack(
        name="an image of the policy missing",
        alter=moves.one_program_only,
        fires="images.expected.entry",
    ),
    Attack(
        name="a byte of a manifest altered",
        alter=moves.ship(moves.manifest_byte),
        fires="images.signatures",
        derived=frozenset({"images.complete"}),
    ),
    Attack(
        name="another one's signature",
        alter=moves.ship(moves.foreign_signature),
        fires="images.signatures",
        derived=frozenset({"images.complete"}),
    ),
    Attack(
        name="a manifest left out", alter=moves.ship(moves.image_left_out), fires="images.complete"
    ),
    Attack(
        name="a manifest that was never admitted",
        alter=moves.ship(moves.image_put_in),
        fires="images.complete",
    ),
    Attack(
        name="a manifest twice", alter=moves.ship(moves.image_put_in_twice), fires="images.complete"
    ),
    Attack(
        name="a signer's certificate that has expired",
        alter=moves.expired_signer,
        fires="images.certificate_dates",
        derived=frozenset({"quote.chain", "quote.collateral_dates.document"}),
    ),
    # starts and delegations
    Attack(
        name="another layer than the manifest says",
        alter=moves.changed_start(0, layers=(factory.PYTHON_2,)),
        fires="starts.layers",
    ),
    Attack(
        name="another program",
        alter=moves.changed_start(0, argv=("/bin/sh",)),
        fires="starts.arguments",
    ),
    Attack(
        name="arguments split elsewhere",
        alter=moves.changed_start(0, argv=("/bin/gateway --serve",)),
        fires="starts.arguments",
    ),
    Attack(
        name="a variable that no rule allows",
        alter=moves.changed_start(0, environment=("LD_PRELOAD=/evil", "MODE=fast", "PORT=8080")),
        fires="starts.environment",
    ),
    Attack(
        name="a value that no rule allows",
        alter=moves.changed_start(0, environment=("MODE=slow", "PORT=8080")),
        fires="starts.environment",
    ),
    Attack(
        name="a variable unset that must be there",
        alter=moves.changed_start(0, environment=("PORT=8080",)),
        fires="starts.environment",
    ),
    Attack(
        name="a delegation claimed away",
        alter=moves.changed_start(1, delegations=()),
        fires="starts.delegations",
    ),
    Attack(
        name="a delegated layer below the policy's minimum",
        alter=moves.older_python,
        fires="delegations.used",
        derived=frozenset({"delegations.possible", "images.expected.entry", "images.unexpected"}),
    ),
    Attack(
        name="an alias signed by another key",
        alter=moves.remeasured(moves.foreign_alias),
        fires="starts.delegations",
        derived=frozenset({"starts.layers", "delegations.used", "images.unexpected"}),
    ),
    Attack(
        name="a version claimed that nobody stated",
        alter=moves.remeasured(moves.lying_svn),
        fires="starts.delegations",
    ),
    Attack(
        name="a layer whose statement came later",
        alter=moves.remeasured(moves.layer_of_the_future),
        fires="starts.layers",
        derived=frozenset({"starts.delegations", "images.unexpected"}),
    ),
    # status
    Attack(
        name="something runs that no log entry allows",
        alter=moves.unlogged_container,
        fires="status.containers",
    ),
    Attack(
        name="something runs under another image's permission",
        alter=moves.other_images_start,
        fires="status.containers",
    ),
    Attack(
        name="an image runs more often than it may",
        alter=moves.status_container,
        fires="status.instances",
    ),
    Attack(
        name="measurement has halted",
        alter=moves.status(measurement="halted: no answer"),
        fires="status.measurement",
    ),
    Attack(
        name="a seal only in the status",
        alter=moves.unsealed_but_claimed,
        fires="status.sealed",
        derived=frozenset({"log.sealed"}),
    ),
    # the container that speaks
    Attack(
        name="a proxy with a key of its own",
        alter=moves.speaks,
        expectations={"expected_container_key_sha384": "bb" * 48, _MINE: "gateway"},
        fires="request.key",
    ),
    Attack(
        name="a key expected of evidence that no container asked for",
        alter=moves.honest,
        expectations=_KEY,
        fires="speaker",
        derived=frozenset({"request.key"}),
    ),
    Attack(
        name="a co-tenant's evidence for its own key",
        alter=moves.speaks,
        expectations={**_KEY, _MINE: "model"},
        fires="speaker.image",
    ),
    Attack(
        name="other user data",
        alter=moves.speaks,
        expectations={"expected_user_data": b"hallo", _MINE: "gateway"},
        fires="request.user_data",
    ),
    Attack(
        name="a container that had ended",
        alter=moves.speaks_after_death,
        expectations={**_KEY, _MINE: "gateway"},
        fires="speaker.running",
    ),
    Attack(
        name="a container that the log never started",
        alter=moves.speaks_unstarted,
        expectations={**_KEY, _MINE: "gateway"},
        fires="speaker.started",
        derived=frozenset({"speaker.running"}),
    ),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name.replace(" ", "_"))
def test_an_attack_fires_its_check_and_no_other(
    attack: Attack, pki: SimPki, policy_text: str
) -> None:
    scenario = factory.honest()
    attack.alter(scenario)
    if attack.policy_edit is not None:
        before, after = attack.policy_edit
        assert before in policy_text
        policy_text = policy_text.replace(before, after)
    verdict = _judge(scenario, pki, parse_policy(policy_text), attack.expectations)
    assert {leaf.id for leaf in verdict.failures} == {attack.fires} | attack.derived
    assert not verdict.ok


def _judge(
    scenario: Scenario, pki: SimPki, policy: Policy, expectations: Mapping[str, str | bytes]
) -> Verdict:
    built = factory.build(scenario, pki)
    images = {"gateway": factory.gateway, "model": factory.model}
    arguments: dict[str, object] = dict(expectations)
    if _MINE in arguments:
        arguments[_MINE] = str(images[str(arguments[_MINE])]().image_id)
    return verify(
        built.evidence,
        policy,
        nonce=scenario.nonce,
        collateral=built.collateral,
        at=scenario.at,
        trusted_root_pem=built.root_pem,
        **arguments,  # type: ignore[arg-type]  # each attack its own
    )


def test_every_attack_has_a_name_of_its_own() -> None:
    names = [attack.name for attack in ATTACKS]
    assert len(set(names)) == len(names) >= 60
