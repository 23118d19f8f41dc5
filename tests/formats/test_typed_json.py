"""Decoded JSON into Structs, without coercion."""

from __future__ import annotations

import msgspec
import pytest

from supervisor.formats.errors import FormatError
from supervisor.formats.typed_json import to_object, to_struct


class Inner(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    number: int


class Outer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    flag: bool
    inner: tuple[Inner, ...]


def test_a_struct_survives_the_way_through_objects() -> None:
    outer = Outer(flag=True, inner=(Inner(1), Inner(-2)))
    value = {"flag": True, "inner": [{"number": 1}, {"number": -2}]}
    assert to_struct(value, Outer, item="x") == outer
    assert to_struct(to_object(outer), Outer, item="x") == outer


@pytest.mark.parametrize(
    ("value", "item"),
    [
        ({"flag": 1, "inner": []}, "x.flag"),
        ({"flag": "true", "inner": []}, "x.flag"),
        ({"flag": True, "inner": [{"number": 1}, {"number": "1"}]}, "x.inner[1].number"),
        ({"flag": True, "inner": [{"number": True}]}, "x.inner[0].number"),
        ({"flag": True, "inner": [{"number": 1, "more": 1}]}, "x.inner[0]"),
        ({"flag": True}, "x"),
        ({"flag": True, "inner": None}, "x.inner"),
        ([], "x"),
        (None, "x"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_path(value: object, item: str) -> None:
    with pytest.raises(FormatError) as caught:
        to_struct(value, Outer, item=item.split(".")[0])
    assert caught.value.item == item
