"""How people name images, and what is said to those who name them otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from acon.errors import UsageError
from acon.images.reference import ImageReference, parse_name, parse_reference

SHA256 = "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("text", "registry", "repository", "tag", "digest"),
    [
        ("docker://busybox", "docker.io", "library/busybox", "latest", None),
        ("docker://busybox:1.36", "docker.io", "library/busybox", "1.36", None),
        ("docker://team/app", "docker.io", "team/app", "latest", None),
        ("docker://docker.io/busybox", "docker.io", "library/busybox", "latest", None),
        ("docker://index.docker.io/a/b:c", "docker.io", "a/b", "c", None),
        ("docker://localhost/app:1", "localhost", "app", "1", None),
        ("docker://registry.example.org/a/b/c:1", "registry.example.org", "a/b/c", "1", None),
        ("docker://127.0.0.1:5000/app", "127.0.0.1:5000", "app", "latest", None),
        ("docker://[::1]:5000/app:x", "[::1]:5000", "app", "x", None),
        (f"docker://r.example/app@{SHA256}", "r.example", "app", None, SHA256),
        ("docker://R.example/app:UP", "r.example", "app", "UP", None),
    ],
)
def test_registries_are_named_as_skopeo_names_them(
    text: str, registry: str, repository: str, tag: str | None, digest: str | None
) -> None:
    expected = ImageReference(
        transport="docker", registry=registry, repository=repository, tag=tag, digest=digest
    )
    assert parse_reference(text) == expected


@pytest.mark.parametrize("transport", ["oci", "oci-archive", "docker-archive", "acon-repo"])
def test_what_follows_a_place_that_is_there_is_the_tag(transport: str, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    whole = parse_reference(f"{transport}:{place}")
    assert (whole.transport, whole.place, whole.tag) == (transport, place, None)
    tagged = parse_reference(f"{transport}:{place}:example.org/name:1")
    assert (tagged.place, tagged.tag) == (place, "example.org/name:1")


def test_a_path_with_colons_that_is_there_wins_over_a_tag(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a:b:c").mkdir()
    assert parse_reference(f"oci:{tmp_path}/a:b:c").place == tmp_path / "a:b:c"
    assert parse_reference(f"oci:{tmp_path}/a:b:c:d").tag == "d"
    assert parse_reference(f"oci:{tmp_path}/a:b").tag == "b"


@pytest.mark.parametrize("text", ["", "app", "dir:x", "docker-daemon:x", "oci", "oci:", "http://x"])
def test_what_is_not_understood_is_answered_with_all_that_is(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_reference(text)
    for form in ("oci:DIR", "oci-archive:", "docker-archive:", "docker://HOST", "acon-repo:"):
        assert form in str(caught.value.expected)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("docker:busybox", "docker://HOST/NAME"),
        ("docker:///busybox", "a repository's name"),
        ("docker://r.example/", "a repository's name"),
        ("docker://r.example/UPPER", "a repository's name"),
        ("docker://r.example/a/../b", "a repository's name"),
        ("docker://r.example:99999/a", "a port"),
        ("docker://user@r.example/a", "ALGORITHM:HEX"),
        ("docker://r.example/a:-x", "a tag is"),
        ("docker://r.example/a:", "a tag is"),
        ("docker://r.example/a@sha256:00", "hex digits"),
        ("docker://r.example/a@md5:00", "ALGORITHM:HEX"),
        (f"docker://r.example/a:1@{SHA256}", "not by both"),
        ("docker://127.1/a", "DNS name or an IP address"),
        ("oci:/no/such/folder:1", "such a folder"),
        ("oci-archive:/no/such/file", "such a file"),
    ],
)
def test_a_wrong_name_is_wrong_usage_and_says_which_part(text: str, rule: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_reference(text)
    assert rule in caught.value.rule


def test_a_colon_without_a_tag_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="must follow the colon"):
        parse_reference(f"oci:{tmp_path}:")


@pytest.mark.parametrize(
    "text", ["docker://docker.io/library/busybox:latest", f"docker://r.example/a@{SHA256}"]
)
def test_a_reference_is_shown_as_it_would_be_typed(text: str) -> None:
    assert str(parse_reference(text)) == text


def test_names_in_archives_mean_what_they_mean_in_registries() -> None:
    assert parse_name("busybox:1", item="x") == parse_name("docker.io/library/busybox:1", item="x")
    assert parse_name("a.example/b:1", item="x") != parse_name("b:1", item="x")
