"""Digests in ids, shortened for people; what is shown can be given back where ids are taken."""

from __future__ import annotations

import re
from collections.abc import Iterable

SHOWN_DIGITS = 12
MARK = ".."
# HASH/DIGEST, HASH/SIGNER/MANIFEST, and what follows `signer/HASH/`.
_ID = re.compile(r"\bsha(?:256|384|512)(?:/[0-9a-f]{64,128}(?![0-9a-f]))+")
_DIGEST = re.compile(r"(?<=/)[0-9a-f]{64,128}(?![0-9a-f])")


def shortened(text: str) -> str:
    """`text` with the digests in all its ids cut, unless two of them would look the same."""
    digests = {one for found in _ID.findall(text) for one in _DIGEST.findall(found)}
    unclear = _sharing_a_beginning(digests)

    def short(found: re.Match[str]) -> str:
        digest = found[0]
        return digest if digest in unclear else digest[:SHOWN_DIGITS] + MARK

    return _ID.sub(lambda found: _DIGEST.sub(short, found[0]), text)


def begins(whole: str, text: str) -> bool:
    """Whether `text` is an id cut short: in each of its parts the beginning of that of `whole`."""
    wholes, parts = whole.split("/"), text.split("/")
    if len(parts) > len(wholes):
        return False
    return all(
        one.startswith(part.removesuffix(MARK)) for one, part in zip(wholes, parts, strict=False)
    )


def _sharing_a_beginning(digests: Iterable[str]) -> set[str]:
    by_beginning: dict[str, set[str]] = {}
    for digest in digests:
        by_beginning.setdefault(digest[:SHOWN_DIGITS], set()).add(digest)
    return {one for group in by_beginning.values() if len(group) > 1 for one in group}
