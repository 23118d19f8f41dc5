"""The attack table: one thing altered, and the very check that must fire.

Each row names the checks that fail, and that no other does; `derived` are those that
cannot but fail with them.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta

import evidence_factory as factory
import msgspec
import pytest
from evidence_factory import NONCE, Scenario

from plugins.tdx_sim.firmware import BaseImage
from plugins.tdx_sim.pki import SimPki
from supervisor.formats.event_log import LogRecord, encode_record
from supervisor.formats.evidence import Evidence, EvidenceImage, Proof, RequestContainer, to_base64
from supervisor.formats.log_events import SealEvent, StartContainerEvent
from supervisor.formats.status import ContainerStatus
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


def _flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def _fields(**changes: object) -> Callable[[Scenario], None]:
    """Set fields of the scenario, keeping log and status."""

    def alter(scenario: Scenario) -> None:
        for name, value in changes.items():
            setattr(scenario, name, value)

    return alter


def _body(version: int = 4, **changes: object) -> Callable[[Scenario], None]:
    return _fields(body=changes, quote_version=version)


def _attributes(*bits: int) -> Callable[[Scenario], None]:
    return _body(td_attributes=sum(1 << bit for bit in bits).to_bytes(8, "little"))


def _status(**changes: object) -> Callable[[Scenario], None]:
    """The supervisor lies in its status, which is bound all the same."""

    def alter(scenario: Scenario) -> None:
        assert scenario.status is not None
        scenario.status = replace(scenario.status, **changes)

    return alter


def _shipped(change: Callable[[list[LogRecord]], list[LogRecord]]) -> Callable[[Scenario], None]:
    return _fields(shipped_records=change)


def _ship(change: Callable[[Evidence], Evidence]) -> Callable[[Scenario], None]:
    return _fields(ship=change)


def _events(change: Callable[[Scenario], None]) -> Callable[[Scenario], None]:
    """A supervisor that measured something else, with a status to match."""

    def alter(scenario: Scenario) -> None:
        change(scenario)
        scenario.status = factory.status_of(scenario)

    return alter


def _start_index(scenario: Scenario, which: int = 0) -> int:
    found = [i for i, one in enumerate(scenario.events) if isinstance(one, StartContainerEvent)]
    return found[which]


def _changed_start(which: int, **changes: object) -> Callable[[Scenario], None]:
    def change(scenario: Scenario) -> None:
        index = _start_index(scenario, which)
        event = scenario.events[index]
        assert isinstance(event, StartContainerEvent)
        scenario.events[index] = replace(event, **changes)

    return _events(change)


# --- alterations that need more than one line -----------------------------------------------


def _sgx_quote(quote: bytes) -> bytes:
    return quote[:4] + bytes(4) + quote[8:]


def _other_td(scenario: Scenario) -> None:
    """The quote of a fresh TD of the same base, which measured nothing."""
    scenario.body = {"rtmrs": lambda rtmrs: (*rtmrs[:3], bytes(48))}


def _path_of_another_tree(evidence: Evidence) -> Evidence:
    return replace(evidence, proof=Proof(index=0, size=2, path=("ab" * 48,)))


def _secure_boot_claimed(evidence: Evidence) -> Evidence:
    log = base64.b64decode(evidence.cc_eventlog)
    value_at = log.index("SecureBoot".encode("utf-16-le")) + 2 * len("SecureBoot")
    return replace(evidence, cc_eventlog=to_base64(_flip(log, value_at)))


def _altered_status(evidence: Evidence) -> Evidence:
    return replace(evidence, status=evidence.status.replace('"notes":[]', '"notes":["x"]'))


def _side_loaded(scenario: Scenario) -> None:
    """A sixth wheel: admitted before the seal, by a supervisor that did not ask the owners."""
    extra = factory.program("mallory", "spy", accepts=["sha512/*/*"])
    scenario.images.append(extra)
    scenario.events.insert(3, factory.admit(extra))


def _one_program_only(scenario: Scenario) -> None:
    scenario.images = [factory.python_3(), factory.gateway()]
    factory.rewrite_log(scenario)


def _status_container(scenario: Scenario, **changes: object) -> None:
    assert scenario.status is not None
    first = scenario.status.containers[0]
    stranger = replace(first, container_id=99, **changes)
    scenario.status = replace(scenario.status, containers=(*scenario.status.containers, stranger))


def _unlogged_container(scenario: Scenario) -> None:
    _status_container(scenario, start_event_digest_sha384="ab" * 48, state="exited", exit_code=0)


def _other_images_start(scenario: Scenario) -> None:
    _status_container(scenario, image_id=str(scenario.images[2].image_id), state="exited", signal=9)


def _unsealed(scenario: Scenario) -> None:
    scenario.events = [one for one in scenario.events if not isinstance(one, SealEvent)]


def _unsealed_but_claimed(scenario: Scenario) -> None:
    _unsealed(scenario)
    scenario.status = replace(factory.status_of(scenario), sealed=True)


def _critical_stranger(scenario: Scenario) -> None:
    scenario.events.insert(1, ("OpenBackDoor", b'{"critical":true}'))


def _dirty_register(scenario: Scenario) -> None:
    scenario.register_before = b"\x01" * 48
    factory.rewrite_log(scenario)


def _start_before_admission(scenario: Scenario) -> None:
    index = _start_index(scenario)
    scenario.events.insert(1, scenario.events.pop(index))


def _start_of_a_lender(scenario: Scenario) -> None:
    scenario.events.insert(
        -1,
        StartContainerEvent(
            image_id=str(scenario.images[0].image_id),
            layers=(),
            delegations=(),
            argv=("/bin/sh",),
            environment=(),
        ),
    )


def _sealed_too_early(scenario: Scenario) -> None:
    """The seal, and then the owners' images all the same."""
    seal = scenario.events.pop()
    scenario.events.insert(2, seal)


