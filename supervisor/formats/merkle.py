"""Merkle trees as RFC 9162 §2.1 has them, with SHA-384.

A leaf is data of any length; `leaf_hash` makes it a node. Leaves and inner nodes are
hashed with different prefixes, so that an inner node can never be passed off as a leaf.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from supervisor.formats.errors import FormatError

NODE_BYTES = 48
# Fits every integer that canonical JSON can carry; a path then has at most 53 nodes.
MAX_TREE_SIZE = 2**53 - 1


def leaf_hash(leaf: bytes) -> bytes:
    """MTH({d(0)}) = HASH(0x00 || d(0)): 48 bytes."""
    return hashlib.sha384(b"\x00" + leaf).digest()


def _inner_hash(left: bytes, right: bytes) -> bytes:
    return hashlib.sha384(b"\x01" + left + right).digest()


class Tree:
    """A tree over `leaves`, whose proofs then cost log(n) each; at least one leaf.

    RFC 9162 splits at the largest power of two below n; joining neighbours level by level
    and carrying an odd last node upward gives the same tree.
    """

    def __init__(self, leaves: Sequence[bytes]) -> None:
        if not leaves:
            raise FormatError("merkle tree", "a tree has at least one leaf", actual=0)
        level = [leaf_hash(leaf) for leaf in leaves]
        self._levels = [level]
        while len(level) > 1:
            joined = [_inner_hash(level[at], level[at + 1]) for at in range(0, len(level) - 1, 2)]
            if len(level) % 2:
                joined.append(level[-1])
            level = joined
            self._levels.append(level)

    @property
    def root(self) -> bytes:
        """48 bytes."""
        return self._levels[-1][0]

    def inclusion_proof(self, index: int) -> tuple[bytes, ...]:
        """PATH(index, D[n]), from the leaf's sibling upward; nodes of 48 bytes."""
        size = len(self._levels[0])
        if not 0 <= index < size:
            raise FormatError(
                "merkle tree", "no such leaf", expected=f"0..{size - 1}", actual=index
            )
        path = []
        for level in self._levels[:-1]:
            sibling = index ^ 1
            if sibling < len(level):
                path.append(level[sibling])
            index >>= 1
        return tuple(path)


def root(leaves: Sequence[bytes]) -> bytes:
    """The Merkle tree hash of one or more leaves (their data): 48 bytes."""
    return Tree(leaves).root


def inclusion_proof(leaves: Sequence[bytes], index: int) -> tuple[bytes, ...]:
    """The inclusion proof of `leaves[index]`. For many proofs of one tree use `Tree`."""
    return Tree(leaves).inclusion_proof(index)


def verify_inclusion(
    leaf: bytes, index: int, size: int, path: Sequence[bytes], root: bytes
) -> bool:
    """RFC 9162 §2.1.3.2: whether `path` proves that `leaf` (its data) is at `index` of `size`.

    False, never an exception, for a path of another length than index and size demand, for
    nodes that are not 48 bytes, and for an index outside the tree.
    """
    if not 0 <= index < size <= MAX_TREE_SIZE or len(root) != NODE_BYTES:
        return False
    position, last = index, size - 1
    node = leaf_hash(leaf)
    for sibling in path:
        if last == 0 or len(sibling) != NODE_BYTES:
            return False
        if position & 1 or position == last:
            node = _inner_hash(sibling, node)
            while not position & 1 and position:
                position >>= 1
                last >>= 1
        else:
            node = _inner_hash(node, sibling)
        position >>= 1
        last >>= 1
    return last == 0 and hmac.compare_digest(node, root)
