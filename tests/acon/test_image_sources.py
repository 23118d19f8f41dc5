"""One image in every form in which owners have it: `acon image convert` makes the same of it."""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from acon_helpers import Acon, tar_of
from local_registry import LocalRegistry
from peers import OciLayout, Podman, Skopeo, run_tool, write_layout

from acon.bundle import Bundle
from acon.images.documents import host_platform
from acon.layer_bytes import hash_layer
from supervisor.seams import FileBlob, RegistryBlob

NAME = "example.org/team/app:1"
# Who made the archive: skopeo and podman differ in tags, compression and links.
Make = Callable[[OciLayout, Path], str]


@pytest.fixture
def converted(tmp_path: Path, acon: Acon) -> Callable[..., Bundle]:
    """Converts a source into a new bundle; further words are options."""

    def convert(source: str, *options: object) -> Bundle:
        folder = tmp_path / f"bundle-{len(list(tmp_path.glob('bundle-*')))}"
        assert acon("image", "convert", source, "-o", folder, *options) == 0
        return Bundle(folder)

    return convert


def check(bundle: Bundle, layout: OciLayout) -> None:
    """The manifest names the layout's tars, and the files that are named hold them."""
    layers = bundle.manifest_object()["layers"]
    assert layers == list(layout.diff_ids())
    sources = bundle.sources()
    assert set(sources) == set(layout.diff_ids())
    for (name, source), tar in zip(
        ((name, sources[name]) for name in layout.diff_ids()), layout.tars, strict=True
    ):
        assert isinstance(source, FileBlob)
        assert source.tar_size_bytes == len(tar)
        assert str(hash_layer(source).digest("sha384")) == name


def test_a_layout_with_gzip_zstd_and_plain_layers_is_converted(
    mixed_layout: OciLayout, converted: Callable[..., Bundle]
) -> None:
    check(converted(mixed_layout.reference), mixed_layout)


def test_archives_made_by_skopeo_give_the_manifest_of_the_layout(
    gzip_layout: OciLayout, skopeo: Skopeo, converted: Callable[..., Bundle], tmp_path: Path
) -> None:
    expected = converted(gzip_layout.reference).manifest_bytes()
    docker, oci = tmp_path / "docker.tar", tmp_path / "oci.tar"
    skopeo.copy(gzip_layout.reference, f"docker-archive:{docker}:{NAME}")
    skopeo.copy(gzip_layout.reference, f"oci-archive:{oci}:{NAME}")
    for source in (
        f"docker-archive:{docker}",
        f"docker-archive:{docker}:{NAME}",
        f"oci-archive:{oci}",
        f"oci-archive:{oci}:{NAME}",
    ):
        bundle = converted(source)
        assert bundle.manifest_bytes() == expected
        check(bundle, gzip_layout)


@pytest.mark.root
def test_archives_and_layouts_made_by_podman_give_the_manifest_of_the_layout(
    gzip_layout: OciLayout, podman: Podman, converted: Callable[..., Bundle], tmp_path: Path
) -> None:
    expected = converted(gzip_layout.reference).manifest_object()
    image = podman.pull(gzip_layout.reference)
    podman.run("tag", image, NAME)
    for transport, kind in (
        ("docker-archive", "docker-archive"),
        ("oci-archive", "oci-archive"),
        ("oci", "oci-dir"),
    ):
        place = podman.save(NAME, tmp_path / kind, archive_format=kind)
        bundle = converted(f"{transport}:{place}")
        assert bundle.manifest_object() == expected
        check(bundle, gzip_layout)


def test_a_layout_that_umoci_wrote_is_converted(
    gzip_layout: OciLayout, tmp_path: Path, converted: Callable[..., Bundle]
) -> None:
    if shutil.which("umoci") is None:
        pytest.skip("needs umoci (Debian: umoci)")
    image = ["--image", f"{gzip_layout.directory}:{gzip_layout.tag}"]
    run_tool(["umoci", "config", *image, "--tag", "2", "--config.entrypoint", "/other"])
    added = tmp_path / "added"
    added.write_bytes(b"by umoci\n")
    run_tool(["umoci", "insert", *image[:1], f"{gzip_layout.directory}:2", str(added), "/added"])
    bundle = converted(f"oci:{gzip_layout.directory}:2")
    layers = bundle.manifest_object()["layers"]
    assert isinstance(layers, list)
    assert layers[:2] == list(gzip_layout.diff_ids())
    assert len(layers) == 3
    assert bundle.manifest_object()["entrypoint"] == ["/other"]


