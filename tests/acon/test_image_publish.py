"""`acon image publish` against Debian's registry: what stands there afterwards, and what skopeo
makes of it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from acon_daemon import Bundles
from acon_helpers import Acon, MakeSigner, Signer
from local_registry import LocalRegistry
from peers import OciLayout, Skopeo, write_layout

from acon.bundle import Bundle
from acon.images import push
from acon.images.documents import host_platform

ARTIFACT = "application/vnd.acon.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
JsonObject = dict[str, object]


@pytest.fixture
def owner(make_signer: MakeSigner) -> Signer:
    return make_signer("owner")


@pytest.fixture
def signed(acon: Acon, owner: Signer, tmp_path: Path) -> Callable[..., Path]:
    """A signed bundle of an image."""

    def make(reference: str, *options: object, name: str = "bundle") -> Path:
        bundle = tmp_path / name
        assert acon("image", "convert", reference, "-o", bundle, *options) == 0
        keys = ("--key", owner.key, "--cert", owner.certificate)
        assert acon("image", "sign", bundle, *keys) == 0
        return bundle

    return make


@pytest.fixture
def publish(
    acon: Acon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., JsonObject]:
    """Publishes; returns what `--json` says."""
    # Nobody else writes to these repositories.
    monkeypatch.setattr(push, "_SETTLE_S", 0.01)

    def run(bundle: Path, reference: str, *options: object) -> JsonObject:
        capsys.readouterr()
        assert acon("image", "publish", bundle, reference, "--json", *options) == 0
        answer = json.loads(capsys.readouterr().out)
        assert isinstance(answer, dict)
        return answer

    return run


def document(registry: LocalRegistry, repository: str, reference: str) -> JsonObject:
    """A manifest or index as the registry has it."""
    url = f"{registry.url}/v2/{repository}/manifests/{reference}"
    answer = httpx.get(url, headers={"accept": f"{INDEX}, {MANIFEST}"}, trust_env=False)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert isinstance(found, dict)
    return found


def blob(registry: LocalRegistry, repository: str, digest: object) -> bytes:
    answer = httpx.get(f"{registry.url}/v2/{repository}/blobs/{digest}", trust_env=False)
    assert answer.status_code == 200, answer.text
    return answer.content


def digest_in(reference: object) -> str:
    return str(reference).rpartition("@")[2]


def stored(registry: LocalRegistry) -> dict[str, bytes]:
    return {
        str(path.relative_to(registry.storage)): path.read_bytes()
        for path in registry.storage.rglob("*")
        if path.is_file()
    }


def test_the_artifact_refers_to_the_image_and_holds_what_the_bundle_does(
    shared_registry: LocalRegistry,
    skopeo: Skopeo,
    mixed_layout: OciLayout,
    signed: Callable[..., Path],
    publish: Callable[..., JsonObject],
) -> None:
    reference = skopeo.push(mixed_layout, shared_registry, "publish/shape")
    bundle = signed(mixed_layout.reference)
    done = publish(bundle, reference)
    subject = mixed_layout.manifest["digest"]
    assert done["pushed_image"] is False
    assert digest_in(done["image"]) == subject

    artifact = document(shared_registry, "publish/shape", digest_in(done["artifact"]))
    assert artifact["artifactType"] == ARTIFACT
    assert artifact["subject"] == mixed_layout.manifest
    config, layers = artifact["config"], artifact["layers"]
    assert isinstance(config, dict) and isinstance(layers, list)
    assert config["mediaType"] == "application/vnd.oci.empty.v1+json"
    assert blob(shared_registry, "publish/shape", config["digest"]) == b"{}"
    contents = {
        layer["mediaType"]: blob(shared_registry, "publish/shape", layer["digest"])
        for layer in layers
    }
    assert contents.pop(ARTIFACT) == (bundle / "manifest.json").read_bytes()
    assert contents.pop("application/vnd.acon.signature.v1") == (bundle / "signature").read_bytes()
    assert contents.pop("application/pkix-cert") == (bundle / "cert.der").read_bytes()
    sources = json.loads(contents.pop("application/vnd.acon.sources.v1+json"))
    assert contents == {}
    assert sources["layers"] == {
        name: {
            "blob_digest": layer["digest"],
            "media_type": layer["mediaType"],
            "size_bytes": layer["size"],
            "tar_size_bytes": len(tar),
        }
        for name, layer, tar in zip(
            mixed_layout.diff_ids(), mixed_layout.layers, mixed_layout.tars, strict=True
        )
    }


def test_a_registry_without_the_referrers_api_gets_the_tag_that_lists_it(
    shared_registry: LocalRegistry,
    skopeo: Skopeo,
    gzip_layout: OciLayout,
    signed: Callable[..., Path],
    publish: Callable[..., JsonObject],
) -> None:
    reference = skopeo.push(gzip_layout, shared_registry, "publish/fallback")
    done = publish(signed(gzip_layout.reference), reference)
    tag = str(gzip_layout.manifest["digest"]).replace(":", "-")
    assert done["fallback_tag"] == tag
    index = document(shared_registry, "publish/fallback", tag)
    assert index["mediaType"] == INDEX
    listed = index["manifests"]
    assert isinstance(listed, list)
    assert [(one["digest"], one["artifactType"]) for one in listed] == [
        (digest_in(done["artifact"]), ARTIFACT)
    ]


def test_a_tag_that_is_not_there_is_made_of_the_bundles_layers_and_skopeo_reads_it(
    shared_registry: LocalRegistry,
    skopeo: Skopeo,
    mixed_layout: OciLayout,
    signed: Callable[..., Path],
    publish: Callable[..., JsonObject],
    tmp_path: Path,
) -> None:
    rules = ("--env", "LEVEL=low", "--env", "LEVEL=high", "--env", "FREE", "--env", "GONE=")
    bundle = signed(mixed_layout.reference, *rules)
    reference = shared_registry.reference("publish/whole")
    done = publish(bundle, reference)
    assert done["pushed_image"] is True
    copied = tmp_path / "copied"
    skopeo.copy(
        reference,
        f"oci:{copied}:1",
        source_registry=shared_registry,
        options=["--preserve-digests"],
    )
    config = json.loads(skopeo.run("inspect", "--config", "--raw", f"oci:{copied}:1"))
    assert config["rootfs"]["diff_ids"] == [
        f"sha256:{hashlib.sha256(tar).hexdigest()}" for tar in mixed_layout.tars
    ]
    assert config["config"]["Entrypoint"] == ["/bin/tool"]
    assert config["config"]["Env"] == ["PATH=/bin", "LEVEL=low"]
    manifest = document(shared_registry, "publish/whole", "1")
    # As they lie: nothing is compressed anew.
    assert manifest["layers"] == list(mixed_layout.layers)


def test_publishing_again_changes_nothing_and_sends_nothing(
    registry: LocalRegistry,
    mixed_layout: OciLayout,
    signed: Callable[..., Path],
    publish: Callable[..., JsonObject],
) -> None:
    bundle = signed(mixed_layout.reference)
    first = publish(bundle, registry.reference("app"))
    before = stored(registry)
    second = publish(bundle, registry.reference("app"))
    assert first["sent_bytes"] != 0
    assert second == {**first, "pushed_image": False, "sent_bytes": 0}
    assert stored(registry) == before


def test_a_layer_that_is_compressed_otherwise_there_is_found_by_its_diff_id(
    shared_registry: LocalRegistry,
    skopeo: Skopeo,
    gzip_layout: OciLayout,
    signed: Callable[..., Path],
    publish: Callable[..., JsonObject],
    tmp_path: Path,
) -> None:
    as_zstd = write_layout(tmp_path / "zstd", [(tar, "zstd") for tar in gzip_layout.tars])
    reference = skopeo.push(as_zstd, shared_registry, "publish/diff-id")
    done = publish(signed(gzip_layout.reference), reference)
    artifact = document(shared_registry, "publish/diff-id", digest_in(done["artifact"]))
    layers = artifact["layers"]
    assert isinstance(layers, list)
    sources = json.loads(blob(shared_registry, "publish/diff-id", layers[3]["digest"]))["layers"]
    assert [sources[name]["blob_digest"] for name in gzip_layout.diff_ids()] == [
        layer["digest"] for layer in as_zstd.layers
    ]


def test_an_image_without_one_of_the_layers_is_refused_naming_it_and_nothing_is_pushed(
    registry: LocalRegistry,
    skopeo: Skopeo,
    gzip_layout: OciLayout,
    signed: Callable[..., Path],
    acon: Acon,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    only_lowest = write_layout(tmp_path / "lowest", [(gzip_layout.tars[0], "gzip")])
    reference = skopeo.push(only_lowest, registry, "app")
    bundle = signed(gzip_layout.reference)
    before = stored(registry)
    capsys.readouterr()
    assert acon("image", "publish", bundle, reference, "--json") == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["item"] == gzip_layout.diff_ids()[1]
    assert error["rule"].startswith("every layer that the manifest pins must be in the image")
    assert stored(registry) == before


def test_a_layer_that_changed_since_it_was_signed_is_refused_before_the_image_is_there(
    registry: LocalRegistry,
    gzip_layout: OciLayout,
    signed: Callable[..., Path],
    acon: Acon,
) -> None:
    bundle = signed(gzip_layout.reference)
    hex_digest = str(gzip_layout.layers[0]["digest"]).partition(":")[2]
    lowest = gzip_layout.directory / "blobs" / "sha256" / hex_digest
    raw = bytearray(lowest.read_bytes())
    raw[len(raw) // 2] ^= 1
    lowest.write_bytes(raw)
    assert acon("image", "publish", bundle, registry.reference("app")) in (1, 2)
    assert not any("manifests" in path for path in stored(registry))


def test_a_digest_that_is_not_there_is_never_made(
    registry: LocalRegistry, gzip_layout: OciLayout, signed: Callable[..., Path], acon: Acon
) -> None:
    bundle = signed(gzip_layout.reference)
    reference = f"docker://{registry.name}/app@sha256:{'0' * 64}"
    assert acon("image", "publish", bundle, reference) == 1
    assert stored(registry) == {}


def test_what_others_listed_under_the_fallback_tag_stays(
    shared_registry: LocalRegistry,
    skopeo: Skopeo,
    gzip_layout: OciLayout,
    signed: Callable[..., Path],
    publish: Callable[..., JsonObject],
) -> None:
    repository = "publish/others"
    reference = skopeo.push(gzip_layout, shared_registry, repository)
    tag = str(gzip_layout.manifest["digest"]).replace(":", "-")
    others = {**gzip_layout.manifest, "annotations": {"by": "others"}, "unknown": {"kept": True}}
    put_index(shared_registry, repository, tag, others)
    first = publish(signed(gzip_layout.reference), reference)
    second = publish(signed(gzip_layout.reference, "--name", "x:1", name="other"), reference)
    index = document(shared_registry, repository, tag)
    listed = index["manifests"]
    assert isinstance(listed, list)
    assert listed[0] == others
    assert [one["digest"] for one in listed[1:]] == [
        digest_in(first["artifact"]),
        digest_in(second["artifact"]),
    ]
    assert index["annotations"] == {"of": "the index"}


def test_a_lone_manifest_under_the_fallback_tag_becomes_a_list_that_holds_it_too(
    shared_registry: LocalRegistry,
    skopeo: Skopeo,
    gzip_layout: OciLayout,
    signed: Callable[..., Path],
    publish: Callable[..., JsonObject],
) -> None:
    source = skopeo.push(gzip_layout, shared_registry, "publish/lone")
    target = skopeo.push(gzip_layout, shared_registry, "publish/lone-copy")
    first = publish(signed(gzip_layout.reference), source)
    tag = str(first["fallback_tag"])
    # Without --all the tool copies the one manifest that it chose of the list.
    skopeo.copy(
        shared_registry.reference("publish/lone", tag),
        shared_registry.reference("publish/lone-copy", tag),
        source_registry=shared_registry,
        target_registry=shared_registry,
    )
    assert document(shared_registry, "publish/lone-copy", tag)["mediaType"] == MANIFEST
    second = publish(signed(gzip_layout.reference, "--name", "x:1", name="other"), target)
    listed = document(shared_registry, "publish/lone-copy", tag)["manifests"]
    assert isinstance(listed, list)
    assert [one["digest"] for one in listed] == [
        digest_in(first["artifact"]),
        digest_in(second["artifact"]),
    ]


def test_of_an_index_the_image_for_the_platform_is_what_is_referred_to(
    shared_registry: LocalRegistry,
    skopeo: Skopeo,
    gzip_layout: OciLayout,
    mixed_layout: OciLayout,
    signed: Callable[..., Path],
    publish: Callable[..., JsonObject],
) -> None:
    skopeo.push(gzip_layout, shared_registry, "publish/platforms")
    skopeo.push(mixed_layout, shared_registry, "publish/platforms")
    operating_system, _, architecture = host_platform().partition("/")
    ours = {"os": operating_system, "architecture": architecture}
    put_index(
        shared_registry,
        "publish/platforms",
        "many",
        {**mixed_layout.manifest, "platform": {"os": "plan9", "architecture": "mips"}},
        {**gzip_layout.manifest, "platform": ours},
    )
    reference = shared_registry.reference("publish/platforms", "many")
    done = publish(signed(gzip_layout.reference), reference)
    assert digest_in(done["image"]) == gzip_layout.manifest["digest"]


def test_tls_an_authority_of_ones_own_and_a_login_are_used(
    private_registry: LocalRegistry,
    gzip_layout: OciLayout,
    signed: Callable[..., Path],
    publish: Callable[..., JsonObject],
    acon: Acon,
) -> None:
    bundle = signed(gzip_layout.reference)
    reference = private_registry.reference("team/app")
    ca = ("--registry-ca", private_registry.ca_file)
    assert acon("image", "publish", bundle, reference, *ca) == 1
    done = publish(bundle, reference, *ca, "--authfile", private_registry.auth_file)
    assert done["pushed_image"] is True


def test_a_vendors_bundle_is_published_as_an_image_of_its_layer(
    shared_registry: LocalRegistry,
    bundles: Bundles,
    make_signer: MakeSigner,
    publish: Callable[..., JsonObject],
) -> None:
    bundle = bundles.vendor("lib:2", make_signer("csp"))
    done = publish(bundle, shared_registry.reference("publish/lib", "2"))
    manifest = document(shared_registry, "publish/lib", digest_in(done["image"]))
    (source,) = Bundle(bundle).sources().values()
    layers = manifest["layers"]
    assert isinstance(layers, list)
    assert [layer["digest"] for layer in layers] == [source.blob_digest]


def test_a_bundle_that_says_nowhere_where_its_layers_are_is_refused(
    registry: LocalRegistry, gzip_layout: OciLayout, signed: Callable[..., Path], acon: Acon
) -> None:
    bundle = signed(gzip_layout.reference)
    (bundle / "sources.json").unlink()
    assert acon("image", "publish", bundle, registry.reference("app")) == 2
    assert not any("manifests" in path for path in stored(registry))


def test_manifests_are_published_in_registries_only_and_signed(
    gzip_layout: OciLayout, signed: Callable[..., Path], acon: Acon, tmp_path: Path
) -> None:
    bundle = signed(gzip_layout.reference)
    assert acon("image", "publish", bundle, gzip_layout.reference) == 2
    unsigned = tmp_path / "unsigned"
    shutil.copytree(bundle, unsigned)
    (unsigned / "signature").unlink()
    assert acon("image", "publish", unsigned, "docker://127.0.0.1:9/app:1") == 2


def put_index(registry: LocalRegistry, repository: str, tag: str, *entries: object) -> None:
    index = {
        "schemaVersion": 2,
        "mediaType": INDEX,
        "manifests": list(entries),
        "annotations": {"of": "the index"},
    }
    answer = httpx.put(
        f"{registry.url}/v2/{repository}/manifests/{tag}",
        content=json.dumps(index),
        headers={"content-type": INDEX},
        trust_env=False,
    )
    assert answer.status_code == 201, answer.text
