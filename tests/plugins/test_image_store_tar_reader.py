"""How headers are read: every writer's way of saying names and numbers, and no other."""

from __future__ import annotations

import os
import tarfile
from mmap import PROT_READ, mmap

import pytest
from hostile_tars import extended, pax_record
from image_store_rig import END, entry, make_tar, raw_header
from image_store_trees import memory_file

from plugins.image_store.tar.node import Node
from plugins.image_store.tar.reader import HEADERS_BETWEEN, TarEntry, TarReader
from supervisor import FormatError


def read(tar: bytes | mmap) -> list[TarEntry]:
    return list(TarReader(tar, label="layer", max_entries=1000, between=lambda: None))


def only(tar: bytes) -> Node:
    (found,) = read(tar)
    return found.node


@pytest.mark.parametrize(
    ("field", "number"),
    [
        (b"0000755\0", 0o755),
        (b"0000755 ", 0o755),
        (b"   755 \0", 0o755),
        (b"755\0\0\0\0\0", 0o755),
        (b"00000755", 0o755),  # eight digits and no end
        (b"\0" * 8, 0),
        (b"        ", 0),
        (b"\x80" + bytes(5) + b"\x01\xed", 0o755),
    ],
)
def test_numbers_are_octal_or_base_256(field: bytes, number: int) -> None:
    node = only(raw_header(b"f", uid=field, gid=field) + END)
    assert (node.uid, node.gid) == (number, number)


@pytest.mark.parametrize(
    ("field", "seconds"),
    [
        (b"00000000010\0", 8),
        (b"\xff" * 12, -1),
        (b"\xff" * 11 + b"\x00", -256),
        (b"\x80" + bytes(6) + b"\x01" + bytes(4), 2**32),
    ],
)
def test_times_may_lie_before_1970_and_after_2106(field: bytes, seconds: int) -> None:
    assert only(raw_header(b"f", mtime=field) + END).mtime_ns == seconds * 10**9


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        (b"1", 10**9),
        (b"1.", 10**9),
        (b"1.5", 1_500_000_000),
        (b"-1.5", -1_500_000_000),
        (b"0.1234567891", 123_456_789),
        (b"-0.1234567891", -123_456_790),  # down, as GNU tar rounds
        (b"-0.1234567890", -123_456_789),
    ],
)
def test_pax_times_have_fractions(text: bytes, nanoseconds: int) -> None:
    assert only(extended(b"x", pax_record(b"mtime", text))).mtime_ns == nanoseconds


def test_an_empty_pax_value_leaves_the_header_s() -> None:
    records = b"".join(pax_record(key, b"") for key in (b"path", b"uid", b"mtime", b"size"))
    (found,) = read(extended(b"x", records, raw_header(b"f", uid=b"0000007\0")))
    assert (found.name, found.node.uid) == (b"f", 7)


def test_the_last_pax_record_of_a_key_counts() -> None:
    records = pax_record(b"path", b"a") + pax_record(b"path", b"b")
    assert read(extended(b"x", records))[0].name == b"b"


def test_pax_values_may_hold_any_byte() -> None:
    value = b"a=b\nc\0d\xff"
    node = only(extended(b"x", pax_record(b"SCHILY.xattr.user.x", value)))
    assert node.xattrs == {b"user.x": value}


def test_a_pax_header_is_for_one_entry_only() -> None:
    tar = extended(b"x", pax_record(b"uid", b"7"), raw_header(b"f") + raw_header(b"g"))
    assert [found.node.uid for found in read(tar)] == [7, 0]


@pytest.mark.parametrize(
    ("magic", "name"),
    [
        (b"ustar\x0000", b"directory/f"),
        (b"ustar  \0", b"f"),  # GNU's, which keeps times there
        (bytes(8), b"f"),  # v7's, which ends before
    ],
)
def test_only_ustar_has_a_prefix(magic: bytes, name: bytes) -> None:
    tar = raw_header(b"f", magic=magic, prefix=b"directory") + END
    assert [found.name for found in read(tar)] == [name]


def test_a_name_that_fills_its_field_has_no_end() -> None:
    tar = raw_header(b"n" * 100, prefix=b"p" * 155) + END
    assert read(tar)[0].name == b"p" * 155 + b"/" + b"n" * 100


def test_a_file_whose_name_ends_in_a_slash_is_a_directory() -> None:
    """As old tars say it."""
    assert only(raw_header(b"d/") + END).is_directory


def test_long_names_and_long_links_go_together() -> None:
    name, target = "n" * 300, "t" * 400
    info, data = entry(name, kind=tarfile.SYMTYPE, link=target)
    (found,) = read(make_tar((info, data), tar_format=tarfile.GNU_FORMAT))
    assert (found.name, found.node.target) == (name.encode(), target.encode())


def test_a_sum_beyond_what_adler_can_hold_is_right() -> None:
    tar = raw_header(b"\xff" * 100, linkname=b"\xff" * 100, prefix=b"\xff" * 155) + END
    assert read(tar)[0].name == b"\xff" * 155 + b"/" + b"\xff" * 100


def test_a_sum_of_signed_bytes_is_refused() -> None:
    """As Sun's tar once made it: the only parsers that take it also take the right one."""
    block = bytearray(raw_header(b"\xff\xff"))
    signed = sum(byte - 256 if byte > 127 else byte for byte in block)
    block[148:156] = b"%06o\0 " % (signed - sum(block[148:156]) + 8 * ord(" "))
    with pytest.raises(FormatError) as refused:
        read(bytes(block) + END)
    assert "checksum" in refused.value.rule


def test_data_lie_where_the_header_says() -> None:
    contents = {b"a": b"x" * 513, b"b": b"", b"c": b"yz", b"d": b"w" * 512}
    tar = make_tar(*(entry(os.fsdecode(name), data) for name, data in contents.items()))
    for found in read(tar):
        start, end = found.node.data_offset, found.node.data_offset + found.node.size_bytes
        assert start % 512 == 0
        assert tar[start:end] == contents[found.name]


def test_a_mapped_file_is_read_like_bytes() -> None:
    tar = make_tar(entry("a", b"x"), entry("n" * 300, pax={"SCHILY.xattr.user.x": "v"}))
    with memory_file(tar) as fd, mmap(fd, 0, prot=PROT_READ) as archive:
        mapped = read(archive)  # and the map can be closed: nothing of it is held
    assert [(found.name, dict(found.node.xattrs)) for found in mapped] == [
        (found.name, dict(found.node.xattrs)) for found in read(tar)
    ]


def test_between_is_called_every_so_many_headers_and_may_stop_the_walk() -> None:
    calls = 0

    def between() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise InterruptedError

    reader = TarReader(raw_header(b"f") * 1000, label="layer", max_entries=1000, between=between)
    seen = 0
    with pytest.raises(InterruptedError):
        for _ in reader:
            seen += 1
    assert seen == 2 * HEADERS_BETWEEN


def test_a_file_s_children_cannot_be_added_to() -> None:
    """They are shared by all files, so that a slip would show everywhere."""
    node = only(raw_header(b"f") + END)
    with pytest.raises(TypeError):
        node.children[b"x"] = node
