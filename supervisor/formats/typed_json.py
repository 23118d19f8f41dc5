"""Decoded JSON into frozen Structs and back, strictly: one form for one meaning."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from supervisor.formats.errors import FormatError

_S = TypeVar("_S", bound=msgspec.Struct)


def to_struct(value: object, struct_type: type[_S], *, item: str) -> _S:
    """Type-check `value` (from `canonical_json.decode`) as `struct_type`.

    Nothing is coerced; what the Struct says of unknown fields holds. Raises `FormatError`
    whose item is `item` followed by the path of the wrong field.
    """
    try:
        return msgspec.convert(value, struct_type, strict=True)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `")
        path = where.rstrip("`").removeprefix("$")
        raise FormatError(f"{item}{path}", "a field must be as its format says: " + what) from None


def to_object(struct: msgspec.Struct) -> object:
    """The Struct as dicts, lists and scalars, for `canonical_json.encode`."""
    value: object = msgspec.to_builtins(struct)
    return value
