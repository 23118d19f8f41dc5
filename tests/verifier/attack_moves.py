"""What adversaries do to an honest scenario, one move each; `test_attacks` has the table."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable

import evidence_factory as factory
import msgspec
from evidence_factory import Scenario

from supervisor.formats.base64_text import to_base64
from supervisor.formats.event_log import LogRecord
from supervisor.formats.evidence import Evidence, EvidenceImage, Proof, RequestContainer
from supervisor.formats.log_events import SealEvent, StartContainerEvent
from supervisor.formats.status import ContainerStatus

replace = msgspec.structs.replace


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def fields(**changes: object) -> Callable[[Scenario], None]:
    """Set fields of the scenario, keeping log and status."""

    def alter(scenario: Scenario) -> None:
        for name, value in changes.items():
            setattr(scenario, name, value)

    return alter


def body(version: int = 4, **changes: object) -> Callable[[Scenario], None]:
    return fields(body=changes, quote_version=version)


def attributes(*bits: int) -> Callable[[Scenario], None]:
    return body(td_attributes=sum(1 << bit for bit in bits).to_bytes(8, "little"))


def status(**changes: object) -> Callable[[Scenario], None]:
    """The supervisor lies in its status, which is bound all the same."""

    def alter(scenario: Scenario) -> None:
        assert scenario.status is not None
        scenario.status = replace(scenario.status, **changes)

    return alter


def shipped(change: Callable[[list[LogRecord]], list[LogRecord]]) -> Callable[[Scenario], None]:
    return fields(shipped_records=change)


def ship(change: Callable[[Evidence], Evidence]) -> Callable[[Scenario], None]:
    return fields(ship=change)


def remeasured(change: Callable[[Scenario], None]) -> Callable[[Scenario], None]:
    """A supervisor that measured something else, with a status to match."""

    def alter(scenario: Scenario) -> None:
        change(scenario)
        scenario.status = factory.status_of(scenario)

    return alter


def start_index(scenario: Scenario, which: int = 0) -> int:
    found = [i for i, one in enumerate(scenario.events) if isinstance(one, StartContainerEvent)]
    return found[which]


def changed_start(which: int, **changes: object) -> Callable[[Scenario], None]:
    def change(scenario: Scenario) -> None:
        index = start_index(scenario, which)
        event = scenario.events[index]
        assert isinstance(event, StartContainerEvent)
        scenario.events[index] = replace(event, **changes)

    return remeasured(change)


# --- alterations that need more than one line -----------------------------------------------


def sgx_quote(quote: bytes) -> bytes:
    return quote[:4] + bytes(4) + quote[8:]


def other_td(scenario: Scenario) -> None:
    """The quote of a fresh TD of the same base, which measured nothing."""
    scenario.body = {"rtmrs": lambda rtmrs: (*rtmrs[:3], bytes(48))}


def path_of_another_tree(evidence: Evidence) -> Evidence:
    return replace(evidence, proof=Proof(index=0, size=2, path=("ab" * 48,)))


def secure_boot_claimed(evidence: Evidence) -> Evidence:
    log = base64.b64decode(evidence.cc_eventlog)
    value_at = log.index("SecureBoot".encode("utf-16-le")) + 2 * len("SecureBoot")
    return replace(evidence, cc_eventlog=to_base64(flip(log, value_at)))


def altered_status(evidence: Evidence) -> Evidence:
    return replace(evidence, status=evidence.status.replace('"notes":[]', '"notes":["x"]'))


def side_loaded(scenario: Scenario) -> None:
    """A sixth wheel: admitted before the seal, by a supervisor that did not ask the owners."""
    extra = factory.program("mallory", "spy", accepts=["sha512/*/*"])
    scenario.images.append(extra)
    scenario.events.insert(3, factory.admit(extra))


def one_program_only(scenario: Scenario) -> None:
    scenario.images = [factory.python_3(), factory.gateway()]
    factory.rewrite_log(scenario)


def status_container(scenario: Scenario, **changes: object) -> None:
    assert scenario.status is not None
    first = scenario.status.containers[0]
    stranger = replace(first, container_id=99, **changes)
    scenario.status = replace(scenario.status, containers=(*scenario.status.containers, stranger))


def unlogged_container(scenario: Scenario) -> None:
    status_container(scenario, start_event_digest_sha384="ab" * 48, state="exited", exit_code=0)


def other_images_start(scenario: Scenario) -> None:
    status_container(scenario, image_id=str(scenario.images[2].image_id), state="exited", signal=9)


def unsealed(scenario: Scenario) -> None:
    scenario.events = [one for one in scenario.events if not isinstance(one, SealEvent)]


def unsealed_but_claimed(scenario: Scenario) -> None:
    unsealed(scenario)
    scenario.status = replace(factory.status_of(scenario), sealed=True)


def critical_stranger(scenario: Scenario) -> None:
    scenario.events.insert(1, ("OpenBackDoor", b'{"critical":true}'))


def dirty_register(scenario: Scenario) -> None:
    scenario.register_before = b"\x01" * 48
    factory.rewrite_log(scenario)


def start_before_admission(scenario: Scenario) -> None:
    index = start_index(scenario)
    scenario.events.insert(1, scenario.events.pop(index))


def start_of_a_lender(scenario: Scenario) -> None:
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


def sealed_too_early(scenario: Scenario) -> None:
    """The seal, and then the owners' images all the same."""
    seal = scenario.events.pop()
    scenario.events.insert(2, seal)


