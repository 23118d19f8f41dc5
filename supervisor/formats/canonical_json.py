"""JSON whose bytes are a function of its meaning (RFC 8785), and a reader that refuses
everything on which two readers could disagree.

Only integers that every JSON implementation keeps exactly are allowed; no format here
needs a fraction, and their canonical text is where implementations differ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence

from supervisor.formats.errors import FormatError

MAX_INTEGER = 2**53 - 1
MAX_DEPTH = 32
# What `encode` accepts: deeper values are a mistake (or a cycle) in our own code.
MAX_ENCODED_DEPTH = 64
_MAX_INTEGER_DIGITS = len(str(MAX_INTEGER))
_SHOWN_CHARACTERS = 160
_PLAIN_MEMBER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
# Go's encoder makes its output safe to embed in HTML and JavaScript.
_GO_ESCAPES = str.maketrans({c: f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"})

_to_text = json.JSONEncoder(
    ensure_ascii=False, separators=(",", ":"), check_circular=False, allow_nan=False
).encode


def encode(value: object) -> bytes:
    """RFC 8785 bytes of a tree of dict, list, tuple, str, int, bool and None.

    Raises `FormatError` for anything else, for integers beyond `MAX_INTEGER`, for text
    with lone surrogates and for trees deeper than `MAX_ENCODED_DEPTH`.
    """
    return _to_text(_ordered(value, "$", MAX_ENCODED_DEPTH, _utf16)).encode()


def encode_go(value: object) -> bytes:
    """What Go's `json.Marshal` gives for a decoded map: the form that `aconcli` signs.

    It differs from `encode` in the order of keys beyond ASCII (by code point) and in that
    `<`, `>`, `&`, U+2028 and U+2029 are escaped (control characters as since Go 1.22).
    Raises as `encode` does.
    """
    text = _to_text(_ordered(value, "$", MAX_ENCODED_DEPTH, None))
    return text.translate(_GO_ESCAPES).encode()


def decode(raw: bytes, *, item: str, max_bytes: int, max_depth: int = MAX_DEPTH) -> object:
    """Read one JSON value strictly, as dict, list, str, int, bool and None.

    `item` is the path of the root in errors: a member `a` of it is `item.a`. Raises
    `FormatError` for more than `max_bytes`, more than `max_depth` nested containers, bad
    UTF-8, duplicate keys, fractions, exponents, NaN, infinities, integers beyond
    `MAX_INTEGER` and lone surrogates.
    """
    if len(raw) > max_bytes:
        raise FormatError(
            item,
            "must not be larger than its limit",
            expected=f"{max_bytes} bytes",
            actual=len(raw),
        )
    try:
        text = raw.decode("utf-8", "strict")
    except UnicodeDecodeError as error:
        raise FormatError(item, "must be UTF-8", actual=f"offset {error.start}") from None
    try:
        value = _decoder.decode(text)
    except json.JSONDecodeError as error:
        raise FormatError(
            item, f"must be JSON ({error.msg})", actual=f"character {error.pos}"
        ) from None
    except RecursionError:
        raise _too_deep(item, max_depth) from None
    _check(value, item, max_depth, max_depth)
    return value


def decode_canonical(raw: bytes, *, item: str, max_bytes: int) -> object:
    """As `decode`, and `raw` must be the RFC 8785 form of what it says."""
    value = decode(raw, item=item, max_bytes=max_bytes)
    canonical = encode(value)
    if canonical != raw:
        offset = next(
            (i for i, (a, b) in enumerate(zip(raw, canonical, strict=False)) if a != b),
            min(len(raw), len(canonical)),
        )
        raise FormatError(
            item, "must be canonical JSON (RFC 8785)", actual=f"differs at offset {offset}"
        )
    return value


def member_path(path: str, key: str) -> str:
    """The path of member `key` of the object at `path`, as errors name it."""
    if _PLAIN_MEMBER.fullmatch(key):
        return f"{path}.{key}"
    return f"{path}[{json.dumps(key[:_SHOWN_CHARACTERS])}]"


class _Refused:
    """Stands in the decoded tree where a hook met what must be refused.

    The decoder's hooks do not know where in the document they are; the walk does.
    """

    def __init__(self, rule: str, actual: str, member: str | None = None) -> None:
        self.rule = rule
        self.actual = actual[:_SHOWN_CHARACTERS]
        self.member = member


def _object(pairs: list[tuple[str, object]]) -> object:
    members = dict(pairs)
    if len(members) == len(pairs):
        return members
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            return _Refused("a key must not appear twice", key, member=key)
        seen.add(key)
    return members


def _integer(digits: str) -> object:
    if len(digits) <= _MAX_INTEGER_DIGITS + 1:
        value = int(digits)
        if -MAX_INTEGER <= value <= MAX_INTEGER:
            return value
    return _Refused(f"an integer must lie within +-{MAX_INTEGER}", digits)


def _fraction(text: str) -> object:
    return _Refused("a number must be an integer, without fraction and exponent", text)


def _constant(text: str) -> object:
    return _Refused("NaN and infinities are not JSON", text)


_decoder = json.JSONDecoder(
    object_pairs_hook=_object,
    parse_int=_integer,
    parse_float=_fraction,
    parse_constant=_constant,
)


def _too_deep(path: str, max_depth: int) -> FormatError:
    return FormatError(path, "must not be nested deeper than its limit", expected=max_depth)


def _check_text(text: str, path: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FormatError(
            path, "text must not hold lone surrogates", actual=f"character {error.start}"
        ) from None


def _check(value: object, path: str, depth: int, max_depth: int) -> None:
    """Refuse what the hooks marked, lone surrogates, and more than `depth` levels."""
    kind = type(value)
    if kind is str:
        _check_text(str(value), path)
    elif isinstance(value, dict):
        if depth == 0:
            raise _too_deep(path, max_depth)
        for key, child in value.items():
            if not key.isascii():
                _check_text(key, path)
            if type(child) is not int:
                _check(child, member_path(path, key), depth - 1, max_depth)
    elif isinstance(value, list):
        if depth == 0:
            raise _too_deep(path, max_depth)
        for index, child in enumerate(value):
            _check(child, f"{path}[{index}]", depth - 1, max_depth)
    elif isinstance(value, _Refused):
        at = path if value.member is None else member_path(path, value.member)
        raise FormatError(at, value.rule, actual=value.actual)


def _utf16(key: str) -> bytes:
    return key.encode("utf-16-be")


def _ordered(value: object, path: str, depth: int, order: Callable[[str], bytes] | None) -> object:
    """A copy of `value` with sorted keys, refusing what has no canonical form."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        _check_text(value, path)
        return value
    if isinstance(value, int):
        if not -MAX_INTEGER <= value <= MAX_INTEGER:
            raise FormatError(path, f"an integer must lie within +-{MAX_INTEGER}")
        return value
    if isinstance(value, dict):
        return _ordered_object(value, path, depth, order)
    if isinstance(value, list | tuple):
        return _ordered_array(value, path, depth, order)
    raise FormatError(path, "canonical JSON has no form for this type", actual=type(value).__name__)


def _ordered_object(
    value: dict[object, object], path: str, depth: int, order: Callable[[str], bytes] | None
) -> dict[str, object]:
    if depth == 0:
        raise _too_deep(path, MAX_ENCODED_DEPTH)
    keys: list[str] = []
    for key in value:
        if not isinstance(key, str):
            raise FormatError(path, "keys must be text", actual=type(key).__name__)
        _check_text(key, path)
        keys.append(key)
    keys.sort(key=order)
    return {k: _ordered(value[k], member_path(path, k), depth - 1, order) for k in keys}


def _ordered_array(
    value: Sequence[object], path: str, depth: int, order: Callable[[str], bytes] | None
) -> list[object]:
    if depth == 0:
        raise _too_deep(path, MAX_ENCODED_DEPTH)
    return [_ordered(v, f"{path}[{i}]", depth - 1, order) for i, v in enumerate(value)]
