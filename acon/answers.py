"""What a daemon answers, taken in within bounds: its values, and what it refused."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TypeVar, cast

import httpx
import msgspec

import supervisor.errors
from supervisor.errors import FormatError, Refusal
from supervisor.formats.canonical_json import decode as decode_json
from supervisor.formats.typed_json import to_struct

MAX_ANSWER_BYTES = 8 << 20

_S = TypeVar("_S", bound=msgspec.Struct)


class _Error(msgspec.Struct, frozen=True):
    kind: str
    item: str
    rule: str
    expected: str | None = None
    actual: str | None = None


class _ErrorAnswer(msgspec.Struct, frozen=True):
    error: _Error


_REFUSALS: dict[str, type[Refusal]] = {
    member.kind: member
    for member in (getattr(supervisor.errors, name) for name in supervisor.errors.__all__)
}


def refusal_of(answer: bytes, status_code: int, item: str) -> Refusal:
    """What the daemon raised, of the same class; a plain `Refusal` for a kind unknown here."""
    try:
        error = typed(answer, _ErrorAnswer).error
    except FormatError:
        return Refusal(item, "was refused without a reason", actual=f"status {status_code}")
    refusal_class = _REFUSALS.get(error.kind, Refusal)
    return refusal_class(error.item, error.rule, expected=error.expected, actual=error.actual)


def typed(answer: bytes, struct_type: type[_S]) -> _S:
    """A JSON answer, checked. Raises `FormatError` with the path of what is wrong."""
    value = decode_json(answer, item="answer", max_bytes=MAX_ANSWER_BYTES)
    return to_struct(value, struct_type, item="answer")


def typed_line(line: bytes, struct_type: type[_S]) -> _S:
    """JSON of which there is much: as `typed`, but a name that stands twice is not noticed."""
    try:
        return msgspec.json.decode(line, type=struct_type)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FormatError("answer", "must be as its format says", actual=error) from error


async def read_bounded(response: httpx.Response, *, item: str, max_bytes: int) -> bytes:
    """The whole body. Raises `FormatError` as soon as it is longer; the caller closes."""
    answer = bytearray()
    raw = cast("AsyncGenerator[bytes, None]", response.aiter_raw())
    async with aclosing(raw) as chunks:
        async for chunk in chunks:
            if len(answer) + len(chunk) > max_bytes:
                raise FormatError(
                    item, "an answer is bounded", expected=f"at most {max_bytes} bytes"
                )
            answer += chunk
    return bytes(answer)
