"""Indexes, manifests and configurations: what is read of them, and what is refused."""

from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acon.errors import UsageError
from acon.images.documents import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    MAX_DOCUMENT_BYTES,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    ImageConfig,
    Platform,
    choose_platform,
    decode_document,
    decode_index,
    decode_manifest,
    parse_platform,
    require_bytes,
    require_manifest_type,
)
from supervisor.formats.errors import DigestMismatch, FormatError

DIGEST = "sha256:" + "0" * 64
CONFIG = {"mediaType": OCI_CONFIG, "digest": DIGEST, "size": 2}


def described(raw: bytes, media_type: str = OCI_MANIFEST) -> Descriptor:
    digest = f"sha256:{hashlib.sha256(raw).hexdigest()}"
    return Descriptor(media_type=media_type, digest=digest, size=len(raw))


def entry(platform: str | None, number: int, **annotations: str) -> Descriptor:
    return Descriptor(
        media_type=OCI_MANIFEST,
        digest=f"sha256:{number:064x}",
        size=1,
        platform=None if platform is None else Platform(*_turned(platform)),
        annotations=annotations,
    )


def _turned(platform: str) -> tuple[str, str, str | None]:
    system, architecture, *variant = platform.split("/")
    return architecture, system, variant[0] if variant else None


@pytest.mark.parametrize(
    ("wanted", "number"),
    [
        ("linux/amd64", 1),
        ("linux/arm64", 2),
        ("linux/arm64/v8", 2),
        ("linux/arm/v6", 3),
        ("linux/arm", 4),
        ("linux/arm/v7", 4),
        ("linux/amd64/v3", 6),
        ("windows/amd64", 7),
    ],
)
def test_the_first_image_for_a_platform_is_chosen(wanted: str, number: int) -> None:
    index = (
        entry("unknown/unknown", 0),
        entry("linux/amd64", 1),
        entry("linux/arm64/v8", 2),
        entry("linux/arm/v6", 3),
        entry("linux/arm/v7", 4),
        entry("linux/amd64", 5),
        entry("linux/amd64/v3", 6),
        entry("windows/amd64", 7),
        entry("windows/amd64", 8),
    )
    chosen = choose_platform(index, parse_platform(wanted), item="x")
    assert chosen.digest == f"sha256:{number:064x}"


def test_a_platform_that_is_not_there_is_refused_with_all_that_are() -> None:
    index = (entry("linux/amd64", 1), entry("unknown/unknown", 2), entry("linux/arm/v6", 3))
    with pytest.raises(UsageError) as caught:
        choose_platform(index, parse_platform("linux/arm"), item="x")
    assert caught.value.expected == "linux/arm"
    assert caught.value.actual == "linux/amd64, linux/arm/v6"


def test_attestations_are_no_images_whatever_platform_they_claim() -> None:
    claims = {"vnd.docker.reference.type": "attestation-manifest"}
    index = (entry("linux/amd64", 1, **claims), entry("linux/amd64", 2))
    assert choose_platform(index, parse_platform("linux/amd64"), item="x").digest[-1] == "2"
    lone = (entry(None, 3), entry("unknown/unknown", 4))
    assert choose_platform(lone, parse_platform("linux/amd64"), item="x").digest[-1] == "3"
    with pytest.raises(UsageError):
        choose_platform((entry("linux/amd64", 1, **claims),), Platform("amd64", "linux"), item="x")


@pytest.mark.parametrize("text", ["linux", "linux/", "/amd64", "linux/arm/v7/x", ""])
def test_a_platform_is_written_with_two_or_three_words(text: str) -> None:
    with pytest.raises(UsageError, match="OS/ARCH"):
        parse_platform(text)


def test_a_manifest_is_read_with_all_that_it_may_leave_out() -> None:
    raw = json.dumps({"schemaVersion": 2, "config": CONFIG, "layers": None, "x": 1}).encode()
    manifest = decode_manifest(raw, described(raw))
    assert manifest.layers is None
    assert manifest.kind == OCI_CONFIG


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("config", None),
        ("config", {**CONFIG, "digest": "sha256:../../etc/passwd"}),
        ("config", {**CONFIG, "digest": "sha256:" + "A" * 64}),
        ("config", {**CONFIG, "digest": "md5:" + "0" * 32}),
        ("config", {**CONFIG, "digest": DIGEST + "\n"}),
        ("config", {**CONFIG, "size": -1}),
        ("config", {**CONFIG, "size": 2**53}),
        ("config", {**CONFIG, "size": "2"}),
        ("layers", [{**CONFIG, "digest": "x"}]),
        ("layers", {}),
    ],
)
def test_a_wrong_field_of_a_manifest_is_refused_with_its_path(field: str, value: object) -> None:
    raw = json.dumps({"config": CONFIG, "layers": [], field: value}).encode()
    with pytest.raises(FormatError) as caught:
        decode_manifest(raw, described(raw))
    assert f"$.{field}" in str(caught.value.actual)


def test_a_document_that_is_index_and_manifest_at_once_is_refused() -> None:
    raw = json.dumps({"config": CONFIG, "layers": [], "manifests": []}).encode()
    with pytest.raises(FormatError, match="look like an index"):
        decode_manifest(raw, described(raw))
    for media_type in (OCI_INDEX, DOCKER_LIST):
        with pytest.raises(FormatError, match="look like a manifest"):
            decode_index(raw, described(raw, media_type))


def test_a_document_of_another_type_than_led_to_it_is_refused() -> None:
    raw = json.dumps({"mediaType": DOCKER_MANIFEST, "config": CONFIG}).encode()
    assert decode_manifest(raw, described(raw, DOCKER_MANIFEST)).config.size == 2
    with pytest.raises(FormatError) as caught:
        decode_manifest(raw, described(raw, OCI_MANIFEST))
    assert (caught.value.expected, caught.value.actual) == (OCI_MANIFEST, DOCKER_MANIFEST)


@pytest.mark.parametrize("suffix", ["+json", "+prettyjws"])
def test_docker_schema_1_is_refused_with_the_reason(suffix: str) -> None:
    with pytest.raises(FormatError, match="schema 1 cannot be read"):
        require_manifest_type(
            f"application/vnd.docker.distribution.manifest.v1{suffix}", item="image"
        )


def test_bytes_must_have_the_size_and_the_digest_of_their_descriptor() -> None:
    raw = b"{}"
    descriptor = described(raw)
    assert require_bytes(raw, descriptor, item="x") == raw
    with pytest.raises(DigestMismatch) as caught:
        require_bytes(b"[]", descriptor, item="x")
    assert caught.value.expected == descriptor.digest
    with pytest.raises(FormatError, match="size"):
        require_bytes(b"{} ", descriptor, item="x")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xff",
        b'{"rootfs": {"diff_ids": ["\xff"]}}',
        b'{"rootfs":' * 100_000,
        b'{"x": ' + b"[" * 500_000 + b"]" * 500_000 + b"}",
        b" " * (MAX_DOCUMENT_BYTES + 1),
    ],
    ids=["empty", "no UTF-8", "no UTF-8 inside", "deep", "deep where ignored", "huge"],
)
def test_hostile_json_is_refused_by_name(raw: bytes) -> None:
    with pytest.raises(FormatError) as caught:
        decode_document(raw, ImageConfig, item="the config")
    assert caught.value.item == "the config"


@given(st.binary(max_size=200) | st.recursive(st.none() | st.text() | st.integers(), st.lists))
def test_whatever_comes_is_read_or_refused(value: object) -> None:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    try:
        decode_document(raw, ImageConfig, item="x")
    except FormatError as error:
        assert error.item == "x"
