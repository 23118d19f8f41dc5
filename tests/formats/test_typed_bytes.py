"""Packing that refuses what `struct` cuts or pads silently."""

from __future__ import annotations

import struct

import pytest

from supervisor.formats.errors import FormatError
from supervisor.formats.typed_bytes import pack_exactly

LAYOUT = struct.Struct("<H4s")


def test_fields_of_exact_length_are_packed() -> None:
    assert pack_exactly(LAYOUT, 0x0102, b"abcd", item="x") == b"\x02\x01abcd"


@pytest.mark.parametrize(
    "fields", [(1, b"abc"), (1, b"abcde"), (65_536, b"abcd"), (-1, b"abcd"), (1,), (b"ab", 4)]
)
def test_everything_else_is_refused_naming_the_item(fields: tuple[bytes | int, ...]) -> None:
    with pytest.raises(FormatError) as caught:
        pack_exactly(LAYOUT, *fields, item="the header")
    assert caught.value.item == "the header"
