"""Incremental gzip decompression whose output never outgrows what the consumer takes."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

from supervisor import Untrusted

# One step's output: big enough that hashing releases the interpreter, small enough
# that a bomb is stopped by the layer's limit before it matters.
STEP_BYTES = 1 << 20
GZIP_FRAMING = 16 + zlib.MAX_WBITS


def gunzip(chunks: Iterable[bytes], *, item: str) -> Iterator[bytes]:
    """The plain bytes of one or more concatenated gzip members (RFC 1952, 2.2).

    Each piece has at most `STEP_BYTES`. Raises `Untrusted` for bytes that are no gzip,
    for a truncated member, and for anything after the last member.
    """
    member = zlib.decompressobj(GZIP_FRAMING)
    fresh = True  # nothing of the present member was seen yet
    members = 0
    for chunk in chunks:
        pending = chunk
        while pending:
            if member.eof:
                member = zlib.decompressobj(GZIP_FRAMING)
                members += 1
            fresh = False
            try:
                piece = member.decompress(pending, STEP_BYTES)
            except zlib.error as error:
                raise Untrusted(item, _rule(members), actual=error) from error
            if piece:
                yield piece
            pending = member.unused_data if member.eof else member.unconsumed_tail
        # zlib may hold back output when its input is used up.
        while not member.eof:
            piece = _drain(member, item)
            if not piece:
                break
            yield piece
    if fresh or not member.eof:
        raise Untrusted(item, "the gzip stream must be complete", actual="it ends too early")


def _drain(member: zlib._Decompress, item: str) -> bytes:
    try:
        return member.decompress(b"", STEP_BYTES)
    except zlib.error as error:
        raise Untrusted(item, "must be a valid gzip stream", actual=error) from error


def _rule(members: int) -> str:
    if members:
        return "after a gzip member only another one may follow"
    return "must be a valid gzip stream"
