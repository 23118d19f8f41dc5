"""Ids as people see them, and what they may give back."""

from __future__ import annotations

import pytest

from acon.short_ids import begins, shortened

A, B = "a" * 96, "b" * 96
SHORT_A, SHORT_B = "a" * 12 + "..", "b" * 12 + ".."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"sha384/{A}/{B}", f"sha384/{SHORT_A}/{SHORT_B}"),
        (f"layer sha512/{'c' * 128}: verified", f"layer sha512/{'c' * 12}..: verified"),
        (f"signer/sha384/{A}/lib:2", f"signer/sha384/{SHORT_A}/lib:2"),
        (f"(sha384/{A}, sha384/{B})", f"(sha384/{SHORT_A}, sha384/{SHORT_B})"),
        (f"sha384/{A}/*", f"sha384/{SHORT_A}/*"),
        # Not an id: a register, a nonce.
        (f"expected {A}, got {B}", f"expected {A}, got {B}"),
        (f"sha384/{'a' * 63}", f"sha384/{'a' * 63}"),
        (f"sha384/{'a' * 129}", f"sha384/{'a' * 129}"),
        ("", ""),
    ],
)
def test_digests_in_ids_are_cut_and_nothing_else(text: str, expected: str) -> None:
    assert shortened(text) == expected


def test_two_digests_that_would_look_the_same_stay_whole() -> None:
    other = "a" * 95 + "b"
    text = f"sha384/{A}/{B} and sha384/{other}"
    assert shortened(text) == f"sha384/{A}/{SHORT_B} and sha384/{other}"


def test_the_same_one_twice_is_cut_twice() -> None:
    assert shortened(f"sha384/{A} sha384/{A}") == f"sha384/{SHORT_A} sha384/{SHORT_A}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"sha384/{SHORT_A}/{SHORT_B}", True),
        (f"sha384/{A}/{B}", True),
        (f"sha384/{A}", True),
        ("sha384/aaaa/bbbb", True),
        (f"sha384/{SHORT_B}/{SHORT_A}", False),
        (f"sha512/{SHORT_A}/{SHORT_B}", False),
        (f"sha384/{A}/{B}/", False),
        (f"sha384/{A}a", False),
    ],
)
def test_what_is_shown_can_be_given_back(text: str, expected: bool) -> None:
    assert begins(f"sha384/{A}/{B}", text) is expected
