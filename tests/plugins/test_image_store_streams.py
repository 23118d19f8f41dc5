"""gzip and zstd, step by step: what is given back, what is refused, and how much at once."""

from __future__ import annotations

import gzip
import struct
import zlib

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from plugins.image_store.inflate.damage import (
    GZIP_CUT_SHORT,
    GZIP_INVALID,
    GZIP_TRAILING,
    MAX_WINDOW_BYTES,
    RULES,
    ZSTD_CUT_SHORT,
    ZSTD_DICTIONARY,
    ZSTD_INVALID,
    ZSTD_TRAILING,
    ZSTD_WINDOW,
)
from plugins.image_store.inflate.gzip_members import MAX_TEXT_BYTES
from plugins.image_store.inflate.streams import STEP_BYTES, StreamDamaged, gunzip, unzstd

SKIPPABLE = struct.pack("<II", 0x184D2A53, 5) + b"12345"
plain_parts = st.lists(st.binary(max_size=300), min_size=1, max_size=4)


def cut(blob: bytes, size_bytes: int) -> list[bytes]:
    return [blob[start : start + size_bytes] for start in range(0, len(blob), size_bytes)]


def member(plain: bytes, *, flags: int = 0, header_crc: int | None = None) -> bytes:
    """A gzip member with all the optional fields that `flags` asks for (RFC 1952, 2.3)."""
    header = b"\x1f\x8b\x08" + bytes([flags]) + bytes(6)
    if flags & 0x04:
        header += struct.pack("<H", 300) + b"x" * 300
    if flags & 0x08:
        header += b"a name\0"
    if flags & 0x10:
        header += b"a comment\0"
    if flags & 0x02:
        crc = zlib.crc32(header) & 0xFFFF if header_crc is None else header_crc
        header += struct.pack("<H", crc)
    packer = zlib.compressobj(wbits=-15)
    body = packer.compress(plain) + packer.flush()
    return header + body + struct.pack("<II", zlib.crc32(plain), len(plain))


def frame(
    plain: bytes,
    *,
    level: int = 3,
    write_checksum: bool = False,
    write_content_size: bool = True,
) -> bytes:
    packer = zstandard.ZstdCompressor(
        level=level, write_checksum=write_checksum, write_content_size=write_content_size
    )
    return packer.compress(plain)


def refused(stream: str, *chunks: bytes) -> str:
    """The rule that is broken; what the stream says must fit one line."""
    inflate = {"gzip": gunzip, "zstd": unzstd}[stream]
    with pytest.raises(StreamDamaged) as caught:
        list(inflate(chunks))
    assert caught.value.rule in RULES
    assert 0 < len(caught.value.detail) < 200
    assert "\n" not in caught.value.detail
    return caught.value.rule


@given(plain_parts, st.integers(1, 50), st.sampled_from(range(0x20)))
def test_gunzip_gives_what_was_compressed_however_it_is_cut(
    parts: list[bytes], size_bytes: int, flags: int
) -> None:
    blob = b"".join(member(part, flags=flags & ~1) for part in parts)
    assert b"".join(gunzip(cut(blob, size_bytes))) == b"".join(parts)


@given(plain_parts, st.integers(1, 50), st.booleans(), st.booleans(), st.sampled_from([1, 3, 19]))
def test_unzstd_gives_what_was_compressed_however_it_is_cut(
    parts: list[bytes], size_bytes: int, checksum: bool, content_size: bool, level: int
) -> None:
    blob = SKIPPABLE + b"".join(
        frame(part, level=level, write_checksum=checksum, write_content_size=content_size)
        + SKIPPABLE
        for part in parts
    )
    assert b"".join(unzstd(cut(blob, size_bytes))) == b"".join(parts)


@given(st.binary(min_size=1, max_size=300), st.data())
def test_every_truncated_stream_is_refused(plain: bytes, data: st.DataObject) -> None:
    for stream, blob, rule in (
        ("gzip", gzip.compress(plain), GZIP_CUT_SHORT),
        ("zstd", frame(plain, write_checksum=True), ZSTD_CUT_SHORT),
    ):
        end = data.draw(st.integers(min_value=0, max_value=len(blob) - 1))
        assert refused(stream, blob[:end]) == rule


