"""RFC 9162 trees, against the RFC's recursive definitions written out here."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from supervisor.formats import merkle
from supervisor.formats.errors import FormatError

LEAVES = st.lists(st.binary(max_size=40), min_size=1, max_size=40)


def split_point(size: int) -> int:
    """The largest power of two smaller than `size`."""
    k = 1
    while k * 2 < size:
        k *= 2
    return k


def rfc_root(leaves: Sequence[bytes]) -> bytes:
    if len(leaves) == 1:
        return hashlib.sha384(b"\x00" + leaves[0]).digest()
    k = split_point(len(leaves))
    return hashlib.sha384(b"\x01" + rfc_root(leaves[:k]) + rfc_root(leaves[k:])).digest()


def rfc_path(index: int, leaves: Sequence[bytes]) -> list[bytes]:
    if len(leaves) == 1:
        return []
    k = split_point(len(leaves))
    if index < k:
        return [*rfc_path(index, leaves[:k]), rfc_root(leaves[k:])]
    return [*rfc_path(index - k, leaves[k:]), rfc_root(leaves[:k])]


@st.composite
def proven(draw: st.DrawFn) -> tuple[list[bytes], int, list[bytes], bytes]:
    leaves = draw(LEAVES)
    index = draw(st.integers(0, len(leaves) - 1))
    return leaves, index, list(merkle.inclusion_proof(leaves, index)), merkle.root(leaves)


@given(LEAVES)
def test_the_root_is_the_one_that_the_rfc_defines(leaves: list[bytes]) -> None:
    assert merkle.root(leaves) == rfc_root(leaves)


@given(proven())
def test_the_path_is_the_one_that_the_rfc_defines_and_proves_its_leaf(
    case: tuple[list[bytes], int, list[bytes], bytes],
) -> None:
    leaves, index, path, root = case
    assert path == rfc_path(index, leaves)
    assert merkle.verify_inclusion(leaves[index], index, len(leaves), path, root)


def test_a_lone_leaf_is_its_own_tree_with_an_empty_path() -> None:
    root = hashlib.sha384(b"\x00request").digest()
    assert merkle.root([b"request"]) == merkle.leaf_hash(b"request") == root
    assert merkle.inclusion_proof([b"request"], 0) == ()
    assert merkle.verify_inclusion(b"request", 0, 1, (), root)
    assert not merkle.verify_inclusion(b"request", 0, 1, (bytes(48),), root)


@given(proven(), st.binary(max_size=40))
def test_another_leaf_is_not_proven(
    case: tuple[list[bytes], int, list[bytes], bytes], other: bytes
) -> None:
    leaves, index, path, root = case
    assume(other != leaves[index])
    assert not merkle.verify_inclusion(other, index, len(leaves), path, root)


@given(proven(), st.data())
def test_a_path_with_one_changed_bit_proves_nothing(
    case: tuple[list[bytes], int, list[bytes], bytes], data: st.DataObject
) -> None:
    leaves, index, path, root = case
    assume(path)
    node = data.draw(st.integers(0, len(path) - 1))
    bit = data.draw(st.integers(0, 383))
    changed = int.from_bytes(path[node], "big") ^ (1 << bit)
    path[node] = changed.to_bytes(48, "big")
    assert not merkle.verify_inclusion(leaves[index], index, len(leaves), path, root)


@given(proven(), st.data())
def test_a_shorter_or_longer_path_proves_nothing(
    case: tuple[list[bytes], int, list[bytes], bytes], data: st.DataObject
) -> None:
    leaves, index, path, root = case
    leaf, size = leaves[index], len(leaves)
    assert not merkle.verify_inclusion(leaf, index, size, [*path, bytes(48)], root)
    assert not merkle.verify_inclusion(leaf, index, size, [bytes(48), *path], root)
    if path:
        drop = data.draw(st.integers(0, len(path) - 1))
        shorter = path[:drop] + path[drop + 1 :]
        assert not merkle.verify_inclusion(leaf, index, size, shorter, root)


@given(st.integers(1, 40), st.data())
def test_a_leaf_is_proven_at_no_other_index_than_its_own(size: int, data: st.DataObject) -> None:
    leaves = [b"request %d" % at for at in range(size)]
    index = data.draw(st.integers(0, size - 1))
    claimed = data.draw(st.integers(-2, size + 2))
    assume(claimed != index)
    path = merkle.inclusion_proof(leaves, index)
    assert not merkle.verify_inclusion(
        leaves[index], claimed, len(leaves), path, merkle.root(leaves)
    )


@pytest.mark.parametrize(
    ("index", "size"), [(-1, 3), (3, 3), (0, 0), (0, -1), (2**53, 2**53 + 1), (0, 2**60)]
)
def test_an_index_outside_the_tree_is_refused(index: int, size: int) -> None:
    leaves = [b"a", b"b", b"c"]
    path = merkle.inclusion_proof(leaves, 2)
    assert not merkle.verify_inclusion(b"c", index, size, path, merkle.root(leaves))


def test_a_path_whose_nodes_join_to_the_root_is_refused_under_another_size() -> None:
    leaves = [b"a", b"b", b"c", b"d"]
    root = merkle.root(leaves)
    first, last = merkle.inclusion_proof(leaves, 0), merkle.inclusion_proof(leaves, 3)
    assert merkle.verify_inclusion(b"a", 0, 4, first, root)
    assert merkle.verify_inclusion(b"d", 3, 4, last, root)
    # Too long for a tree of two, too short for one of eight, though both hash to the root.
    assert not merkle.verify_inclusion(b"d", 1, 2, last, root)
    assert not merkle.verify_inclusion(b"a", 0, 8, first, root)


def test_nodes_and_roots_of_another_length_are_refused() -> None:
    leaves = [b"a", b"b"]
    root = merkle.root(leaves)
    (sibling,) = merkle.inclusion_proof(leaves, 0)
    assert merkle.verify_inclusion(b"a", 0, 2, [sibling], root)
    assert not merkle.verify_inclusion(b"a", 0, 2, [sibling[:-1]], root)
    assert not merkle.verify_inclusion(b"a", 0, 2, [sibling], root[:-1])
    # The concatenation of sibling and more must not slide into a neighbouring field.
    assert not merkle.verify_inclusion(b"a", 0, 2, [sibling + b"\x00"], root)


def test_an_inner_node_cannot_be_passed_off_as_a_leaf() -> None:
    leaves = [b"a", b"b", b"c", b"d"]
    root = merkle.root(leaves)
    left = merkle.leaf_hash(b"a") + merkle.leaf_hash(b"b")
    right_root = merkle.root([b"c", b"d"])
    for forged in (left, b"\x01" + left):
        assert not merkle.verify_inclusion(forged, 0, 2, [right_root], root)
    assert merkle.root([left, merkle.leaf_hash(b"c") + merkle.leaf_hash(b"d")]) != root


def test_a_tree_without_leaves_and_a_leaf_outside_it_are_refused() -> None:
    with pytest.raises(FormatError):
        merkle.root([])
    for index in (-1, 2):
        with pytest.raises(FormatError):
            merkle.inclusion_proof([b"a", b"b"], index)


@given(LEAVES)
def test_one_tree_gives_the_proofs_of_all_its_leaves(leaves: list[bytes]) -> None:
    tree = merkle.Tree(leaves)
    for index, leaf in enumerate(leaves):
        path = tree.inclusion_proof(index)
        assert merkle.verify_inclusion(leaf, index, len(leaves), path, tree.root)
