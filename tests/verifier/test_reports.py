"""The reports: readable, bounded in width, stable, and inert whatever the evidence says."""

from __future__ import annotations

import json
import re
import unicodedata

import evidence_factory as factory
import msgspec
import pytest
from evidence_factory import AT, NONCE, Scenario
from hypothesis import given
from hypothesis import strategies as st

from plugins.tdx_sim.pki import SimPki
from supervisor.formats.base64_text import to_base64
from supervisor.formats.evidence import Evidence
from supervisor.formats.status import AttestationData
from verifier import (
    Policy,
    Verdict,
    parse_policy,
    policy_from_evidence,
    render_json,
    render_text,
    verify,
)
from verifier.inert_text import inert

HOSTILE = "\x1b[2J\x1b[H[pass] The quote\r\n[pass] all\u202efine\u200b\x07 \u009b31m"


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


@pytest.fixture(scope="module")
def hostile(pki: SimPki, policy: Policy) -> Verdict:
    """Evidence whose names, environment, plugins and settings try to write the report."""
    scenario = factory.honest()
    spy = factory.sign_image(
        "mallory",
        layers=[],
        aliases={"self": {".": [f"{HOSTILE.replace('/', '')}:1"]}},
        entrypoint=["/bin/x", HOSTILE],
        env=["A"],
    )
    scenario.images.append(spy)
    scenario.components.append(
        msgspec.structs.replace(factory.component("x"), name=HOSTILE, version=HOSTILE)
    )
    scenario.config[f"unsafe_{HOSTILE}"] = True
    factory.rewrite_log(scenario)
    scenario.events.insert(-1, ("Note", b'{"critical":false}'))
    scenario.status = msgspec.structs.replace(
        factory.status_of(scenario), notes=(HOSTILE,), measurement=f"halted: {HOSTILE}"
    )
    return judged(scenario, pki, policy)


@pytest.mark.parametrize("details", [False, True])
@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_string_of_the_evidence_acts_on_the_terminal_or_poses_as_a_line(
    hostile: Verdict, width: int, details: bool
) -> None:
    text = render_text(hostile, width=width, details=details)
    assert not hostile.ok
    for character in text.replace("\n", ""):
        assert character.isprintable()
        assert unicodedata.category(character) != "Cf"
    assert max(map(len, text.splitlines())) <= width
    # Lines that begin with a mark are the report's own: as many as the checks it shows.
    marked = [line for line in text.splitlines() if re.match(r" *\[(pass|FAIL|open)\]", line)]
    assert not [line for line in marked if "\\x1b" in line.split("]")[0]]
    assert not [line for line in text.splitlines() if line.startswith("[pass] all")]


def test_the_json_report_is_ascii_and_says_what_the_verdict_says(hostile: Verdict) -> None:
    text = render_json(hostile)
    assert text.isascii()
    report = json.loads(text)
    assert report["format"] == "acon-verdict-v1"
    assert report["ok"] is False
    assert report["simulation"] is True
    assert report["failures"] == [leaf.id for leaf in hostile.failures]
    assert [check["id"] for check in report["checks"]] == [check.id for check in hostile.checks]
    assert set(report) == {
        "format",
        "ok",
        "headline",
        "simulation",
        "judged_at",
        "trust_anchor",
        "failures",
        "remains_to_be_believed",
        "checks",
        "facts",
    }


def _unwrapped(text: str) -> str:
    """The words, with line breaks, margins and bars taken out."""
    return " ".join(text.replace("|", " ").split())


def test_the_text_names_programs_signers_delegations_and_the_seal(
    pki: SimPki, policy: Policy
) -> None:
    text = _unwrapped(render_text(judged(factory.honest(), pki, policy), width=100))
    for words in (
        "VERDICT: PASSED (SIMULATION)",
        "gateway:1",
        "calls itself CN=bob",
        "LEFT TO SOMEONE ELSE",
        "python:3, version 3",
        "Loading was ended for good",
        "turns no check off",
        "nothing about real hardware",
    ):
        assert words in text


def saying(scenario: Scenario, *said: tuple[str, bytes] | None) -> Scenario:
    """The scenario with each container's attestation data, in their order."""
    status = factory.status_of(scenario)
    containers = tuple(
        container
        if data is None
        else msgspec.structs.replace(
            container, attestation_data=AttestationData(kind=data[0], data=to_base64(data[1]))
        )
        for container, data in zip(status.containers, said, strict=True)
    )
    scenario.status = msgspec.structs.replace(status, containers=containers)
    return scenario