@given(st.binary(min_size=1, max_size=3000), st.data())
def test_a_changed_bit_is_refused_or_changes_nothing(plain: bytes, data: st.DataObject) -> None:
    for inflate, blob in ((gunzip, gzip.compress(plain)), (unzstd, frame(plain))):
        changed = bytearray(blob)
        place = data.draw(st.integers(0, len(blob) * 8 - 1))
        changed[place // 8] ^= 1 << place % 8
        try:
            found = b"".join(inflate([bytes(changed)]))
        except StreamDamaged:
            continue
        # Times and the like carry no data; zstd without a checksum cannot tell.
        assert found == plain or inflate is unzstd


@pytest.mark.parametrize(
    ("blob", "rule"),
    [
        (b"PK\x03\x04", GZIP_INVALID),
        (b"\x1f\x8b\x07" + gzip.compress(b"x")[3:], GZIP_INVALID),
        (member(b"x", flags=0x20), GZIP_INVALID),
        (member(b"x", flags=0x02, header_crc=1), GZIP_INVALID),
        (member(b"x")[:-8] + bytes(8), GZIP_INVALID),
        (member(b"x")[:-4] + b"\x02\0\0\0", GZIP_INVALID),
        (member(b"x")[:10] + b"\xff" * 20, GZIP_INVALID),
        (b"\x1f\x8b\x08\x08" + bytes(6) + b"n" * (MAX_TEXT_BYTES + 1) + b"\0", GZIP_INVALID),
        (member(b"x") + b"garbage", GZIP_TRAILING),
        (member(b"x") + bytes(2), GZIP_TRAILING),
        (member(b"x") + b"\x1f", GZIP_CUT_SHORT),
    ],
    ids=[
        "zip",
        "method",
        "reserved-flag",
        "header-crc",
        "crc",
        "size",
        "block",
        "endless-name",
        "garbage",
        "zeros",
        "half-magic",
    ],
)
def test_broken_gzip_is_refused_with_its_rule(blob: bytes, rule: str) -> None:
    assert refused("gzip", blob) == rule


def zstd_block(kind: int, size_bytes: int, content: bytes, *, last: bool = True) -> bytes:
    """A frame of one block, with a window of 1 KiB (RFC 8878, 3.1.1)."""
    header = struct.pack("<I", size_bytes << 3 | kind << 1 | last)[:3]
    return b"\x28\xb5\x2f\xfd" + b"\x00\x00" + header + content


@pytest.mark.parametrize(
    ("blob", "rule"),
    [
        (gzip.compress(b"x"), ZSTD_INVALID),
        (frame(b"x") + b"garbage", ZSTD_TRAILING),
        (frame(b"x" * 99, write_checksum=True)[:-1] + b"?", ZSTD_INVALID),
        (SKIPPABLE[:-1], ZSTD_CUT_SHORT),
        (zstd_block(3, 1, b"x"), ZSTD_INVALID),
        (zstd_block(1, 2**21 - 1, b"x"), ZSTD_INVALID),
        (zstd_block(0, 1, b"x", last=False), ZSTD_CUT_SHORT),
        (b"\x28\xb5\x2f\xfd\x01\x00\x07" + bytes([1, 0, 0]), ZSTD_DICTIONARY),
        (b"\x28\xb5\x2f\xfd\x08\x00" + bytes([1, 0, 0]), ZSTD_INVALID),
    ],
    ids=[
        "gzip",
        "garbage",
        "checksum",
        "skippable",
        "reserved-block",
        "long-run",
        "no-last",
        "dictionary",
        "reserved-bit",
    ],
)
def test_broken_zstd_is_refused_with_its_rule(blob: bytes, rule: str) -> None:
    assert refused("zstd", blob) == rule


def test_a_zstd_window_beyond_the_bound_is_refused_before_it_is_made() -> None:
    exponent = MAX_WINDOW_BYTES.bit_length() - 1 - 10
    for extra, is_allowed in ((0, True), (1, False)):
        window = bytes([exponent << 3 | extra])  # 3.1.1.1.2: eighths above a power of two
        blob = b"\x28\xb5\x2f\xfd\x00" + window + bytes([1, 0, 0])
        if is_allowed:
            assert list(unzstd([blob])) == []
        else:
            assert refused("zstd", blob) == ZSTD_WINDOW


def test_no_piece_is_empty_or_longer_than_a_step() -> None:
    plain = bytes(5 << 20)
    for pieces in (gunzip([gzip.compress(plain)]), unzstd([frame(plain)])):
        sizes = [len(piece) for piece in pieces]
        assert sum(sizes) == len(plain)
        assert min(sizes) > 0
        assert max(sizes) <= STEP_BYTES


def test_many_small_members_and_frames_are_one_stream() -> None:
    assert b"".join(gunzip([gzip.compress(b"a") * 20_000])) == b"a" * 20_000
    assert b"".join(unzstd([frame(b"a") * 20_000])) == b"a" * 20_000
