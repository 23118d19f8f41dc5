from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.formats.canonical_json import (
    MAX_DEPTH,
    MAX_INTEGER,
    decode,
    decode_canonical,
    encode,
    encode_go,
)
from supervisor.formats.errors import FormatError, Refusal

_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
_values = st.recursive(
    st.none() | st.booleans() | st.integers(-MAX_INTEGER, MAX_INTEGER) | _text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_text, inner, max_size=4),
    max_leaves=20,
)


def refusal_of(raw: bytes, *, max_bytes: int = 10_000, max_depth: int = MAX_DEPTH) -> FormatError:
    with pytest.raises(FormatError) as caught:
        decode(raw, item="$", max_bytes=max_bytes, max_depth=max_depth)
    return caught.value


@given(_values)
def test_what_was_encoded_decodes_to_the_same(value: object) -> None:
    raw = encode(value)
    assert decode(raw, item="$", max_bytes=len(raw)) == value
    assert decode_canonical(raw, item="$", max_bytes=len(raw)) == value


@given(_values)
def test_gos_form_means_the_same(value: object) -> None:
    raw = encode_go(value)
    assert decode(raw, item="$", max_bytes=len(raw)) == value
    assert not set(raw) & set(b"<>&")


@given(_values)
def test_the_order_of_keys_makes_no_difference(value: object) -> None:
    def reversed_keys(tree: object) -> object:
        if isinstance(tree, dict):
            return {k: reversed_keys(v) for k, v in reversed(tree.items())}
        if isinstance(tree, list):
            return [reversed_keys(v) for v in tree]
        return tree

    assert encode(reversed_keys(value)) == encode(value)
    assert encode_go(reversed_keys(value)) == encode_go(value)


@given(st.binary(max_size=60) | _text.map(str.encode))
def test_arbitrary_bytes_are_read_or_refused_and_nothing_else(raw: bytes) -> None:
    try:
        value = decode(raw, item="$", max_bytes=100)
    except Refusal:
        return
    assert value == json.loads(raw)


def test_keys_are_sorted_by_utf_16_as_in_rfc_8785_section_3_2_3() -> None:
    value = {
        "\u20ac": "Euro Sign",
        "\r": "Carriage Return",
        "\ufb33": "Hebrew Letter Dalet With Dagesh",
        "1": "One",
        "\U0001f600": "Emoji: Grinning Face",
        "\u0080": "Control",
        "\u00f6": "Latin Small Letter O With Diaeresis",
    }
    ordered = decode(encode(value), item="$", max_bytes=1000)
    assert isinstance(ordered, dict)
    assert list(ordered) == ["\r", "1", "\u0080", "\u00f6", "\u20ac", "\U0001f600", "\ufb33"]
    by_bytes = decode(encode_go(value), item="$", max_bytes=1000)
    assert isinstance(by_bytes, dict)
    assert list(by_bytes) == ["\r", "1", "\u0080", "\u00f6", "\u20ac", "\ufb33", "\U0001f600"]


def test_text_is_escaped_as_in_rfc_8785_section_3_2_2_2() -> None:
    text = '\u20ac$\x0f\nA\'B"\\\\"/\b\t\f\r\x7f<>&\u2028'
    assert encode(text) == (
        b'"\xe2\x82\xac$\\u000f\\nA\'B\\"\\\\\\\\\\"/\\b\\t\\f\\r\x7f<>&\xe2\x80\xa8"'
    )


def test_go_escapes_what_html_and_javascript_would_misread() -> None:
    assert encode_go({"a": "<b>&\u2028\u2029/"}) == b'{"a":"\\u003cb\\u003e\\u0026\\u2028\\u2029/"}'


def test_tuples_are_arrays() -> None:
    assert encode((1, (True, None))) == b"[1,[true,null]]"


@pytest.mark.parametrize(
    ("value", "item"),
    [
        (1.5, "$"),
        ({"a": [1, 2.0]}, "$.a[1]"),
        ({"a": float("nan")}, "$.a"),
        ([MAX_INTEGER + 1], "$[0]"),
        ([-MAX_INTEGER - 1], "$[0]"),
        ({"a": "\ud800"}, "$.a"),
        ({"\udfff": 1}, "$"),
        ({1: 1}, "$"),
        ({"a b": b"x"}, '$["a b"]'),
        ({"a": {1, 2}}, "$.a"),
    ],
)
def test_what_has_no_canonical_form_is_not_encoded(value: object, item: str) -> None:
    for encoder in (encode, encode_go):
        with pytest.raises(FormatError) as caught:
            encoder(value)
        assert caught.value.item == item


def test_a_cycle_is_refused_rather_than_followed() -> None:
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(FormatError):
        encode(loop)


