"""ACON's own repository, as its client made it: what is signed there is taken as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from acon_helpers import Acon

from acon.bundle import Bundle
from acon.errors import UsageError
from acon.images.acon_repository import AconRepository
from acon.layer_bytes import hash_layer
from supervisor.errors import UnknownItem
from supervisor.formats.errors import DigestMismatch, FormatError, SignatureInvalid

VENDOR = (
    "ac3152d6492cf47ae3231c9b4251879a380b849a6578eb20"
    "aa0be34e0af232bf0892c59ec549084672e30d76d21fc946"
)
OWNER = (
    "b1c8b25c5c8601fee394e2edff9102ade1964b175928f697"
    "bcaa16d68230fc155fc53b8faced81e711ce397ec6d21fed"
)
SIGNER = (
    "e8304c387d050a2bda1699e93d762ede308c2fbaae9bd630"
    "b3973ac6d10696bd443f9d2894e74d9e1cd3015963ad77c7"
)
BUSYBOX = (
    "sha384/e1a42254892e1fc70efa7de64f5f12a22da1c9831983"
    "b613653bf08fc60e9c6fde65500876ddc7527fe0ba631bc9a4db"
)


@pytest.fixture
def folder(vectors: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return Path(shutil.copytree(vectors / "acon" / "aconcli_repo", tmp_path / "repo"))


def manifest_folder(folder: Path, digest: str) -> Path:
    return folder / "manifests" / "sha384" / digest


def test_every_image_is_verified_in_the_form_that_its_client_signed(folder: Path) -> None:
    images = AconRepository(folder).images()
    assert {image.signed.image_id.manifest for image in images} == {VENDOR, OWNER}
    for image in images:
        pretty = (
            manifest_folder(folder, image.signed.image_id.manifest) / "acon.json"
        ).read_bytes()
        assert image.signed.manifest_bytes != pretty
        assert json.loads(image.signed.manifest_bytes) == json.loads(pretty)


def test_layers_that_are_there_are_found_and_are_what_the_manifests_name(folder: Path) -> None:
    images = AconRepository(folder).images()
    found = {name: source for image in images for name, source in image.layer_files.items()}
    assert len(found) == 2
    for name, source in found.items():
        digests = hash_layer(source)
        assert str(digests.digest("sha384")) == name
        assert digests.size_bytes == source.tar_size_bytes


def test_convert_makes_a_signed_bundle_of_it(folder: Path, acon: Acon, tmp_path: Path) -> None:
    (signed,) = [
        image.signed
        for image in AconRepository(folder).images()
        if image.signed.image_id.manifest == OWNER
    ]
    source = f"acon-repo:{folder}:{signed.image_id}"
    assert acon("image", "convert", source, "-o", tmp_path / "bundle") == 0
    bundle = Bundle(tmp_path / "bundle")
    assert bundle.signed() == signed
    (layer,) = bundle.sources()
    assert str(signed.manifest.layers[1]) == layer
    assert acon("image", "show", tmp_path / "bundle") == 0


@pytest.mark.parametrize(
    "options",
    [("--name", "x:1"), ("--writable",), ("--max-instances", "2"), ("--accept", "sha384/*/*")],
)
def test_what_is_signed_cannot_be_shaped(
    options: tuple[str, ...],
    folder: Path,
    acon: Acon,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = f"acon-repo:{folder}:sha384/{SIGNER}/{VENDOR}"
    assert acon("image", "convert", source, "-o", tmp_path / "b", *options, "--json") == 2
    assert json.loads(capsys.readouterr().out)["error"]["actual"] == options[0]
    assert not (tmp_path / "b").exists()


def test_convert_says_which_layers_the_repository_lacks(
    folder: Path, acon: Acon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "blobs" / f"{BUSYBOX}.tar").unlink()
    source = f"acon-repo:{folder}:sha384/{SIGNER}/{VENDOR}"
    assert acon("image", "convert", source, "-o", tmp_path / "b", "--json") == 0
    (note,) = json.loads(capsys.readouterr().out)["notes"]
    assert BUSYBOX in note


def test_a_vendor_may_give_names_to_a_layer_of_it(folder: Path, acon: Acon, tmp_path: Path) -> None:
    source = f"acon-repo:{folder}:sha384/{SIGNER}/{VENDOR}"
    assert acon("vendor", "make", source, "--alias", "busybox:2", "-o", tmp_path / "b") == 0
    bundle = Bundle(tmp_path / "b")
    assert bundle.manifest_object()["layers"] == [BUSYBOX]
    assert set(bundle.sources()) == {BUSYBOX}


def test_a_changed_layer_is_refused(folder: Path, acon: Acon, tmp_path: Path) -> None:
    layer = folder / "blobs" / f"{BUSYBOX}.tar"
    raw = bytearray(layer.read_bytes())
    raw[5000] ^= 1
    layer.write_bytes(raw)
    source = f"acon-repo:{folder}:sha384/{SIGNER}/{VENDOR}"
    assert acon("vendor", "make", source, "--alias", "busybox:2", "-o", tmp_path / "b") == 1
    assert not (tmp_path / "b" / "manifest.json").exists()


def test_one_of_several_images_is_chosen_by_its_id(folder: Path) -> None:
    repository = AconRepository(folder)
    with pytest.raises(UsageError, match="exactly one image") as caught:
        repository.image()
    assert VENDOR in str(caught.value.actual) and OWNER in str(caught.value.actual)
    with pytest.raises(UnknownItem):
        repository.image(f"sha384/{SIGNER}/{'0' * 96}")
    shutil.rmtree(manifest_folder(folder, OWNER))
    assert repository.image().signed.image_id.manifest == VENDOR


def test_a_changed_manifest_is_refused(folder: Path) -> None:
    file = manifest_folder(folder, OWNER) / "acon.json"
    file.write_bytes(file.read_bytes().replace(b'"A=1"', b'"A=2"'))
    with pytest.raises(SignatureInvalid):
        AconRepository(folder).images()


def test_an_image_in_the_folder_of_another_is_refused(folder: Path) -> None:
    other = manifest_folder(folder, "0" * 96)
    manifest_folder(folder, OWNER).rename(other)
    with pytest.raises(DigestMismatch) as caught:
        AconRepository(folder).images()
    assert caught.value.expected == f"sha384/{'0' * 96}"
    assert caught.value.actual == f"sha384/{OWNER}"


@pytest.mark.parametrize(
    ("name", "content"),
    [("acon.json", b"{" * 1000), ("acon.json", b'{"a":1,"a":2}'), ("signer.cer", b"x")],
)
def test_files_of_another_form_are_refused(name: str, content: bytes, folder: Path) -> None:
    (manifest_folder(folder, OWNER) / name).write_bytes(content)
    with pytest.raises(FormatError):
        AconRepository(folder).images()


def test_files_of_any_size_are_refused_before_they_are_read(folder: Path) -> None:
    for name in ("acon.json", "signature", "signer.cer"):
        file = manifest_folder(folder, OWNER) / name
        before = file.read_bytes()
        with file.open("r+b") as opened:
            opened.truncate(1 << 40)
        with pytest.raises(UsageError, match="too large") as caught:
            AconRepository(folder).images()
        assert caught.value.item == str(file)
        file.write_bytes(before)