def sealed_twice(scenario: Scenario) -> None:
    scenario.events.append(SealEvent())


def late_first_start(scenario: Scenario) -> None:
    scenario.events.insert(1, scenario.events.pop(0))


def admitted_twice(scenario: Scenario) -> None:
    scenario.events.insert(3, factory.admit(scenario.images[1]))


def open_seal(scenario: Scenario) -> None:
    scenario.events[-1] = SealEvent(open_delegations=("python",))


def restart_that_forgets_the_register(scenario: Scenario) -> None:
    scenario.events.append(replace(scenario.start(), register_at_start="cd" * 48))


def components(change: Callable[[Scenario], None]) -> Callable[[Scenario], None]:
    def alter(scenario: Scenario) -> None:
        change(scenario)
        factory.rewrite_log(scenario)

    return alter


def plugin_more(scenario: Scenario) -> None:
    scenario.components.append(factory.component("back_door"))


def plugin_less(scenario: Scenario) -> None:
    scenario.components.pop()


def file_changed(index: int) -> Callable[[Scenario], None]:
    def change(scenario: Scenario) -> None:
        changed = replace(scenario.components[index], digest_sha384="ee" * 48)
        scenario.components[index] = changed

    return components(change)


def restarted_with_a_plugin_more(scenario: Scenario) -> None:
    plugin_more(scenario)
    scenario.events.append(scenario.start())


def unsafe(scenario: Scenario) -> None:
    scenario.config["admission"] = {"unsafe_allow_sha256": True}
    factory.rewrite_log(scenario)


def other_config(scenario: Scenario) -> None:
    scenario.config["plugin"] = {"image_store": {"limit": 6}}
    factory.rewrite_log(scenario)


def unmeasured_config(evidence: Evidence) -> Evidence:
    return replace(evidence, config=evidence.config.replace('"limit":5', '"limit":6'))


def image(index: int, **changes: str) -> Callable[[Evidence], Evidence]:
    def change(evidence: Evidence) -> Evidence:
        images = list(evidence.images)
        images[index] = replace(images[index], **changes)
        return replace(evidence, images=tuple(images))

    return change


def manifest_byte(evidence: Evidence) -> Evidence:
    raw = base64.b64decode(evidence.images[1].manifest).replace(b"--serve", b"--steal")
    return image(1, manifest=to_base64(raw))(evidence)


def foreign_signature(evidence: Evidence) -> Evidence:
    return image(1, signature=evidence.images[2].signature)(evidence)


def image_left_out(evidence: Evidence) -> Evidence:
    return replace(evidence, images=evidence.images[:1] + evidence.images[2:])


def image_put_in(evidence: Evidence) -> Evidence:
    stranger: EvidenceImage = factory.evidence_image(factory.program("mallory", "spy"))
    return replace(evidence, images=(*evidence.images, stranger))


def image_put_in_twice(evidence: Evidence) -> Evidence:
    return replace(evidence, images=(*evidence.images, evidence.images[0]))


def older_python(scenario: Scenario) -> None:
    """The CSP's image before: python:2 is all it offers, the policy wants 3."""
    scenario.images[0] = factory.lender("csp", factory.PYTHON_2, "python:2")
    factory.rewrite_log(scenario)


def foreign_alias(scenario: Scenario) -> None:
    """Mallory calls a layer of hers python:3, and the log says that bob's image runs on it."""
    forged = factory.lender("mallory", factory.PYTHON_2, "python:2", "python:3")
    scenario.images.append(forged)
    index = start_index(scenario, 1)
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


def lying_svn(scenario: Scenario) -> None:
    index = start_index(scenario, 1)
    event = scenario.events[index]
    assert isinstance(event, StartContainerEvent)
    hop = replace(event.delegations[0].hops[0], alias="python:9", svn=9)
    scenario.events[index] = replace(
        event, delegations=(replace(event.delegations[0], hops=(hop,)),)
    )


def layer_of_the_future(scenario: Scenario) -> None:
    """Started on python:3 before the image that offers it was admitted."""
    older = factory.lender("csp", factory.PYTHON_2, "python:2")
    newer = scenario.images[0]
    scenario.images = [older, *scenario.images]
    scenario.events[1] = factory.admit(older)
    scenario.events.insert(-1, factory.admit(newer))


def speaks(scenario: Scenario) -> None:
    factory.speak_as(scenario, 1)
    scenario.public_key_sha384 = "aa" * 48
    scenario.user_data = b"hello"


def speaks_after_death(scenario: Scenario) -> None:
    speaks(scenario)
    assert scenario.status is not None
    first, *rest = scenario.status.containers
    ended: ContainerStatus = replace(first, state="exited", exit_code=0)
    scenario.status = replace(scenario.status, containers=(ended, *rest))


def speaks_unstarted(scenario: Scenario) -> None:
    speaks(scenario)
    container = scenario.container
    assert isinstance(container, RequestContainer)
    scenario.container = replace(container, start_event_digest_sha384="ab" * 48)


def expired_signer(scenario: Scenario) -> None:
    scenario.at = factory.AT.replace(year=2035)


def honest(scenario: Scenario) -> None:
    """Nothing is altered: what the caller expects is what differs."""
