from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugins.image_store.registry.names import (
    api_host,
    check_repository,
    check_tag,
    host_of,
    is_local,
    parse_blob_digest,
    parse_registry,
)
from supervisor.formats.errors import FormatError


@pytest.mark.parametrize(
    ("text", "name", "host"),
    [
        ("registry.example.org", "registry.example.org", "registry.example.org"),
        ("Registry.Example.ORG:5000", "registry.example.org:5000", "registry.example.org"),
        ("127.0.0.1:05000", "127.0.0.1:5000", "127.0.0.1"),
        ("[::1]:5000", "[::1]:5000", "::1"),
        ("[2001:DB8::1]", "[2001:db8::1]", "2001:db8::1"),
        ("localhost", "localhost", "localhost"),
        ("index.docker.io", "docker.io", "docker.io"),
        ("registry-1.docker.io", "docker.io", "docker.io"),
    ],
)
def test_a_registry_has_one_spelling(text: str, name: str, host: str) -> None:
    assert parse_registry(text) == name
    assert host_of(name) == host
    assert parse_registry(name) == name


@pytest.mark.parametrize(
    "text",
    [
        "",
        "https://registry.example.org",
        "registry.example.org/v2",
        "user@registry.example.org",
        "registry.example.org:",
        "registry.example.org:0",
        "registry.example.org:65536",
        "registry.example.org:5000:1",
        "registry..example.org",
        "-registry.example.org",
        "registry.example.org.",
        "registry example",
        "registry.example.org\n",
        "rëgistry.example.org",
        "::1",
        "[::1",
        "[fe80::1%lo]",
        "a" * 64 + ".example.org",
        # What resolvers take for addresses, and nobody else.
        "127.1",
        "2130706433",
        "0x7f.1",
        "127.0.0.0x1",
        "256.0.0.1",
    ],
)
def test_what_is_no_host_and_port_is_refused(text: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse_registry(text, item="source.registry")
    assert caught.value.item == "source.registry"


@given(st.text(max_size=40))
def test_no_text_makes_the_parser_of_registries_fail_otherwise(text: str) -> None:
    try:
        name = parse_registry(text)
    except FormatError:
        return
    assert parse_registry(name) == name


def test_docker_hub_is_reached_where_its_api_is() -> None:
    assert api_host("docker.io") == "registry-1.docker.io"
    assert api_host("registry.example.org:5000") == "registry.example.org:5000"


@pytest.mark.parametrize(
    "host",
    ["localhost", "a.localhost", "127.0.0.1", "127.8.8.8", "::1", "0.0.0.0", "::", "::ffff:7f00:1"],
)
def test_loopback_is_seen_in_every_spelling(host: str) -> None:
    assert is_local(host)


@pytest.mark.parametrize(
    "host", ["registry.example.org", "10.0.0.1", "2001:db8::1", "localhost.org"]
)
def test_other_hosts_are_not_loopback(host: str) -> None:
    assert not is_local(host)


@pytest.mark.parametrize(
    "name", ["a", "library/alpine", "a/b/c", "a.b_c__d--e/f", "0/1", "a" * 255]
)
def test_repositories_of_the_specification_are_taken(name: str) -> None:
    check_repository(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/a",
        "a/",
        "a//b",
        "A/b",
        "a..b",
        "a___b",
        "_a",
        "a-",
        "a/../b",
        "a?b",
        "a%2fb",
        "a b",
        "a\n",
        "a" * 256,
        "é",
    ],
)
def test_other_repositories_are_refused(name: str) -> None:
    with pytest.raises(FormatError, match="repository's name"):
        check_repository(name)


def test_tags_are_held_to_their_grammar() -> None:
    for tag in ("latest", "_1", "A.b-c", "a" * 128):
        check_tag(tag)
    for tag in ("", ".a", "-a", "a/b", "a:b", "a\n", "a" * 129):
        with pytest.raises(FormatError, match="a tag is"):
            check_tag(tag)


def test_a_blobs_digest_is_algorithm_and_hex() -> None:
    assert parse_blob_digest("sha256:" + "0a" * 32) == ("sha256", "0a" * 32)
    assert parse_blob_digest("sha512:" + "0a" * 64) == ("sha512", "0a" * 64)


@pytest.mark.parametrize(
    "text",
    ["", "sha256", "sha256:", "md5:" + "00" * 16, "sha256:" + "0A" * 32, "sha256:" + "00" * 31,
     "sha256:../../../etc/passwd", "sha256:" + "00" * 32 + "\n"],
)  # fmt: skip
def test_other_digests_are_refused(text: str) -> None:
    with pytest.raises(FormatError):
        parse_blob_digest(text)
