"""How manifests name layers: by digest, or by an alias that its signer may move
(ACON image spec 1.0, "Filesystem Layers" and "Aliases")."""

from __future__ import annotations

import re

import msgspec

from supervisor.formats.digest import Digest, parse_digest
from supervisor.formats.errors import FormatError
from supervisor.formats.ids import SHOWN_CHARACTERS, SignerId, parse_signer_id

# Linux NAME_MAX: an alias is a valid file name there.
MAX_ALIAS_BYTES = 255
# The largest integer that canonical JSON can carry, since SVNs are logged.
MAX_SVN = 2**53 - 1
_DELEGATED_PREFIX = "signer/"
# A leading zero would let two spellings mean one SVN.
_NAME_AND_SVN = re.compile(r"(?s)(.+):(0|[1-9][0-9]{0,15})")


class DelegatedReference(msgspec.Struct, frozen=True, order=True):
    """`signer/HASH/SIGNER/ALIAS`: the layer to which `signer` gave `alias`."""

    signer: SignerId
    alias: str

    def __str__(self) -> str:
        return f"{_DELEGATED_PREFIX}{self.signer}/{self.alias}"


LayerReference = Digest | DelegatedReference


def valid_alias(alias: str) -> bool:
    """Whether `alias` is a Linux file name: 1 to 255 bytes of UTF-8, no `/` or NUL, not dots."""
    if not alias or alias in (".", "..") or "/" in alias or "\0" in alias:
        return False
    try:
        return len(alias.encode()) <= MAX_ALIAS_BYTES
    except UnicodeEncodeError:
        return False


def check_alias(alias: str, *, item: str) -> None:
    """Refuse what `valid_alias` does not hold for. Raises `FormatError` naming `item`."""
    if not valid_alias(alias):
        raise FormatError(
            item,
            "an alias is a file name: without '/' and NUL, not '.' or '..'",
            expected=f"1 to {MAX_ALIAS_BYTES} bytes",
            actual=repr(alias[:SHOWN_CHARACTERS]),
        )


def split_alias(alias: str) -> tuple[str, int | None]:
    """`Name:SVN` as name and security version; an alias of another form is all name.

    The SVN is decimal without leading zeros, at most `MAX_SVN`.
    """
    match = _NAME_AND_SVN.fullmatch(alias)
    if match is None:
        return alias, None
    svn = int(match[2])
    return (match[1], svn) if svn <= MAX_SVN else (alias, None)


def parse_layer_reference(
    text: str, *, item: str, unsafe_allow_sha256: bool = False
) -> LayerReference:
    """Parse `HASH/DIGEST` or `signer/HASH/SIGNER/ALIAS`. Raises `FormatError` naming `item`."""
    if not text.startswith(_DELEGATED_PREFIX):
        # Longer text cannot be a digest; cutting it here keeps it out of the error.
        return parse_digest(
            text[: 2 * SHOWN_CHARACTERS], item=item, unsafe_allow_sha256=unsafe_allow_sha256
        )
    parts = text.split("/", 3)
    if len(parts) != 4:
        raise FormatError(
            item,
            "a delegated layer is written signer/HASH/SIGNER/ALIAS",
            actual=text[:SHOWN_CHARACTERS],
        )
    signer = parse_signer_id(
        f"{parts[1]}/{parts[2]}", item=item, unsafe_allow_sha256=unsafe_allow_sha256
    )
    check_alias(parts[3], item=item)
    return DelegatedReference(signer, parts[3])
