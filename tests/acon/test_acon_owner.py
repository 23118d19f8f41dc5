"""What an owner and a vendor do with images: convert, delegate, sign, show."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from acon_helpers import Acon, MakeLayout, MakeSigner, tar_of
from cryptography.hazmat.primitives import hashes

from acon.bundle import Bundle
from acon.errors import UsageError
from acon.layer_bytes import hash_layer
from supervisor.seams import FileBlob, RegistryBlob

LOWER = tar_of({"bin/sh": b"#!", "lib/big": bytes(3_000_000)})
UPPER = tar_of({"app": b"program"})
PROCESS: dict[str, object] = {
    "Entrypoint": ["/app"],
    "Cmd": ["serve"],
    "Env": ["PATH=/bin", "LEVEL=info"],
    "WorkingDir": "/srv",
    "User": "1000",
}


@pytest.fixture
def bundle(tmp_path: Path, make_layout: MakeLayout, acon: Acon) -> Path:
    layout = make_layout("app", [LOWER, UPPER], config=PROCESS)
    assert acon("image", "convert", f"oci:{layout}:1", "-o", tmp_path / "bundle") == 0
    return tmp_path / "bundle"


def manifest_of(bundle: Path) -> dict[str, object]:
    value = json.loads((bundle / "manifest.json").read_bytes())
    assert isinstance(value, dict)
    return value


def test_layers_are_named_by_the_sha384_of_their_uncompressed_tars_lowest_first(
    bundle: Path,
) -> None:
    expected = [f"sha384/{hashlib.sha384(tar).hexdigest()}" for tar in (LOWER, UPPER)]
    assert manifest_of(bundle)["layers"] == expected


def test_the_oci_configuration_becomes_entry_point_environment_and_directory(
    bundle: Path,
) -> None:
    manifest = manifest_of(bundle)
    assert manifest["entrypoint"] == ["/app", "serve"]
    assert manifest["env"] == ["PATH=/bin", "LEVEL=info"]
    assert manifest["workingDir"] == "/srv"


def test_sources_lead_from_the_bundle_to_the_blobs_also_after_both_moved_together(
    bundle: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.move(bundle, moved / "bundle")
    shutil.move(tmp_path / "layouts", moved / "layouts")
    found = Bundle(moved / "bundle")
    sources = found.sources()
    assert len(sources) == 2
    for name, source in sources.items():
        assert isinstance(source, FileBlob)
        assert Path(source.file).is_relative_to(moved)
        assert str(hash_layer(source).digest("sha384")) == name


def test_every_option_of_convert_lands_in_its_field(
    tmp_path: Path, make_layout: MakeLayout, make_signer: MakeSigner, acon: Acon
) -> None:
    layout = make_layout("app", [UPPER], config=PROCESS)
    friend = make_signer("friend")
    code = acon(
        *("image", "convert", f"oci:{layout}", "-o", tmp_path / "b", "--reject-unaccepted"),
        *("--accept", friend.certificate, "--signer-accepts", f"{friend.certificate_der}:model:2"),
        *("--accept", f"sha384/*/{'0' * 96}", "--name", "app:3", "--name", "app:2"),
        *("--env", "LEVEL", "--env", "MODE=", "--signal", "-15", "--signal", "10"),
        *("--log-fd", "1", "--max-instances", "0", "--writable", "--uid", "7", "--workdir", "/x"),
    )
    assert code == 0
    manifest = manifest_of(tmp_path / "b")
    assert manifest["policy"] == {
        "accepts": [
            f"{friend.signer_id}/*",
            f"{friend.signer_id}/model:2",
            f"sha384/*/{'0' * 96}",
        ],
        "rejectUnaccepted": True,
    }
    assert manifest["aliases"] == {"self": {".": ["app:3", "app:2"]}}
    assert manifest["env"] == ["PATH=/bin", "LEVEL", "MODE="]
    assert manifest["signals"] == [-15, 10]
    assert manifest["logFDs"] == [1]
    assert manifest["maxInstances"] == 0
    assert manifest["writableFS"] is True
    assert manifest["uids"] == [7]
    assert manifest["workingDir"] == "/x"


def test_a_user_that_a_manifest_cannot_hold_is_told(
    tmp_path: Path,
    make_layout: MakeLayout,
    acon: Acon,
    capsys: pytest.CaptureFixture[str],
) -> None:
    layout = make_layout("app", [UPPER], config=PROCESS)
    assert acon("image", "convert", f"oci:{layout}", "-o", tmp_path / "b", "--json") == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert any("'1000' is not kept" in note for note in notes)


@pytest.mark.parametrize("part", ["config", "layer"])
def test_a_changed_blob_is_refused_and_no_manifest_is_written(
    part: str, tmp_path: Path, make_layout: MakeLayout, acon: Acon
) -> None:
    layout = make_layout("app", [UPPER], config=PROCESS)
    blobs = sorted((layout / "blobs" / "sha256").iterdir(), key=lambda one: one.stat().st_size)
    for blob in blobs:
        raw = blob.read_bytes()
        is_layer = raw.startswith(b"\x1f\x8b")
        if is_layer == (part == "layer") and (is_layer or b"rootfs" in raw):
            changed = bytearray(raw)
            # The last byte but one: in a layer a length that gzip checks, in JSON a brace.
            changed[-2 if is_layer else -1] ^= 1
            blob.write_bytes(changed)
    assert acon("image", "convert", f"oci:{layout}", "-o", tmp_path / "b") in (1, 2)
    assert not (tmp_path / "b" / "manifest.json").exists()


def test_a_layer_that_is_not_its_diff_id_is_refused_with_both_values(
    tmp_path: Path, make_layout: MakeLayout, acon: Acon, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = make_layout("app", [UPPER], config=PROCESS)
    blobs = layout / "blobs" / "sha256"
    index = json.loads((layout / "index.json").read_text(encoding="utf-8"))
    manifest_blob = blobs / index["manifests"][0]["digest"].removeprefix("sha256:")
    manifest = json.loads(manifest_blob.read_text(encoding="utf-8"))
    config_blob = blobs / manifest["config"]["digest"].removeprefix("sha256:")
    config = json.loads(config_blob.read_text(encoding="utf-8"))
    config["rootfs"]["diff_ids"] = [f"sha256:{'0' * 64}"]

    def put(value: object) -> str:
        raw = json.dumps(value).encode()
        digest = hashlib.sha256(raw).hexdigest()
        (blobs / digest).write_bytes(raw)
        return f"sha256:{digest}"

    manifest["config"]["digest"] = put(config)
    index["manifests"][0]["digest"] = put(manifest)
    (layout / "index.json").write_text(json.dumps(index), encoding="utf-8")
    assert acon("image", "convert", f"oci:{layout}", "-o", tmp_path / "b", "--json") == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["kind"] == "digest"
    assert error["expected"] == f"sha256:{'0' * 64}"
    assert error["actual"] == f"sha256:{hashlib.sha256(UPPER).hexdigest()}"


@pytest.mark.parametrize(
    "source", ["docker:x", "oci:nowhere", "oci:", "oci:{layout}:other", "{layout}"]
)
def test_a_source_that_names_no_image_is_wrong_usage(
    source: str, tmp_path: Path, make_layout: MakeLayout, acon: Acon
) -> None:
    layout = make_layout("app", [UPPER])
    assert acon("image", "convert", source.format(layout=layout), "-o", tmp_path / "b") == 2


def test_signing_writes_what_show_finds_right(
    bundle: Path, make_signer: MakeSigner, acon: Acon, capsys: pytest.CaptureFixture[str]
) -> None:
    owner = make_signer("owner")
    assert acon("image", "sign", bundle, "--key", owner.key, "--cert", owner.certificate) == 0
    capsys.readouterr()
    assert acon("image", "show", bundle, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    digest = hashlib.sha384((bundle / "manifest.json").read_bytes()).hexdigest()
    assert shown["image_id"] == f"{owner.signer_id}/{digest}"
    assert shown["signature"] == "right"


def test_show_says_that_a_changed_manifest_is_not_what_was_signed(
    bundle: Path, make_signer: MakeSigner, acon: Acon, capsys: pytest.CaptureFixture[str]
) -> None:
    owner = make_signer("owner")
    assert acon("image", "sign", bundle, "--key", owner.key, "--cert", owner.certificate) == 0
    manifest = bundle / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b"LEVEL=info", b"LEVEL=warn"))
    capsys.readouterr()
    assert acon("image", "show", bundle) == 1
    assert "signature   WRONG" in capsys.readouterr().out


def test_a_certificate_signed_with_sha256_is_refused_and_nothing_is_written(
    bundle: Path, make_signer: MakeSigner, acon: Acon
) -> None:
    weak = make_signer("weak", hash_algorithm=hashes.SHA256())
    assert acon("image", "sign", bundle, "--key", weak.key, "--cert", weak.certificate) == 1
    assert not (bundle / "signature").exists()


def test_the_key_must_be_the_certificates(
    bundle: Path, make_signer: MakeSigner, acon: Acon
) -> None:
    owner, other = make_signer("owner"), make_signer("other")
    assert acon("image", "sign", bundle, "--key", other.key, "--cert", owner.certificate) == 2
    assert not (bundle / "signature").exists()


def test_a_signature_made_by_openssl_is_taken_and_one_of_other_bytes_refused(
    bundle: Path, tmp_path: Path, make_signer: MakeSigner, acon: Acon
) -> None:
    owner = make_signer("owner")
    right, wrong = tmp_path / "right.sig", tmp_path / "wrong.sig"
    for output, of in ((right, bundle / "manifest.json"), (wrong, bundle / "sources.json")):
        subprocess.run(
            ["openssl", "dgst", "-sha384", "-sign", owner.key, "-out", output, of], check=True
        )
    sign = ("image", "sign", bundle, "--cert", owner.certificate, "--signature")
    assert acon(*sign, wrong) == 1
    assert not (bundle / "signature").exists()
    assert acon(*sign, right) == 0
    assert (bundle / "signature").read_bytes() == right.read_bytes()
    assert acon("image", "show", bundle) == 0


def test_a_manifest_edited_by_hand_is_brought_into_the_signed_form(
    bundle: Path, make_signer: MakeSigner, acon: Acon
) -> None:
    owner = make_signer("owner")
    before = (bundle / "manifest.json").read_bytes()
    (bundle / "manifest.json").write_text(json.dumps(manifest_of(bundle), indent=4))
    assert acon("image", "sign", bundle, "--key", owner.key, "--cert", owner.certificate) == 0
    assert (bundle / "manifest.json").read_bytes() == before


def test_delegating_replaces_the_digest_and_drops_signature_and_source(
    bundle: Path, make_signer: MakeSigner, acon: Acon, capsys: pytest.CaptureFixture[str]
) -> None:
    owner, csp = make_signer("owner"), make_signer("csp")
    assert acon("image", "sign", bundle, "--key", owner.key, "--cert", owner.certificate) == 0
    before = manifest_of(bundle)["layers"]
    assert isinstance(before, list)
    to = f"{csp.certificate}:python:2"
    assert acon("image", "delegate", bundle, "--layer", "0", "--to", to) == 0
    assert "sign again" in capsys.readouterr().err
    reference = f"signer/{csp.signer_id}/python:2"
    assert manifest_of(bundle)["layers"] == [reference, before[1]]
    assert not (bundle / "signature").exists()
    assert list(Bundle(bundle).sources()) == [before[1]]


def test_a_signer_may_be_given_by_id(bundle: Path, make_signer: MakeSigner, acon: Acon) -> None:
    signer = make_signer("csp").signer_id
    assert acon("image", "delegate", bundle, "--layer", "1", "--to", f"{signer}/python:2") == 0
    layers = manifest_of(bundle)["layers"]
    assert isinstance(layers, list)
    assert layers[1] == f"signer/{signer}/python:2"


@pytest.mark.parametrize(
    ("layer", "to"),
    [
        ("2", "sha384/" + "0" * 96 + "/python:2"),
        ("0", "sha384/short/python:2"),
        ("0", "python:2"),
        ("0", "sha256/" + "0" * 64 + "/python:2"),
        ("0", "sha384/" + "0" * 96 + "/.."),
    ],
)
def test_a_delegation_to_nothing_changes_nothing(
    layer: str, to: str, bundle: Path, acon: Acon
) -> None:
    before = (bundle / "manifest.json").read_bytes()
    assert acon("image", "delegate", bundle, "--layer", layer, "--to", to) == 2
    assert (bundle / "manifest.json").read_bytes() == before


def test_a_vendor_names_a_layer_of_an_oci_image_and_signs_it(
    tmp_path: Path, make_layout: MakeLayout, make_signer: MakeSigner, acon: Acon
) -> None:
    csp = make_signer("csp")
    layout = make_layout("python", [LOWER], tag="3")
    made = tmp_path / "python-3"
    aliases = ("--alias", "python:3", "--alias", "python:2")
    assert acon("vendor", "make", f"oci:{layout}:3", *aliases, "-o", made) == 0
    digest = f"sha384/{hashlib.sha384(LOWER).hexdigest()}"
    manifest = manifest_of(made)
    assert manifest["layers"] == [digest]
    assert manifest["aliases"] == {"contents": {digest: ["python:3", "python:2"]}}
    assert manifest["entrypoint"] == []
    assert acon("vendor", "sign", made, "--key", csp.key, "--cert", csp.certificate) == 0
    assert acon("image", "show", made) == 0


def test_a_vendor_may_name_a_plain_tar(tmp_path: Path, acon: Acon) -> None:
    (tmp_path / "layer.tar").write_bytes(UPPER)
    made = tmp_path / "made"
    assert acon("vendor", "make", tmp_path / "layer.tar", "--alias", "x:1", "-o", made) == 0
    found = Bundle(made)
    ((reference, source),) = found.sources().items()
    assert reference == f"sha384/{hashlib.sha384(UPPER).hexdigest()}"
    assert isinstance(source, FileBlob)
    assert Path(source.file).read_bytes() == UPPER


def test_a_file_wins_over_a_reference_of_the_same_name(
    tmp_path: Path, acon: Acon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("oci:layer.tar").write_bytes(UPPER)
    assert acon("vendor", "make", "oci:layer.tar", "--alias", "x:1", "-o", "made") == 0
    assert list(Bundle(Path("made")).sources()) == [f"sha384/{hashlib.sha384(UPPER).hexdigest()}"]


def test_sources_of_registries_are_kept_as_they_are(tmp_path: Path) -> None:
    source = RegistryBlob(
        registry="registry.example.org",
        repository="team/app",
        blob_digest=f"sha256:{'0' * 64}",
        media_type="application/vnd.oci.image.layer.v1.tar+gzip",
        size_bytes=7,
    )
    bundle = Bundle(tmp_path)
    bundle.write_sources({"sha384/00": source})
    assert bundle.sources() == {"sha384/00": source}


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b'{"layers": {"x": {"type": "oci"}}}',
        b'{"layers": {"x": {"type": "file", "file": "a", "media_type": "", "size_bytes": -1}}}',
        b'{"layers": {"x": {"type":"file","file": "\\u0000", "media_type": "", "size_bytes": 1}}}',
        b'{"layers": {}, "more": 1}',
        b'{"layers": ' + b"[" * 100_000,
    ],
)
def test_sources_of_another_form_are_refused_by_name(raw: bytes, tmp_path: Path) -> None:
    bundle = Bundle(tmp_path)
    bundle.sources_file.write_bytes(raw)
    with pytest.raises(UsageError) as caught:
        bundle.sources()
    assert caught.value.item == str(bundle.sources_file)


def test_a_vendors_source_must_be_one_layer_and_a_tar(
    tmp_path: Path, make_layout: MakeLayout, acon: Acon
) -> None:
    (tmp_path / "no.tar").write_bytes(b"x" * 2048)
    two = make_layout("two", [LOWER, UPPER])
    for source in (tmp_path / "no.tar", f"oci:{two}", tmp_path / "absent.tar"):
        assert acon("vendor", "make", source, "--alias", "x:1", "-o", tmp_path / "m") == 2
        assert not (tmp_path / "m" / "manifest.json").exists()


def test_a_vendor_signs_no_program(bundle: Path, make_signer: MakeSigner, acon: Acon) -> None:
    csp = make_signer("csp")
    assert acon("vendor", "sign", bundle, "--key", csp.key, "--cert", csp.certificate) == 2
    assert not (bundle / "signature").exists()