@pytest.mark.parametrize(
    ("raw", "item"),
    [
        (b'{"a":1,"a":1}', "$.a"),
        (b'{"x":[{"b":1},{"c":{"a":1,"b":2,"a":3}}]}', "$.x[1].c.a"),
        (b'{"a":1,"\\u0061":2}', "$.a"),
        (b'{"a b":1,"a b":2}', '$["a b"]'),
        (b'{"c":0,"b":1,"a":2,"b":3}', "$.b"),
        (b'{"a":{"b":1,"b":2},"a":3}', "$.a"),
    ],
)
def test_a_duplicate_key_is_refused_with_its_path(raw: bytes, item: str) -> None:
    error = refusal_of(raw)
    assert (error.item, error.rule) == (item, "a key must not appear twice")


@pytest.mark.parametrize("number", ["1.0", "1e3", "1E3", "-0.5", "1e400", "0.1e-3"])
def test_a_fraction_or_exponent_is_refused_with_its_path(number: str) -> None:
    error = refusal_of(b'{"a":[0,%s]}' % number.encode())
    assert (error.item, error.actual) == ("$.a[1]", number)


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_nan_and_infinity_are_refused_with_their_path(constant: str) -> None:
    error = refusal_of(b'{"a":%s}' % constant.encode())
    assert (error.item, error.actual) == ("$.a", constant)


@pytest.mark.parametrize("digits", ["9007199254740992", "-9007199254740992", "9" * 5000])
def test_an_integer_that_readers_round_is_refused(digits: str) -> None:
    assert refusal_of(b"[%s]" % digits.encode()).item == "$[0]"


def test_the_largest_integers_are_kept() -> None:
    raw = b"[9007199254740991,-9007199254740991]"
    assert decode_canonical(raw, item="$", max_bytes=100) == [MAX_INTEGER, -MAX_INTEGER]


@pytest.mark.parametrize(
    ("raw", "item"),
    [(b'["\\ud800"]', "$[0]"), (b'{"a":"x\\udc00y"}', "$.a"), (b'{"\\ud800":1}', "$")],
)
def test_a_lone_surrogate_is_refused(raw: bytes, item: str) -> None:
    error = refusal_of(raw)
    assert (error.item, error.rule) == (item, "text must not hold lone surrogates")


def test_a_surrogate_pair_is_one_character() -> None:
    assert decode(b'"\\ud83d\\ude00"', item="$", max_bytes=100) == "\U0001f600"


@pytest.mark.parametrize(
    "raw",
    [b"\xff", b'"\xc0\xaf"', b'"\xed\xa0\x80"', b'"\xf5\x80\x80\x80"', b'"\xe2\x82"'],
)
def test_bad_utf_8_is_refused(raw: bytes) -> None:
    assert refusal_of(raw).rule == "must be UTF-8"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b" ",
        b"\xef\xbb\xbf{}",
        b"{}x",
        b"{} {}",
        b"{'a':1}",
        b'{"a":1,}',
        b"[1,]",
        b'{"a"}',
        b'{"a":}',
        b'"\t"',
        b'"\\x41"',
        b"01",
        b"+1",
        b"tru",
        b"undefined",
        b"[1 2]",
        b"\x0b[]",
        "[\u0661]".encode(),
        b"/**/1",
    ],
)
def test_what_is_not_json_is_refused(raw: bytes) -> None:
    assert refusal_of(raw).rule.startswith("must be JSON")


def test_too_many_bytes_are_refused_before_they_are_read() -> None:
    error = refusal_of(b"[" * 101, max_bytes=100)
    assert (error.expected, error.actual) == ("100 bytes", "101")


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_nesting_beyond_the_limit_is_refused(opening: bytes) -> None:
    closing = b"]" if opening == b"[" else b"}"
    assert refusal_of(opening * 33 + b"1" + closing * 33).expected == "32"
    assert decode(opening * 32 + b"1" + closing * 32, item="$", max_bytes=1000) is not None
    for levels in (3_000, 100_000):
        error = refusal_of(opening * levels + b"1" + closing * levels, max_bytes=10**6)
        assert error.rule == "must not be nested deeper than its limit"


@pytest.mark.parametrize(
    "raw",
    [b"{ }", b"{}\n", b'{"b":1,"a":2}', b'"\\u0041"', b'"\\/"', b"-0", b'{"a": 1}', b'"\\u000a"'],
)
def test_json_in_another_than_the_canonical_form_is_refused(raw: bytes) -> None:
    decode(raw, item="x", max_bytes=100)
    with pytest.raises(FormatError) as caught:
        decode_canonical(raw, item="x", max_bytes=100)
    assert caught.value.item == "x"
    assert "canonical" in caught.value.rule


def test_where_the_form_departs_from_the_canonical_is_said() -> None:
    for raw, offset in ((b'{"a":1, "b":2}', 7), (b'{"a":1}\n', 7), (b'{"b":1,"a":2}', 2)):
        with pytest.raises(FormatError) as caught:
            decode_canonical(raw, item="x", max_bytes=100)
        assert caught.value.actual == f"differs at offset {offset}"


def test_errors_repeat_little_of_what_they_refuse() -> None:
    error = refusal_of(b'{"%s":1,"%s":2}' % (b"a" * 3000, b"a" * 3000))
    assert len(str(error)) < 600
