"""`acon plan` and `acon log show`: the log before and after."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from acon_helpers import Acon, MakeLayout, MakeSigner, Signer, tar_of

from supervisor.formats.base64_text import to_base64
from supervisor.formats.event_log import assemble_log, encode_record, replay
from supervisor.formats.evidence import Evidence, EvidenceRequest, Proof, encode_evidence
from supervisor.formats.log_events import Component, StartEvent, encode_event
from supervisor.formats.status import Status, encode_status

IDENTITY = StartEvent(
    components=(
        Component(
            name="supervisor",
            version="1",
            digest_sha384="1" * 96,
            role="supervisor",
            distribution="attested-containers",
        ),
    ),
    config_digest_sha384="2" * 96,
)


@pytest.fixture
def identity(tmp_path: Path) -> Path:
    path = tmp_path / "identity.json"
    path.write_bytes(encode_event(IDENTITY)[1] + b"\n")
    return path


@pytest.fixture
def owner(make_signer: MakeSigner) -> Signer:
    return make_signer("owner")


@pytest.fixture
def app(tmp_path: Path, make_layout: MakeLayout, owner: Signer, acon: Acon) -> Path:
    config = {"Entrypoint": ["/app"], "Env": ["B=2", "A=1"]}
    layout = make_layout("app", [tar_of({"app": b"x"})], config=config)
    bundle = tmp_path / "app"
    assert acon("image", "convert", f"oci:{layout}", "-o", bundle) == 0
    sign = ("image", "sign", bundle, "--key", owner.key, "--cert", owner.certificate)
    assert acon(*sign) == 0
    return bundle


def test_the_steps_replay_to_what_a_td_with_exactly_these_contents_would_have(
    app: Path,
    owner: Signer,
    identity: Path,
    acon: Acon,
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    assert acon("plan", app, "--identity", identity, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    manifest = hashlib.sha384((app / "manifest.json").read_bytes()).hexdigest()
    image_id = f"{owner.signer_id}/{manifest}"
    layer = hashlib.sha384(tar_of({"app": b"x"})).hexdigest()
    # Spelt out by hand (formats.md, 3), not with the code that is tested.
    contents = [
        ("Start", encode_event(IDENTITY)[1].decode()),
        ("AdmitImages", f'{{"critical":true,"image_ids":["{image_id}"]}}'),
        ("Seal", '{"critical":true,"open_delegations":[]}'),
        (
            "StartContainer",
            f'{{"argv":["/app"],"critical":true,"delegations":[],"environment":["A=1","B=2"],'
            f'"image_id":"{image_id}","layers":["sha384/{layer}"]}}',
        ),
    ]
    assert [(step["operation"], step["content"]) for step in plan["steps"]] == contents
    register = bytes(48)
    for operation, content in contents:
        text = f"attested-containers {operation} {content}".encode()
        tagged = b"LEAA" + len(text).to_bytes(4, "little") + text
        register = hashlib.sha384(register + hashlib.sha384(tagged).digest()).digest()
    assert plan["rtmr3"] == register.hex()


def test_sealing_and_starting_can_be_left_out(
    app: Path, identity: Path, acon: Acon, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    left_out = ("--no-seal", "--no-start")
    assert acon("plan", app, "--identity", identity, *left_out, "--json") == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert [step["operation"] for step in steps] == ["Start", "AdmitImages"]


def test_without_an_identity_no_register_is_claimed(
    app: Path, acon: Acon, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert acon("plan", app, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["rtmr3"] is None
    assert plan["steps"] == []


def test_a_delegated_layer_is_resolved_to_the_vendors_newest_that_is_compatible(
    tmp_path: Path,
    app: Path,
    make_layout: MakeLayout,
    make_signer: MakeSigner,
    owner: Signer,
    acon: Acon,
    capsys: pytest.CaptureFixture[str],
) -> None:
    csp = make_signer("csp")
    vendors = []
    for version, aliases in ((2, ["lib:2"]), (3, ["lib:3", "lib:2"])):
        layout = make_layout(f"lib{version}", [tar_of({"lib": b"%d" % version})])
        made = tmp_path / f"lib-{version}"
        options = [word for alias in aliases for word in ("--alias", alias)]
        assert acon("vendor", "make", f"oci:{layout}", *options, "-o", made) == 0
        assert acon("vendor", "sign", made, "--key", csp.key, "--cert", csp.certificate) == 0
        vendors.append(made)
    to = f"{csp.certificate}:lib:2"
    assert acon("image", "delegate", app, "--layer", 0, "--to", to) == 0
    assert acon("image", "sign", app, "--key", owner.key, "--cert", owner.certificate) == 0
    assert acon("plan", app) == 1
    capsys.readouterr()
    assert acon("plan", app, *vendors, "--json") == 0
    ((layers),) = json.loads(capsys.readouterr().out)["layers"].values()
    assert layers[0]["digest"] == f"sha384/{hashlib.sha384(tar_of({'lib': b'3'})).hexdigest()}"
    assert layers[0]["delegation"][0]["alias"] == "lib:3"


def test_an_image_that_is_not_signed_has_no_plan(app: Path, acon: Acon) -> None:
    (app / "signature").unlink()
    assert acon("plan", app) == 2


def test_log_show_replays_what_the_evidence_says(
    tmp_path: Path, acon: Acon, capsys: pytest.CaptureFixture[str]
) -> None:
    operation, content = encode_event(IDENTITY)
    records = [
        encode_record(3, operation, content),
        encode_record(3, "Seal", b'{"critical":true,"open_delegations":[]}'),
    ]
    status = Status(sealed=True, measurement="ok", images=(), containers=(), notes=())
    evidence = Evidence(
        request=EvidenceRequest(nonce="00" * 16, status_digest_sha384="0" * 96),
        proof=Proof(index=0, size=1, path=()),
        quote=to_base64(b"no quote"),
        cc_eventlog=to_base64(assemble_log(None, [one.raw for one in records])),
        rtmr_index=3,
        config="{}",
        images=(),
        status=encode_status(status).decode(),
    )
    path = tmp_path / "evidence.json"
    path.write_bytes(encode_evidence(evidence))
    assert acon("log", "show", path, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert [one["operation"] for one in shown["records"]] == ["Start", "Seal"]
    assert shown["register"] == replay(one.digest_sha384 for one in records).hex()
    assert acon("log", "show", path) == 0
    assert "plugin" not in capsys.readouterr().out
