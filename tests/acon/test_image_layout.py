"""OCI layouts, in folders and archives: which image is meant, and what refers to it."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from acon_helpers import MakeLayout, tar_of

from acon.arguments import RegistryAccess
from acon.errors import UsageError
from acon.images.documents import OCI_INDEX, OCI_MANIFEST, Descriptor
from acon.images.image import open_image, open_repository
from acon.images.reference import parse_reference
from supervisor.formats.errors import DigestMismatch, FormatError, Refusal
from supervisor.seams import FileBlob

TAR = tar_of({"app": b"program"})
ACCESS = RegistryAccess()
REF_NAME = "org.opencontainers.image.ref.name"
KIND = "application/vnd.example.sbom"


class LayoutEditor:
    """Changes a layout as its owner could, digests and all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.blobs = folder / "blobs" / "sha256"

    def put(self, value: object) -> dict[str, object]:
        """Store a document; returns what a descriptor says of it."""
        raw = value if isinstance(value, bytes) else json.dumps(value).encode()
        digest = hashlib.sha256(raw).hexdigest()
        (self.blobs / digest).write_bytes(raw)
        return {"digest": f"sha256:{digest}", "size": len(raw)}

    def index(self) -> list[dict[str, object]]:
        value = json.loads((self.folder / "index.json").read_text())
        assert isinstance(value["manifests"], list)
        return value["manifests"]

    def write_index(self, manifests: list[dict[str, object]]) -> None:
        value = {"schemaVersion": 2, "manifests": manifests}
        (self.folder / "index.json").write_text(json.dumps(value))

    def manifest(self) -> dict[str, object]:
        digest = str(self.index()[0]["digest"]).removeprefix("sha256:")
        value = json.loads((self.blobs / digest).read_text())
        assert isinstance(value, dict)
        return value

    def layer(self) -> dict[str, object]:
        """The only layer's descriptor."""
        layers = self.manifest()["layers"]
        assert isinstance(layers, list) and len(layers) == 1
        return dict(layers[0])

    def replace_manifest(self, **fields: object) -> None:
        changed = self.put({**self.manifest(), **fields})
        self.write_index([{**self.index()[0], **changed}])


@pytest.fixture
def editor(make_layout: MakeLayout) -> LayoutEditor:
    return LayoutEditor(make_layout("app", [TAR]))


async def refused(source: str, platform_name: str | None = None) -> Refusal:
    with pytest.raises(Refusal) as caught:
        await open_image(parse_reference(source), platform_name=platform_name, access=ACCESS)
    return caught.value


