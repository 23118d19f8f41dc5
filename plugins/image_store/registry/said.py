"""What a registry says about an error, cut to what can be shown.

OCI distribution specification 1.1, "Error codes": `{"errors": [{"code", "message"}]}`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from supervisor import Busy, Denied, Refusal, RuntimeFailed, UnknownItem, Untrusted

MAX_ERROR_BYTES = 16 * 1024
_SHOWN_CHARACTERS = 300
_SHOWN_ERRORS = 3
# Shorter ones occur in ordinary words.
_LEAST_SECRET_CHARACTERS = 4


class _Error(msgspec.Struct):
    code: str = ""
    message: str = ""


class _Errors(msgspec.Struct):
    errors: list[_Error] = []


def printable(text: str) -> str:
    """One line of bounded length without control and direction characters."""
    return "".join(c if c.isprintable() else "?" for c in text[:_SHOWN_CHARACTERS])


def errors_said(body: bytes) -> str:
    """The codes and messages in an error's body, " (…)" or empty if there are none to show."""
    try:
        errors = msgspec.json.decode(body, type=_Errors).errors
    except (msgspec.DecodeError, RecursionError):
        return ""
    text = "; ".join(
        ": ".join(part for part in (error.code, error.message) if part)
        for error in errors[:_SHOWN_ERRORS]
    )
    # All of it, so that a credential in it is found whole; `without_secrets` bounds it.
    return f" ({text})" if text else ""


def without_secrets(error: Refusal, secrets: Iterable[str]) -> Refusal:
    """`error` as it may be shown: what a server said is bounded, and withheld altogether if it
    repeats what it was sent."""
    told = f"{error.item} {error.expected} {error.actual}"
    if any(len(secret) >= _LEAST_SECRET_CHARACTERS and secret in told for secret in secrets):
        return type(error)(
            "a registry", error.rule, actual="withheld: its words repeat a credential"
        )
    actual = None if error.actual is None else printable(error.actual)
    return type(error)(error.item, error.rule, expected=error.expected, actual=actual)


def with_mirrors(error: Refusal, failed: Sequence[str]) -> Refusal:
    """`error` of the registry itself, telling also how its mirrors failed."""
    if not failed:
        return error
    before = "mirrors before it: " + " | ".join(failed)
    actual = before if error.actual is None else f"{error.actual}; {before}"
    return type(error)(error.item, error.rule, expected=error.expected, actual=actual)


def refusal_of(status: int, item: str, said: str, *, expected: Iterable[int]) -> Refusal:
    """What an answer with an unexpected status means to the caller."""
    actual = f"{status}{said}"
    if status in (401, 403):
        return Denied(item, "the registry does not allow it", actual=actual)
    if status == 404:
        return UnknownItem(item, "the registry does not have it", actual=actual)
    if status == 429:
        return Busy(item, "the registry asks for fewer requests", actual=actual)
    if status >= 500 or status == 408:
        return RuntimeFailed(item, "the registry failed", actual=actual)
    return Untrusted(
        item,
        "the registry must answer as its specification says",
        expected=" or ".join(str(one) for one in sorted(expected)),
        actual=actual,
    )
