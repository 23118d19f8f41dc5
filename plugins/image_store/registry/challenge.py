"""What a registry demands: `WWW-Authenticate` (RFC 9110, sections 11.2, 11.3 and 11.6.1)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import msgspec

from supervisor.formats.errors import FormatError

MAX_CHALLENGE_CHARACTERS = 8192
ITEM = "www-authenticate"

_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_SEPARATORS = re.compile(r"[ \t,]*")
_SCHEME = re.compile(rf"({_TOKEN})(?=[ \t,]|$)")
_TOKEN68 = re.compile(r"[ \t]+[A-Za-z0-9\-._~+/]+=*[ \t]*(?=,|$)")
_PARAMETER = re.compile(
    rf'[ \t]*({_TOKEN})[ \t]*=[ \t]*(?:({_TOKEN})|"((?:[^"\\]|\\.)*)")[ \t]*(?=,|$)'
)
_ESCAPED = re.compile(r"\\(.)")


class Challenge(msgspec.Struct, frozen=True):
    """One way to authenticate; `scheme` and the parameters' names in lower case."""

    scheme: str
    parameters: Mapping[str, str]


def parse_challenges(values: Sequence[str]) -> tuple[Challenge, ...]:
    """All challenges of all header lines, in order. Raises `FormatError`."""
    text = ", ".join(values)
    if len(text) > MAX_CHALLENGE_CHARACTERS or not text.isprintable():
        raise FormatError(
            ITEM,
            "must be printable and of bounded length",
            expected=f"{MAX_CHALLENGE_CHARACTERS} characters",
            actual=len(text),
        )
    found: list[Challenge] = []
    at = _skip(text, 0)
    while at < len(text):
        scheme = _SCHEME.match(text, at)
        if scheme is None:
            raise _malformed(at)
        at, parameters = _parameters(text, scheme.end())
        found.append(Challenge(scheme[1].lower(), parameters))
    return tuple(found)


def _parameters(text: str, at: int) -> tuple[int, dict[str, str]]:
    """Those from `at` on, up to the next scheme, and where that begins."""
    parameters: dict[str, str] = {}
    # `name=value` also looks like credentials in one word; parameters are tried first.
    if _PARAMETER.match(text, at) is None and (word := _TOKEN68.match(text, at)) is not None:
        return _skip(text, word.end()), parameters
    while (parameter := _PARAMETER.match(text, at)) is not None:
        name = parameter[1].lower()
        if name in parameters:
            raise FormatError(ITEM, "a parameter must not appear twice", actual=name[:80])
        quoted = parameter[3]
        parameters[name] = parameter[2] if quoted is None else _ESCAPED.sub(r"\1", quoted)
        at = _skip(text, parameter.end())
    return _skip(text, at), parameters


def _skip(text: str, at: int) -> int:
    separators = _SEPARATORS.match(text, at)
    return at if separators is None else separators.end()


def _malformed(at: int) -> FormatError:
    return FormatError(ITEM, "must be challenges: SCHEME NAME=VALUE, …", actual=f"character {at}")