async def test_an_index_of_several_platforms_gives_the_one_that_is_asked_for(
    editor: LayoutEditor,
) -> None:
    image = editor.index()[0]
    other = editor.put({**editor.manifest(), "annotations": {"for": "arm64"}})

    def for_platform(entry: dict[str, object], architecture: str) -> dict[str, object]:
        platform = {"os": "linux", "architecture": architecture}
        kept = {key: value for key, value in entry.items() if key != "annotations"}
        return {**kept, "mediaType": OCI_MANIFEST, "platform": platform}

    listed = [for_platform(image, "amd64"), for_platform(other, "riscv64")]
    inner = editor.put({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": listed})
    editor.write_index([{**inner, "mediaType": OCI_INDEX, "annotations": {REF_NAME: "all"}}])
    reference = parse_reference(f"oci:{editor.folder}:all")
    found = await open_image(reference, platform_name="linux/amd64", access=ACCESS)
    assert found.manifest.digest == image["digest"]
    error = await refused(f"oci:{editor.folder}:all", "linux/s390x")
    assert error.actual == "linux/amd64, linux/riscv64"


async def test_a_lone_image_for_another_platform_than_was_asked_for_is_refused(
    editor: LayoutEditor,
) -> None:
    reference = parse_reference(f"oci:{editor.folder}")
    found = await open_image(reference, platform_name=None, access=ACCESS)
    assert str(found.platform) == "linux/amd64"
    error = await refused(f"oci:{editor.folder}", "linux/arm64")
    assert (error.expected, error.actual) == ("linux/arm64", "linux/amd64")


async def test_signatures_beside_the_only_image_need_no_tag(editor: LayoutEditor) -> None:
    image = editor.index()[0]
    subject = {key: image[key] for key in ("mediaType", "digest", "size")}
    artifact = {
        "mediaType": OCI_MANIFEST,
        "artifactType": KIND,
        "config": {"mediaType": "application/vnd.oci.empty.v1+json", **editor.put({})},
        "layers": [],
        "subject": subject,
        "annotations": {"made": "here"},
    }
    stored = editor.put(artifact)
    editor.write_index([image, {**stored, "mediaType": OCI_MANIFEST}])
    reference = parse_reference(f"oci:{editor.folder}")
    found = await open_image(reference, platform_name=None, access=ACCESS)
    assert found.manifest.digest == image["digest"]
    async with open_repository(reference, ACCESS) as repository:
        expected = Descriptor(
            media_type=OCI_MANIFEST,
            digest=str(stored["digest"]),
            size=int(str(stored["size"])),
            artifact_type=KIND,
            annotations={"made": "here"},
        )
        assert await repository.referrers(str(image["digest"])) == (expected,)
        assert await repository.referrers(str(image["digest"]), KIND) == (expected,)
        assert await repository.referrers(str(image["digest"]), "other/type") == ()
        assert await repository.referrers(str(stored["digest"])) == ()


async def test_referrers_are_found_in_a_copied_fallback_tag_too(editor: LayoutEditor) -> None:
    image = editor.index()[0]
    subject = {key: image[key] for key in ("mediaType", "digest", "size")}
    stored = editor.put({**editor.manifest(), "artifactType": KIND, "subject": subject})
    absent = {"mediaType": OCI_MANIFEST, "digest": "sha256:" + "0" * 64, "size": 1}
    fallback = {"manifests": [{**stored, "mediaType": OCI_MANIFEST}, absent]}
    tag = str(image["digest"]).replace(":", "-")
    entry = {"mediaType": OCI_INDEX, "annotations": {REF_NAME: tag}, **editor.put(fallback)}
    editor.write_index([image, entry])
    async with open_repository(parse_reference(f"oci:{editor.folder}"), ACCESS) as repository:
        (found,) = await repository.referrers(str(image["digest"]), KIND)
    assert found.digest == stored["digest"]


async def test_several_images_need_a_tag_and_are_listed(
    editor: LayoutEditor, make_layout: MakeLayout
) -> None:
    image = editor.index()[0]
    second = {**image, **editor.put({**editor.manifest(), "annotations": {"number": "2"}})}
    second["annotations"] = {REF_NAME: "2"}
    editor.write_index([image, second])
    assert (await refused(f"oci:{editor.folder}")).actual == "images 1, 2"
    assert (await refused(f"oci:{editor.folder}:3")).rule == "must hold one image 3"
    reference = parse_reference(f"oci:{editor.folder}:2")
    found = await open_image(reference, platform_name=None, access=ACCESS)
    assert found.manifest.digest == second["digest"]


@pytest.mark.parametrize(
    ("media_type", "rule"),
    [
        ("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", "foreign"),
        ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "foreign"),
        ("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", "encrypted"),
    ],
)
async def test_layers_that_cannot_be_read_are_refused_with_the_reason(
    media_type: str, rule: str, editor: LayoutEditor
) -> None:
    editor.replace_manifest(layers=[{**editor.layer(), "mediaType": media_type}])
    error = await refused(f"oci:{editor.folder}")
    assert rule in error.rule
    assert "layer 0" in error.item


async def test_an_artifact_is_no_image(editor: LayoutEditor) -> None:
    config = {**editor.put({}), "mediaType": "application/vnd.cncf.helm.config.v1+json"}
    editor.replace_manifest(config=config)
    assert "not another artifact" in (await refused(f"oci:{editor.folder}")).rule


async def test_a_blob_of_another_size_is_refused_before_it_is_read(editor: LayoutEditor) -> None:
    digest = str(editor.layer()["digest"]).removeprefix("sha256:")
    blob = editor.blobs / digest
    blob.write_bytes(blob.read_bytes() + b"\0")
    error = await refused(f"oci:{editor.folder}")
    assert isinstance(error, FormatError)
    assert digest in error.item


@pytest.mark.parametrize("part", ["config", "manifest"])
async def test_a_document_of_another_digest_is_refused(part: str, editor: LayoutEditor) -> None:
    config = editor.manifest()["config"]
    assert isinstance(config, dict)
    digest = str({"config": config, "manifest": editor.index()[0]}[part]["digest"])
    blob = editor.blobs / digest.removeprefix("sha256:")
    blob.write_bytes(blob.read_bytes()[:-1] + b" ")
    error = await refused(f"oci:{editor.folder}")
    assert isinstance(error, DigestMismatch)
    assert error.expected == digest


async def test_a_layout_of_a_coming_version_is_refused(editor: LayoutEditor) -> None:
    (editor.folder / "oci-layout").write_text('{"imageLayoutVersion": "2.0.0"}')
    assert (await refused(f"oci:{editor.folder}")).actual == "2.0.0"


async def test_a_pipe_in_a_files_place_makes_nobody_wait(editor: LayoutEditor) -> None:
    (editor.folder / "index.json").unlink()
    os.mkfifo(editor.folder / "index.json")
    assert isinstance(await refused(f"oci:{editor.folder}"), UsageError)


async def test_an_index_of_too_many_manifests_is_refused_when_all_must_be_read(
    editor: LayoutEditor,
) -> None:
    editor.write_index(editor.index() * 1025)
    async with open_repository(parse_reference(f"oci:{editor.folder}"), ACCESS) as repository:
        with pytest.raises(FormatError, match="bounded number"):
            await repository.referrers("sha256:" + "0" * 64)


async def test_an_archive_of_a_layout_is_read_where_it_lies(
    editor: LayoutEditor, tmp_path: Path
) -> None:
    archive = tmp_path / "layout.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(editor.folder, ".")
    in_folder, in_archive = [
        await open_image(parse_reference(source), platform_name=None, access=ACCESS)
        for source in (f"oci:{editor.folder}", f"oci-archive:{archive}:1")
    ]
    assert in_archive.manifest == in_folder.manifest
    for one, other in zip(in_folder.layers, in_archive.layers, strict=True):
        assert isinstance(one.source, FileBlob) and isinstance(other.source, FileBlob)
        assert one.diff_id == other.diff_id
        with archive.open("rb") as file:
            file.seek(other.source.offset_bytes)
            assert file.read(other.source.size_bytes) == Path(one.source.file).read_bytes()


@pytest.fixture
def empty_folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "empty").mkdir()
    yield tmp_path / "empty"


async def test_a_place_of_another_kind_is_wrong_usage(empty_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    for source in (
        f"oci:{empty_folder}",
        f"oci:{tmp_path / 'file'}",
        f"oci-archive:{empty_folder}",
        f"docker-archive:{empty_folder}",
        f"acon-repo:{empty_folder}",
    ):
        assert isinstance(await refused(source), UsageError)
