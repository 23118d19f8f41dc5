"""Strings of strangers, made harmless for terminals and for files that people read."""

from __future__ import annotations

import unicodedata

MAX_SHOWN_CHARACTERS = 2000
# Letters that turn the direction of the line around them.
_RIGHT_TO_LEFT = frozenset({"R", "AL", "AN"})


def inert(text: str, *, max_characters: int = MAX_SHOWN_CHARACTERS) -> str:
    """Escape whatever is not plainly printable: controls, line breaks, direction marks,
    invisible characters, stacked accents. A backslash is doubled, so that escapes are
    unambiguous. Cut with a count behind `max_characters`."""
    shown = "".join(map(_inert_character, text[:max_characters]))
    rest = len(text) - max_characters
    return f"{shown}… ({rest} more characters)" if rest > 0 else shown


def _inert_character(character: str) -> str:
    if character == "\\":
        return "\\\\"
    if character == " " or (
        character.isprintable()
        and not unicodedata.category(character).startswith("M")
        and unicodedata.bidirectional(character) not in _RIGHT_TO_LEFT
    ):
        return character
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
