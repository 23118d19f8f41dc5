"""Signers as people name them: `HASH/SIGNER`, or simply the file of a certificate."""

from __future__ import annotations

from pathlib import Path

from acon.errors import UsageError
from acon.keys import load_certificate_der


def expand_signer(text: str, *, item: str, default_rest: str | None = None) -> str:
    """`HASH/SIGNER/REST` from that itself, or from `CERTIFICATE_FILE:REST`.

    REST is an alias, a manifest digest or `*`. A certificate alone gets `default_rest`.
    """
    from supervisor.formats.signature import signer_id_of

    # The rest may hold colons itself (`cert.der:python:2`): the longest file name wins.
    ends = [len(text), *(at for at in range(len(text) - 1, 0, -1) if text[at] == ":")]
    for end in ends:
        path = Path(text[:end])
        if not path.is_file():
            continue
        rest = text[end + 1 :] or default_rest
        if rest is None:
            raise UsageError(item, "a name must follow the certificate", expected=f"{path}:NAME")
        return f"{signer_id_of(load_certificate_der(path))}/{rest}"
    if text.count("/") != 2:
        raise UsageError(
            item,
            "must be HASH/SIGNER/NAME, or a certificate file that is there, and a name",
            expected="sha384/HEX/NAME or cert.der:NAME",
            actual=text,
        )
    return text


def parse_signer(text: str, *, item: str) -> str:
    """`HASH/SIGNER` from that itself, or from the certificate file of that name."""
    from supervisor.formats.ids import parse_signer_id
    from supervisor.formats.signature import signer_id_of

    path = Path(text)
    if path.is_file():
        return str(signer_id_of(load_certificate_der(path), unsafe_allow_sha256=True))
    # Which hashes are strong enough is judged where the image is.
    return str(parse_signer_id(text, item=item, unsafe_allow_sha256=True))
