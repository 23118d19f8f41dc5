"""Fields into fixed layouts, refusing what would be cut or padded silently."""

from __future__ import annotations

import struct

from supervisor.formats.errors import FormatError


def pack_exactly(layout: struct.Struct, *fields: bytes | int, item: str) -> bytes:
    """`layout.pack(*fields)`, but every byte string has exactly its length.

    Raises `FormatError` naming `item`.
    """
    try:
        packed = layout.pack(*fields)
    except struct.error as error:
        raise FormatError(item, "fields fit their layout", actual=str(error)) from None
    for at, (given, kept) in enumerate(zip(fields, layout.unpack(packed), strict=True)):
        if given != kept:
            raise FormatError(
                item,
                f"field {at} has its exact length",
                expected=f"{len(kept)} bytes",
                actual=len(given) if isinstance(given, bytes) else given,
            )
    return packed