def test_what_a_container_says_of_itself_is_shown_as_its_own_unchecked_words(
    pki: SimPki, policy: Policy
) -> None:
    scenario = saying(factory.honest(), ("text", b"ready\nsince noon"), ("binary", b"\xff\0"))
    verdict = judged(scenario, pki, policy)
    assert verdict.ok
    text = render_text(verdict, width=200)
    for words in (
        "container 1 says of itself, which nobody checked:\n     | text    ready\\x0asince noon\n",
        "container 2 says of itself, which nobody checked:\n     | binary  ff00\n",
    ):
        assert words in text
    starts = json.loads(render_json(verdict))["facts"]["starts"]
    assert [start["attestation_data"] for start in starts] == [
        [{"container_id": 1, "kind": "text", "data": to_base64(b"ready\nsince noon")}],
        [{"container_id": 2, "kind": "binary", "data": "/wA="}],
    ]


def test_a_container_that_says_nothing_is_given_no_words(pki: SimPki, policy: Policy) -> None:
    verdict = judged(saying(factory.honest(), None, ("text", b"")), pki, policy)
    text = render_text(verdict, width=200)
    assert "container 1 says" not in text
    assert "container 2 says of itself" in text
    assert verdict.facts.starts[0].attestation_data == ()


def test_no_words_of_a_container_pose_as_a_line_of_the_report(pki: SimPki, policy: Policy) -> None:
    poser = "[pass] all is well\r\n[pass] and \u202efine\u200b \u009b31m VERDICT: PASSED".encode()
    verdict = judged(saying(factory.honest(), ("text", poser), ("binary", poser)), pki, policy)
    text = render_text(verdict, width=60)
    for line in text.splitlines():
        assert line.isprintable()
        if "all is well" in line or "fine" in line:
            assert line.lstrip().startswith("| ")
    assert render_json(verdict).isascii()


def test_attestation_data_that_was_changed_on_the_way_fails(pki: SimPki, policy: Policy) -> None:
    scenario = saying(factory.honest(), ("text", b"true"), None)

    def rewrite(evidence: Evidence) -> Evidence:
        other = evidence.status.replace(to_base64(b"true"), to_base64(b"fals"))
        assert other != evidence.status
        return msgspec.structs.replace(evidence, status=other)

    scenario.ship = rewrite
    verdict = judged(scenario, pki, policy)
    assert [leaf.id for leaf in verdict.failures] == ["request.status"]


def test_a_failed_report_says_first_why(pki: SimPki, policy: Policy) -> None:
    scenario = factory.honest()
    scenario.body = {"mr_td": b"\7" * 48}
    verdict = judged(scenario, pki, policy)
    text = render_text(verdict, width=100)
    assert text.startswith("VERDICT: FAILED (SIMULATION)\n")
    assert text.index("base.mr_td") < text.index("Programs that may run here")
    assert f"{'07' * 8}…" in text
    assert "07" * 48 in _unwrapped(render_text(verdict, details=True)).replace(" ", "")
    assert "Send it nothing." in text


def test_colours_are_there_only_when_asked_for(pki: SimPki, policy: Policy) -> None:
    verdict = judged(factory.honest(), pki, policy)
    plain = render_text(verdict)
    coloured = render_text(verdict, colour=True)
    assert "\x1b" not in plain
    assert "\x1b[32m[pass]\x1b[0m" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain


def test_a_verdict_renders_the_same_every_time(pki: SimPki, policy: Policy) -> None:
    verdict = judged(factory.honest(), pki, policy)
    assert render_json(verdict) == render_json(verdict)
    assert render_text(verdict, details=True) == render_text(verdict, details=True)


def test_a_policy_written_from_hostile_evidence_reads_back(pki: SimPki) -> None:
    scenario = factory.honest()
    scenario.components.append(
        msgspec.structs.replace(factory.component("x"), name=HOSTILE, version=HOSTILE)
    )
    scenario.config[f"unsafe_{HOSTILE}"] = True
    factory.rewrite_log(scenario)
    built = factory.build(scenario, pki)
    policy = parse_policy(policy_from_evidence(built.evidence, collateral=built.collateral))
    assert not isinstance(policy.plugins, str)
    assert policy.plugins[-1].name == HOSTILE
    assert judged(scenario, pki, policy).ok


@given(st.text())
def test_inert_text_is_printable_and_unambiguous(text: str) -> None:
    shown = inert(text)
    assert all(character.isprintable() for character in shown)
    unescaped = re.sub(
        r"\\(\\|x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})",
        lambda m: "\\" if m[1] == "\\" else chr(int(m[1][1:], 16)),
        shown,
    )
    assert unescaped == text


def test_long_text_is_cut_with_a_count() -> None:
    assert inert("x" * 30, max_characters=10) == "x" * 10 + "… (20 more characters)"