def _sealed_twice(scenario: Scenario) -> None:
    scenario.events.append(SealEvent())


def _late_first_start(scenario: Scenario) -> None:
    scenario.events.insert(1, scenario.events.pop(0))


def _admitted_twice(scenario: Scenario) -> None:
    scenario.events.insert(3, factory.admit(scenario.images[1]))


def _open_seal(scenario: Scenario) -> None:
    scenario.events[-1] = SealEvent(open_delegations=("python",))


def _restart_that_forgets_the_register(scenario: Scenario) -> None:
    scenario.events.append(replace(scenario.start(), register_at_start="cd" * 48))


def _components(change: Callable[[Scenario], None]) -> Callable[[Scenario], None]:
    def alter(scenario: Scenario) -> None:
        change(scenario)
        factory.rewrite_log(scenario)

    return alter


def _plugin_more(scenario: Scenario) -> None:
    scenario.components.append(factory.component("back_door"))


def _plugin_less(scenario: Scenario) -> None:
    scenario.components.pop()


def _file_changed(index: int) -> Callable[[Scenario], None]:
    def change(scenario: Scenario) -> None:
        changed = replace(scenario.components[index], digest_sha384="ee" * 48)
        scenario.components[index] = changed

    return _components(change)


def _restarted_with_a_plugin_more(scenario: Scenario) -> None:
    _plugin_more(scenario)
    scenario.events.append(scenario.start())


def _unsafe(scenario: Scenario) -> None:
    scenario.config["admission"] = {"unsafe_allow_sha256": True}
    factory.rewrite_log(scenario)


def _other_config(scenario: Scenario) -> None:
    scenario.config["plugin"] = {"image_store": {"limit": 6}}
    factory.rewrite_log(scenario)


def _unmeasured_config(evidence: Evidence) -> Evidence:
    return replace(evidence, config=evidence.config.replace('"limit":5', '"limit":6'))


def _image(index: int, **changes: str) -> Callable[[Evidence], Evidence]:
    def change(evidence: Evidence) -> Evidence:
        images = list(evidence.images)
        images[index] = replace(images[index], **changes)
        return replace(evidence, images=tuple(images))

    return change