@pytest.mark.parametrize("compression", ["zstd", "zstd:chunked", "gzip"])
def test_layers_that_skopeo_compressed_anew_are_converted(
    compression: str,
    skopeo: Skopeo,
    converted: Callable[..., Bundle],
    tmp_path: Path,
) -> None:
    # Whoever compresses to zstd:chunked ends the tar with two blocks of zeros, however many
    # there were: with more, what skopeo wrote is no longer the diff_id, and is refused.
    tar = tar_of({"etc/name": b"a name\n" * 1000}).rstrip(b"\0")
    tar += bytes(-len(tar) % 512 + 1024)
    layout = write_layout(tmp_path / "layout", [(tar, "none")])
    anew = f"oci:{tmp_path / 'anew'}:1"
    skopeo.copy(layout.reference, anew, options=["--dest-compress-format", compression])
    bundle = converted(anew)
    check(bundle, layout)
    (source,) = bundle.sources().values()
    assert source.media_type.endswith(f"+{compression.partition(':')[0]}")


def test_a_layer_of_a_docker_archive_may_be_compressed(
    mixed_layout: OciLayout, converted: Callable[..., Bundle], tmp_path: Path
) -> None:
    """As other builders than Docker write them; nothing but the bytes says so."""
    archive = tmp_path / "compressed.tar"
    blobs = mixed_layout.directory / "blobs" / "sha256"
    manifest = json.loads((blobs / str(mixed_layout.manifest["digest"])[7:]).read_bytes())
    config = manifest["config"]["digest"][7:]
    listed = {
        "Config": f"blobs/sha256/{config}",
        "RepoTags": None,
        "Layers": [f"blobs/sha256/{str(one['digest'])[7:]}" for one in mixed_layout.layers],
    }
    (tmp_path / "manifest.json").write_text(json.dumps([listed]))
    with tarfile.open(archive, "w") as tar:
        tar.add(tmp_path / "manifest.json", "manifest.json")
        tar.add(mixed_layout.directory / "blobs", "blobs")
    check(converted(f"docker-archive:{archive}"), mixed_layout)


def test_an_image_in_a_registry_is_converted_and_its_sources_lead_there(
    mixed_layout: OciLayout,
    shared_registry: LocalRegistry,
    skopeo: Skopeo,
    converted: Callable[..., Bundle],
) -> None:
    expected = converted(mixed_layout.reference).manifest_bytes()
    reference = skopeo.push(mixed_layout, shared_registry, "sources/mixed")
    by_digest = f"{reference.rpartition(':')[0]}@{mixed_layout.manifest['digest']}"
    for source in (reference, by_digest):
        bundle = converted(source)
        assert bundle.manifest_bytes() == expected
        sources = bundle.sources()
        for name, tar, layer in zip(
            mixed_layout.diff_ids(), mixed_layout.tars, mixed_layout.layers, strict=True
        ):
            assert sources[name] == RegistryBlob(
                registry=shared_registry.name,
                repository="sources/mixed",
                blob_digest=str(layer["digest"]),
                media_type=str(layer["mediaType"]),
                size_bytes=int(str(layer["size"])),
                tar_size_bytes=len(tar),
            )


