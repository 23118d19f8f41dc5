"""What can be wrong with a compressed stream, in words that both sides of the worker know."""

from __future__ import annotations

# Bytes of history that a zstd stream can make its decoder hold. RFC 8878 recommends 8 MiB
# (3.1.1.1.2); the builders of images go up to 32 MiB at their highest levels.
MAX_WINDOW_BYTES = 32 * 2**20

GZIP_INVALID = "must be a valid gzip stream"
GZIP_CUT_SHORT = "the gzip stream must be complete"
GZIP_TRAILING = "after a gzip member only another one may follow"
ZSTD_INVALID = "must be a valid zstd stream"
ZSTD_CUT_SHORT = "the zstd stream must be complete"
ZSTD_TRAILING = "after a zstd frame only another one may follow"
ZSTD_WINDOW = f"a zstd frame's window has at most {MAX_WINDOW_BYTES} bytes"
ZSTD_DICTIONARY = "a zstd layer needs no dictionary"

# The worker's parent repeats no other sentence of it.
RULES = frozenset(
    {
        GZIP_INVALID,
        GZIP_CUT_SHORT,
        GZIP_TRAILING,
        ZSTD_INVALID,
        ZSTD_CUT_SHORT,
        ZSTD_TRAILING,
        ZSTD_WINDOW,
        ZSTD_DICTIONARY,
    }
)


class StreamDamaged(Exception):
    """A compressed stream breaks its format.

    `rule` is one of `RULES`; `detail` says in at most a line what was found.
    """

    def __init__(self, rule: str, detail: str) -> None:
        self.rule = rule
        self.detail = detail
        super().__init__(f"{rule}: {detail}")