def _manifest_byte(evidence: Evidence) -> Evidence:
    raw = base64.b64decode(evidence.images[1].manifest).replace(b"--serve", b"--steal")
    return _image(1, manifest=to_base64(raw))(evidence)


def _foreign_signature(evidence: Evidence) -> Evidence:
    return _image(1, signature=evidence.images[2].signature)(evidence)


def _image_left_out(evidence: Evidence) -> Evidence:
    return replace(evidence, images=evidence.images[:1] + evidence.images[2:])


def _image_put_in(evidence: Evidence) -> Evidence:
    stranger: EvidenceImage = factory.evidence_image(factory.program("mallory", "spy"))
    return replace(evidence, images=(*evidence.images, stranger))


def _image_put_in_twice(evidence: Evidence) -> Evidence:
    return replace(evidence, images=(*evidence.images, evidence.images[0]))


def _older_python(scenario: Scenario) -> None:
    """The CSP's image before: python:2 is all it offers, the policy wants 3."""
    scenario.images[0] = factory.lender("csp", factory.PYTHON_2, "python:2")
    factory.rewrite_log(scenario)


def _foreign_alias(scenario: Scenario) -> None:
    """Mallory calls a layer of hers python:3, and the log says that bob's image runs on it."""
    forged = factory.lender("mallory", factory.PYTHON_2, "python:2", "python:3")
    scenario.images.append(forged)
    index = _start_index(scenario, 1)
    event = scenario.events[index]
    assert isinstance(event, StartContainerEvent)
    hop = event.delegations[0].hops[0]
    statement = hashlib.sha384(forged.manifest_bytes).hexdigest()
    stolen = replace(hop, signer=factory.signer_id("mallory"), statement_digest_sha384=statement)
    scenario.events[index] = replace(
        event,
        layers=(factory.PYTHON_2, *event.layers[1:]),
        delegations=(replace(event.delegations[0], hops=(stolen,)),),
    )
    scenario.events.insert(2, factory.admit(forged))


def _lying_svn(scenario: Scenario) -> None:
    index = _start_index(scenario, 1)
    event = scenario.events[index]
    assert isinstance(event, StartContainerEvent)
    hop = replace(event.delegations[0].hops[0], alias="python:9", svn=9)
    scenario.events[index] = replace(
        event, delegations=(replace(event.delegations[0], hops=(hop,)),)
    )


def _layer_of_the_future(scenario: Scenario) -> None:
    """Started on python:3 before the image that offers it was admitted."""
    older = factory.lender("csp", factory.PYTHON_2, "python:2")
    newer = scenario.images[0]
    scenario.images = [older, *scenario.images]
    scenario.events[1] = factory.admit(older)
    scenario.events.insert(-1, factory.admit(newer))


def _speaks(scenario: Scenario) -> None:
    factory.speak_as(scenario, 1)
    scenario.public_key_sha384 = "aa" * 48
    scenario.user_data = b"hello"


def _speaks_after_death(scenario: Scenario) -> None:
    _speaks(scenario)
    assert scenario.status is not None
    first, *rest = scenario.status.containers
    ended: ContainerStatus = replace(first, state="exited", exit_code=0)
    scenario.status = replace(scenario.status, containers=(ended, *rest))


def _speaks_unstarted(scenario: Scenario) -> None:
    _speaks(scenario)
    container = scenario.container
    assert isinstance(container, RequestContainer)
    scenario.container = replace(container, start_event_digest_sha384="ab" * 48)


def _expired_signer(scenario: Scenario) -> None:
    scenario.at = factory.AT.replace(year=2035)


def _honest(scenario: Scenario) -> None:
    """Nothing is altered: what the caller expects is what differs."""


_KEY = {"expected_container_key_sha384": "aa" * 48}
_UNSIGNED = frozenset({"quote.chain", "quote.td.attributes_pin"})
_MINE = "expected_container_image_id"