def test_dockers_own_media_types_and_lists_of_platforms_are_read_from_a_registry(
    gzip_layout: OciLayout,
    shared_registry: LocalRegistry,
    skopeo: Skopeo,
    converted: Callable[..., Bundle],
    acon: Acon,
    tmp_path: Path,
) -> None:
    expected = converted(gzip_layout.reference).manifest_bytes()
    single = shared_registry.reference("sources/docker", "single")
    schema_2 = ["--format", "v2s2"]
    skopeo.copy(gzip_layout.reference, single, target_registry=shared_registry, options=schema_2)
    bundle = converted(single)
    assert bundle.manifest_bytes() == expected
    for source in bundle.sources().values():
        assert source.media_type == "application/vnd.docker.image.rootfs.diff.tar.gzip"
    listed = shared_registry.reference("sources/docker", "list")
    put_list(shared_registry, "sources/docker", "list", of="single")
    assert converted(listed).manifest_bytes() == expected
    assert converted(listed, "--platform", host_platform()).manifest_bytes() == expected
    other = ("--platform", "linux/riscv64")
    assert acon("image", "convert", listed, "-o", tmp_path / "none", *other) == 2
    assert not (tmp_path / "none").exists()


def put_list(registry: LocalRegistry, repository: str, tag: str, *, of: str) -> None:
    """A Docker manifest list that holds the image tagged `of`, for this machine."""
    base = f"{registry.url}/v2/{repository}/manifests/"
    kind = "application/vnd.docker.distribution.manifest"
    image = httpx.get(base + of, headers={"accept": f"{kind}.v2+json"})
    system, architecture = host_platform().split("/")
    entry = {
        "mediaType": f"{kind}.v2+json",
        "digest": f"sha256:{hashlib.sha256(image.content).hexdigest()}",
        "size": len(image.content),
        "platform": {"os": system, "architecture": architecture},
    }
    whole = {"schemaVersion": 2, "mediaType": f"{kind}.list.v2+json", "manifests": [entry]}
    headers = {"content-type": f"{kind}.list.v2+json"}
    httpx.put(base + tag, json=whole, headers=headers).raise_for_status()


def test_a_private_registry_is_reached_with_its_authority_and_its_login(
    gzip_layout: OciLayout,
    private_registry: LocalRegistry,
    skopeo: Skopeo,
    converted: Callable[..., Bundle],
    acon: Acon,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference = skopeo.push(gzip_layout, private_registry, "private/app")
    expected = converted(gzip_layout.reference).manifest_bytes()
    ca, login = ("--registry-ca", private_registry.ca_file), private_registry.auth_file
    assert converted(reference, *ca, "--authfile", login).manifest_bytes() == expected
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(login))
    assert converted(reference, *ca).manifest_bytes() == expected
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "none.json"))
    (tmp_path / "none.json").write_text("{}")
    for options in (ca, ("--authfile", login), ("--plain-http",)):
        assert acon("image", "convert", reference, "-o", tmp_path / "b", *options) == 1
        assert not (tmp_path / "b" / "manifest.json").exists()


@pytest.mark.parametrize("how", ["oci", "oci-archive", "docker-archive", "docker"])
def test_a_vendor_takes_a_layer_from_every_source(
    how: str,
    make_layout: Callable[..., Path],
    skopeo: Skopeo,
    shared_registry: LocalRegistry,
    acon: Acon,
    tmp_path: Path,
) -> None:
    tar = tmp_path / "layer.tar"
    with tarfile.open(tar, "w") as archive:
        archive.add(Path(__file__), "lib/python")
    layout = f"oci:{make_layout('one', [tar.read_bytes()])}:1"
    target = {
        "oci": layout,
        "oci-archive": f"oci-archive:{tmp_path}/a.tar:1",
        "docker-archive": f"docker-archive:{tmp_path}/d.tar:{NAME}",
        "docker": shared_registry.reference("sources/vendor"),
    }[how]
    if how != "oci":
        to = shared_registry if how == "docker" else None
        skopeo.copy(layout, target, target_registry=to)
    names = ("--alias", "python:1")
    assert acon("vendor", "make", target, *names, "-o", tmp_path / "image") == 0
    assert acon("vendor", "make", tar, *names, "-o", tmp_path / "tar") == 0
    made, expected = Bundle(tmp_path / "image"), Bundle(tmp_path / "tar")
    assert made.manifest_bytes() == expected.manifest_bytes()
    assert set(made.sources()) == set(expected.sources())
