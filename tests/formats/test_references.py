from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.formats.digest import Digest
from supervisor.formats.errors import FormatError
from supervisor.formats.ids import SignerId
from supervisor.formats.references import (
    MAX_ALIAS_BYTES,
    MAX_SVN,
    DelegatedReference,
    check_alias,
    parse_layer_reference,
    split_alias,
    valid_alias,
)

A96 = "a" * 96
DELEGATED = f"signer/sha384/{A96}/python:2"
BAD_ALIASES = ["", ".", "..", "a/b", "/", "a\0b", "\0", "x" * 256, "\u20ac" * 86, "\ud800"]
GOOD_ALIASES = ["a", "python:2", "...", ".a", "a b", "*", "x" * 255, "\u20ac" * 85, "a\nb", ":1"]


def test_a_digest_is_a_layer() -> None:
    assert parse_layer_reference(f"sha384/{A96}", item="$") == Digest("sha384", A96)


def test_an_alias_of_a_signer_is_a_delegated_layer() -> None:
    reference = parse_layer_reference(DELEGATED, item="$")
    assert reference == DelegatedReference(SignerId("sha384", A96), "python:2")
    assert str(reference) == DELEGATED


@pytest.mark.parametrize(
    "text",
    [
        "",
        "signer/",
        "signer",
        f"signer/sha384/{A96}",
        f"signer/sha384/{A96}/",
        f"signer//{A96}/python:2",
        f"signer/sha384/{A96.upper()}/python:2",
        f"signer/sha384/{A96}a/python:2",
        f"signer/sha384/{A96}/a/b",
        f"signer/sha256/{'a' * 64}/python:2",
        f"Signer/sha384/{A96}/python:2",
        f"signers/sha384/{A96}/python:2",
        f" sha384/{A96}",
        f"sha384/{A96}\n",
        f"sha384/{A96[1:]}",
        f"sha384/{A96.upper()}",
        f"sha384//{A96}",
        f"sha256/{'a' * 64}",
        f"sha224/{'a' * 56}",
        A96,
        "x" * 100_000,
        "signer/" + "x" * 100_000,
        "sha384/" + "a" * 100_000,
        *(f"signer/sha384/{A96}/{alias}" for alias in BAD_ALIASES),
    ],
)
def test_another_form_is_refused_with_its_path(text: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse_layer_reference(text, item="$.layers[1]")
    assert caught.value.item == "$.layers[1]"
    assert len(str(caught.value)) < 1000


def test_sha256_is_read_only_under_the_unsafe_setting() -> None:
    for text in (f"sha256/{'a' * 64}", f"signer/sha256/{'a' * 64}/python:2"):
        assert str(parse_layer_reference(text, item="$", unsafe_allow_sha256=True)) == text
        with pytest.raises(FormatError):
            parse_layer_reference(text, item="$")


@pytest.mark.parametrize("alias", BAD_ALIASES)
def test_what_is_no_file_name_is_no_alias(alias: str) -> None:
    assert not valid_alias(alias)
    with pytest.raises(FormatError):
        check_alias(alias, item="$")


@pytest.mark.parametrize("alias", GOOD_ALIASES)
def test_every_file_name_is_an_alias(alias: str) -> None:
    assert valid_alias(alias)
    check_alias(alias, item="$")
    text = f"signer/sha384/{A96}/{alias}"
    assert str(parse_layer_reference(text, item="$")) == text


@pytest.mark.parametrize(
    ("alias", "split"),
    [
        ("python:2", ("python", 2)),
        ("python:0", ("python", 0)),
        ("python", ("python", None)),
        ("a:b:3", ("a:b", 3)),
        ("a::3", ("a:", 3)),
        (":3", (":3", None)),
        ("python:", ("python:", None)),
        ("python:02", ("python:02", None)),
        ("python:00", ("python:00", None)),
        ("python:-1", ("python:-1", None)),
        ("python:+1", ("python:+1", None)),
        ("python:1.0", ("python:1.0", None)),
        ("python: 1", ("python: 1", None)),
        ("python:1\n", ("python:1\n", None)),
        ("a\nb:1", ("a\nb", 1)),
        ("python:\u0662", ("python:\u0662", None)),
        ("python:\u00b2", ("python:\u00b2", None)),
        (f"python:{MAX_SVN}", ("python", MAX_SVN)),
        (f"python:{MAX_SVN + 1}", (f"python:{MAX_SVN + 1}", None)),
        ("python:" + "9" * 200, ("python:" + "9" * 200, None)),
    ],
)
def test_an_svn_has_one_spelling(alias: str, split: tuple[str, int | None]) -> None:
    assert split_alias(alias) == split


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40))
def test_splitting_loses_nothing(alias: str) -> None:
    name, svn = split_alias(alias)
    assert (name if svn is None else f"{name}:{svn}") == alias


@given(st.text(min_size=1, max_size=8), st.integers(0, MAX_SVN))
def test_a_name_and_svn_come_apart_as_they_were_joined(name: str, svn: int) -> None:
    assert split_alias(f"{name}:{svn}") == (name, svn)


def test_the_limit_is_in_bytes() -> None:
    assert MAX_ALIAS_BYTES == 255
    assert valid_alias("\u00e4" * 127)
    assert not valid_alias("\u00e4" * 128)