ATTACKS = [
    # the request
    Attack(
        name="evidence replayed for another nonce",
        alter=_fields(nonce=NONCE[::-1]),
        fires="request.nonce",
    ),
    Attack(
        name="a proof from another tree",
        alter=_ship(_path_of_another_tree),
        fires="request.proof",
    ),
    Attack(
        name="another one's place in the tree",
        alter=_fields(other_requests=3, ship=lambda e: replace(e, proof=replace(e.proof, index=1))),
        fires="request.proof",
    ),
    Attack(
        name="the nonce in the request altered",
        alter=_ship(lambda e: replace(e, request=replace(e.request, nonce=e.request.nonce[::-1]))),
        fires="request.proof",
        derived=frozenset({"request.nonce"}),
    ),
    Attack(
        name="a quote made for another purpose",
        alter=_body(report_data=lambda data: data[:48] + b"another-format--"),
        fires="request.format_tag",
    ),
    Attack(name="the status altered", alter=_ship(_altered_status), fires="request.status"),
    # the quote
    Attack(name="the quote of another TD", alter=_other_td, fires="log.replay"),
    Attack(
        name="a byte of the quote's signature altered",
        alter=_fields(ship_quote=lambda q: _flip(q, 640)),
        fires="quote.chain",
    ),
    Attack(
        name="a byte of MRTD altered in the quote",
        alter=_fields(ship_quote=lambda q: _flip(q, 48 + 136)),
        fires="quote.chain",
        derived=frozenset({"base.mr_td"}),
    ),
    Attack(
        name="bytes behind the quote",
        alter=_fields(ship_quote=lambda q: q + b"\1"),
        fires="quote.format",
    ),
    Attack(
        name="an SGX quote",
        alter=_fields(ship_quote=_sgx_quote),
        fires="quote.tee_type",
        derived=frozenset({"quote.format"}),
    ),
    Attack(
        name="a debug TD",
        alter=_attributes(0, 28),
        fires="quote.td.attributes",
        derived=_UNSIGNED,
    ),
    Attack(
        name="a TD that the host can profile",
        alter=_attributes(5, 28),
        fires="quote.td.attributes",
        derived=_UNSIGNED,
    ),
    Attack(
        name="a migratable TD",
        alter=_attributes(28, 29),
        fires="quote.td.attributes",
        derived=_UNSIGNED,
    ),
    Attack(
        name="a TD without SEPT_VE_DISABLE",
        alter=_attributes(30),
        fires="quote.td.attributes",
        derived=_UNSIGNED,
    ),
    Attack(
        name="a reserved attribute bit",
        alter=_attributes(28, 40),
        fires="quote.td.attributes",
        derived=_UNSIGNED,
    ),
    Attack(
        name="harmless attributes, but not those expected",
        alter=_attributes(28, 63),
        fires="quote.td.attributes_pin",
    ),
    Attack(
        name="XFAM out of bounds",
        alter=_body(xfam=(1 << 40 | 0xE7).to_bytes(8, "little")),
        fires="quote.td.xfam",
        derived=frozenset({"quote.td.xfam_pin"}),
    ),
    Attack(
        name="XFAM without SSE",
        alter=_body(xfam=(0xE5).to_bytes(8, "little")),
        fires="quote.td.xfam",
        derived=frozenset({"quote.td.xfam_pin"}),
    ),
    Attack(name="another TDX module", alter=_body(mr_seam=b"\7" * 48), fires="quote.td.mr_seam"),
    Attack(
        name="a TDX module by another signer",
        alter=_body(mr_signer_seam=b"\7" * 48),
        fires="quote.td.mr_signer_seam",
        derived=frozenset({"quote.chain"}),
    ),
    Attack(
        name="a service TD",
        alter=_body(version=5, mr_service_td=b"\7" * 48),
        fires="quote.td.service_td",
        derived=frozenset({"quote.chain"}),
    ),
    Attack(
        name="a running TDX module older than the one that launched the TD",
        alter=_body(version=5, tee_tcb_svn2=lambda svn: bytes([3]) + svn[1:]),
        fires="quote.td.running_module_svn",
    ),
    Attack(
        name="an old TCB",
        alter=_fields(platform_status="OutOfDate"),
        fires="quote.tcb_status",
        derived=frozenset({"quote.advisories"}),
    ),
    Attack(
        name="a TCB that needs hardening",
        alter=_fields(platform_status="SWHardeningNeeded"),
        fires="quote.tcb_status",
        derived=frozenset({"quote.advisories"}),
    ),
    Attack(name="a revoked platform", alter=_fields(pck_revoked=True), fires="quote.chain"),
    Attack(
        name="expired collateral",
        alter=_fields(at=factory.AT + timedelta(days=31)),
        fires="quote.collateral_dates.document",
        derived=frozenset({"quote.chain"}),
    ),
    Attack(
        name="collateral from the future",
        alter=_fields(at=factory.AT - timedelta(days=1)),
        fires="quote.collateral_dates.document",
        derived=frozenset({"quote.chain"}),
    ),
    Attack(
        name="collateral of an older evaluation",
        alter=_fields(evaluation_number=17),
        fires="quote.tcb_evaluation_number",
    ),
    Attack(
        name="a digit of the TCB info altered",
        alter=_fields(collateral=lambda text: text.replace('\\"pcesvn\\":11', '\\"pcesvn\\":10')),
        fires="quote.chain",
    ),
    Attack(
        name="a simulated quote where the policy demands Intel's root",
        alter=_honest,
        policy_edit=('root = "simulated"', 'root = "intel"'),
        fires="quote.trust_anchor",
    ),
    # firmware, kernel, boot
    Attack(
        name="other firmware",
        alter=_body(mr_td=b"\7" * 48),
        fires="base.mr_td",
    ),
    Attack(
        name="another kernel",
        alter=_fields(base_image=BaseImage(kernel="SIMULATION: kernel, version 0")),
        fires="base.rtmr1",
    ),
    Attack(
        name="a command line that lets the operator log in",
        alter=_fields(base_image=BaseImage(command_line="console=hvc0 init=/bin/sh")),
        fires="base.rtmr2",
    ),
    Attack(
        name="a boot log that is not the registers'",
        alter=_body(rtmrs=lambda rtmrs: (b"\7" * 48, *rtmrs[1:])),
        fires="boot_log.rtmr0",
        derived=frozenset({"base.rtmr0"}),
    ),
    Attack(
        name="a boot event that says secure boot was on",
        alter=_ship(_secure_boot_claimed),
        fires="boot_log.texts",
    ),
    Attack(
        name="another MRCONFIGID", alter=_body(mr_config_id=bytes(48)), fires="base.mr_config_id"
    ),
    Attack(name="another MROWNER", alter=_body(mr_owner=bytes(48)), fires="base.mr_owner"),
    # the log
    Attack(
        name="the seal dropped from the log",
        alter=_shipped(lambda records: records[:-1]),
        fires="log.replay",
        derived=frozenset({"log.sealed", "status.sealed"}),
    ),
    Attack(
        name="a start dropped from the log",
        alter=_shipped(lambda records: records[:3] + records[4:]),
        fires="log.replay",
        derived=frozenset({"status.containers"}),
    ),
    Attack(
        name="two starts swapped in the log",
        alter=_shipped(lambda r: [*r[:3], r[4], r[3], *r[5:]]),
        fires="log.replay",
    ),
    Attack(
        name="a start twice in the log",
        alter=_shipped(lambda r: [*r[:4], r[3], *r[4:]]),
        fires="log.replay",
    ),
    Attack(
        name="a record put in",
        alter=_shipped(lambda r: [*r[:1], encode_record(3, "Note", b'{"critical":false}'), *r[1:]]),
        fires="log.replay",
    ),
    Attack(
        name="a record's text altered, its digest kept",
        alter=_shipped(
            lambda r: [*r[:-1], replace(r[-1], raw=r[-1].raw.replace(b"critical", b"kritical"))]
        ),
        fires="log.format",
    ),
    Attack(
        name="a record of another register",
        alter=_shipped(lambda r: [*r[:-1], encode_record(2, r[-1].operation, r[-1].content)]),
        fires="log.format",
    ),
    Attack(
        name="evidence that names another register",
        alter=_ship(lambda e: replace(e, rtmr_index=2)),
        fires="log.format",
    ),
    Attack(
        name="an unknown event that matters",
        alter=_critical_stranger,
        fires="log.known_events",
    ),
    Attack(
        name="a register that did not start at zero",
        alter=_dirty_register,
        fires="log.register_at_start",
    ),
    Attack(
        name="a start before its image was admitted",
        alter=_start_before_admission,
        fires="order.start_before_admission",
    ),
    Attack(
        name="a start of an image without entry point",
        alter=_events(_start_of_a_lender),
        fires="order.start_without_entry_point",
        derived=frozenset({"starts.arguments"}),
    ),
    Attack(
        name="an admission after the seal",
        alter=_sealed_too_early,
        fires="order.admission_after_seal",
    ),
    Attack(name="a second seal", alter=_sealed_twice, fires="order.second_seal"),
    Attack(name="something before the Start", alter=_late_first_start, fires="order.start_first"),
    Attack(
        name="an image admitted twice", alter=_events(_admitted_twice), fires="order.admitted_once"
    ),
    Attack(
        name="a restart that tells another beginning",
        alter=_restart_that_forgets_the_register,
        fires="order.register_at_start_once",
    ),
    Attack(name="not sealed", alter=_events(_unsealed), fires="log.sealed"),
    Attack(name="a seal that leaves a door", alter=_open_seal, fires="log.open_delegations"),
    # supervisor, plugins, configuration
    Attack(
        name="a plugin more",
        alter=_components(_plugin_more),
        fires="supervisor.plugin_unexpected",
    ),
    Attack(
        name="a plugin more after a restart",
        alter=_restarted_with_a_plugin_more,
        fires="supervisor.plugin_unexpected",
    ),
    Attack(name="a plugin less", alter=_components(_plugin_less), fires="supervisor.plugin"),
    Attack(name="a plugin's file changed", alter=_file_changed(1), fires="supervisor.plugin"),
    Attack(
        name="the supervisor's file changed", alter=_file_changed(0), fires="supervisor.component"
    ),
    Attack(
        name="an unsafe_ setting more",
        alter=_unsafe,
        fires="supervisor.unsafe_setting",
        derived=frozenset({"supervisor.config"}),
    ),
    Attack(name="another configuration", alter=_other_config, fires="supervisor.config"),
    Attack(
        name="a configuration shown that was not measured",
        alter=_ship(_unmeasured_config),
        fires="supervisor.config_digest",
    ),
    # images
    Attack(
        name="an image side-loaded among owners who reject it",
        alter=_events(_side_loaded),
        fires="images.unexpected",
        derived=frozenset({"images.launch_policy.group"}),
    ),
    Attack(
        name="an image of the policy missing",
        alter=_one_program_only,
        fires="images.expected.entry",
    ),
    Attack(
        name="a byte of a manifest altered",
        alter=_ship(_manifest_byte),
        fires="images.signatures",
        derived=frozenset({"images.complete"}),
    ),
    Attack(
        name="another one's signature",
        alter=_ship(_foreign_signature),
        fires="images.signatures",
        derived=frozenset({"images.complete"}),
    ),
    Attack(name="a manifest left out", alter=_ship(_image_left_out), fires="images.complete"),
    Attack(
        name="a manifest that was never admitted",
        alter=_ship(_image_put_in),
        fires="images.complete",
    ),
    Attack(name="a manifest twice", alter=_ship(_image_put_in_twice), fires="images.complete"),
    Attack(
        name="a signer's certificate that has expired",
        alter=_expired_signer,
        fires="images.certificate_dates",
        derived=frozenset({"quote.chain", "quote.collateral_dates.document"}),
    ),
    # starts and delegations
    Attack(
        name="another layer than the manifest says",
        alter=_changed_start(0, layers=(factory.PYTHON_2,)),
        fires="starts.layers",
    ),
    Attack(
        name="another program",
        alter=_changed_start(0, argv=("/bin/sh",)),
        fires="starts.arguments",
    ),
    Attack(
        name="arguments split elsewhere",
        alter=_changed_start(0, argv=("/bin/gateway --serve",)),
        fires="starts.arguments",
    ),
    Attack(
        name="a variable that no rule allows",
        alter=_changed_start(0, environment=("LD_PRELOAD=/evil", "MODE=fast", "PORT=8080")),
        fires="starts.environment",
    ),
    Attack(
        name="a value that no rule allows",
        alter=_changed_start(0, environment=("MODE=slow", "PORT=8080")),
        fires="starts.environment",
    ),
    Attack(
        name="a variable unset that must be there",
        alter=_changed_start(0, environment=("PORT=8080",)),
        fires="starts.environment",
    ),
    Attack(
        name="a delegation claimed away",
        alter=_changed_start(1, delegations=()),
        fires="starts.delegations",
    ),
    Attack(
        name="a delegated layer below the policy's minimum",
        alter=_older_python,
        fires="delegations.used",
        derived=frozenset({"delegations.possible", "images.expected.entry", "images.unexpected"}),
    ),
    Attack(
        name="an alias signed by another key",
        alter=_events(_foreign_alias),
        fires="starts.delegations",
        derived=frozenset({"starts.layers", "delegations.used", "images.unexpected"}),
    ),
    Attack(
        name="a version claimed that nobody stated",
        alter=_events(_lying_svn),
        fires="starts.delegations",
    ),
    Attack(
        name="a layer whose statement came later",
        alter=_events(_layer_of_the_future),
        fires="starts.layers",
        derived=frozenset({"starts.delegations", "images.unexpected"}),
    ),
    # status
    Attack(
        name="something runs that no log entry allows",
        alter=_unlogged_container,
        fires="status.containers",
    ),
    Attack(
        name="something runs under another image's permission",
        alter=_other_images_start,
        fires="status.containers",
    ),
    Attack(
        name="an image runs more often than it may",
        alter=_status_container,
        fires="status.instances",
    ),
    Attack(
        name="measurement has halted",
        alter=_status(measurement="halted: no answer"),
        fires="status.measurement",
    ),
    Attack(
        name="a seal only in the status",
        alter=_unsealed_but_claimed,
        fires="status.sealed",
        derived=frozenset({"log.sealed"}),
    ),
    # the container that speaks
    Attack(
        name="a proxy with a key of its own",
        alter=_speaks,
        expectations={"expected_container_key_sha384": "bb" * 48, _MINE: "gateway"},
        fires="request.key",
    ),
    Attack(
        name="a key expected of evidence that no container asked for",
        alter=_honest,
        expectations=_KEY,
        fires="speaker",
        derived=frozenset({"request.key"}),
    ),
    Attack(
        name="a co-tenant's evidence for its own key",
        alter=_speaks,
        expectations={**_KEY, _MINE: "model"},
        fires="speaker.image",
    ),
    Attack(
        name="other user data",
        alter=_speaks,
        expectations={"expected_user_data": b"hallo", _MINE: "gateway"},
        fires="request.user_data",
    ),
    Attack(
        name="a container that had ended",
        alter=_speaks_after_death,
        expectations={**_KEY, _MINE: "gateway"},
        fires="speaker.running",
    ),
    Attack(
        name="a container that the log never started",
        alter=_speaks_unstarted,
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
        **arguments,  # type: ignore[arg-type]
    )


def test_every_attack_has_a_name_of_its_own() -> None:
    names = [attack.name for attack in ATTACKS]
    assert len(set(names)) == len(names) >= 60
