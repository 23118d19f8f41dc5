"""Digests as manifests write them: `HASH/HEX`."""

from __future__ import annotations

import hashlib

import msgspec

from supervisor.formats.errors import FormatError

# Digest sizes in bytes. SHA-256 is known so that it can be refused by name.
DIGEST_SIZES_BYTES = {"sha256": 32, "sha384": 48, "sha512": 64}
STRONG_ALGORITHMS = frozenset({"sha384", "sha512"})
_LOWER_HEX = frozenset("0123456789abcdef")


class Digest(msgspec.Struct, frozen=True, order=True):
    """A digest under a named algorithm; `hex` is lower case and of the algorithm's length."""

    algorithm: str
    hex: str

    def __str__(self) -> str:
        return f"{self.algorithm}/{self.hex}"

    @property
    def value(self) -> bytes:
        return bytes.fromhex(self.hex)


def check_algorithm(algorithm: str, *, item: str, unsafe_allow_sha256: bool = False) -> None:
    """Refuse an unknown or weak hash algorithm (ACON image spec, "Hash": SHA-384 or stronger)."""
    if algorithm in STRONG_ALGORITHMS or (unsafe_allow_sha256 and algorithm == "sha256"):
        return
    raise FormatError(
        item, "the hash algorithm must be strong", expected="sha384 or sha512", actual=algorithm
    )


def check_hex(algorithm: str, text: str, *, item: str) -> None:
    """Refuse `text` unless it is a lower-case hex digest of `algorithm`'s length."""
    length = DIGEST_SIZES_BYTES[algorithm] * 2
    if len(text) != length or not _LOWER_HEX.issuperset(text):
        raise FormatError(
            item,
            f"a {algorithm} digest is {length} lower-case hex digits",
            expected=f"{length} digits",
            actual=text[:160],
        )


def parse_digest(text: str, *, item: str = "digest", unsafe_allow_sha256: bool = False) -> Digest:
    """Parse `HASH/HEX`. Raises `FormatError` naming `item`."""
    algorithm, slash, hex_digits = text.partition("/")
    if not slash:
        raise FormatError(item, "a digest is written HASH/HEX", actual=text[:160])
    check_algorithm(algorithm, item=item, unsafe_allow_sha256=unsafe_allow_sha256)
    check_hex(algorithm, hex_digits, item=item)
    return Digest(algorithm, hex_digits)


def digest_of(algorithm: str, data: bytes) -> Digest:
    """The digest of `data` under a known algorithm."""
    return Digest(algorithm, hashlib.new(algorithm, data).hexdigest())


def sha384(data: bytes) -> bytes:
    """48 bytes."""
    return hashlib.sha384(data).digest()
