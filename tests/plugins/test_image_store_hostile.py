"""Hostile tars: each refused with the entry's name and the rule, or made harmless."""

from __future__ import annotations

import os
import struct
import tarfile
from pathlib import Path

import pytest
from image_store_rig import (
    END,
    NOTHING,
    Entry,
    entry,
    folder,
    hard_link,
    make_tar,
    memory_files,
    padded,
    raw_header,
    running,
    symlink,
    verified,
)

from plugins.image_store.tar_reader import TarReader
from plugins.image_store.tree import Node, Tree, build_tree
from supervisor import FormatError, UnknownItem

MAX_ENTRIES = 1000


def read(tar: bytes, *, max_entries: int = MAX_ENTRIES) -> Tree:
    entries = TarReader(tar, label="layer", max_entries=max_entries, between=lambda: None)
    return build_tree(entries, label="layer", max_entries=max_entries)


def paths(tree: Tree) -> dict[str, Node]:
    found = {}
    waiting = [("", tree.root)]
    while waiting:
        path, node = waiting.pop()
        for name, child in node.children.items():
            below = f"{path}/{os.fsdecode(name)}".lstrip("/")
            found[below] = child
            waiting.append((below, child))
    return found


def pax(name: str, **records: str) -> Entry:
    return entry(name, pax=records)


def xattr(name: str, value: str = "v", **fields: object) -> bytes:
    return make_tar(entry("f", pax={f"SCHILY.xattr.{name}": value}))


def pax_record(key: bytes, value: bytes) -> bytes:
    body = b" " + key + b"=" + value + b"\n"
    length = len(body)
    while len(b"%d" % length) + len(body) != length:
        length = len(b"%d" % length) + len(body)
    return b"%d" % length + body


def extended(kind: bytes, data: bytes, following: bytes = b"") -> bytes:
    header = raw_header(b"././@x", kind=kind, size=b"%o" % len(data))
    return header + padded(data) + (following or raw_header(b"f")) + END


CAPABILITY_V3 = struct.pack("<IIIIII", 0x03000001, 1, 0, 0, 0, 7).decode()

# (what it is, the tar, part of the rule that refuses it, part of the item)
REFUSED = [
    ("climbing", make_tar(entry("../f")), "climb", "'../f'"),
    ("climbing inside", make_tar(entry("a/../../f")), "climb", "'a/../../f'"),
    ("below a symlink", make_tar(symlink("d", "/etc"), entry("d/f")), "lies below 'd'", "'d/f'"),
    ("below a file", make_tar(entry("d"), entry("d/e/f")), "lies below 'd'", "'d/e/f'"),
    (
        "below a hard link",
        make_tar(entry("a"), hard_link("b", "a"), entry("b/f")),
        "lies below 'b'",
        "'b/f'",
    ),
    ("hard link outside", make_tar(hard_link("f", "../../etc/passwd")), "climb", "'f'"),
    ("hard link to nothing", make_tar(hard_link("f", "/etc/passwd")), "earlier entry", "'f'"),
    ("hard link to later", make_tar(hard_link("f", "g"), entry("g")), "earlier entry", "'f'"),
    ("hard link to a directory", make_tar(folder("d"), hard_link("f", "d")), "no directory", "'f'"),
    (
        "hard link through a symlink",
        make_tar(folder("d"), entry("d/g"), symlink("s", "d"), hard_link("f", "s/g")),
        "earlier entry",
        "'f'",
    ),
    ("hard link with data", raw_header(b"f", kind=b"1", size=b"5"), "only a file", "'f'"),
    ("symlink with data", raw_header(b"f", kind=b"2", size=b"5"), "only a file", "'f'"),
    ("directory with data", raw_header(b"f", kind=b"5", size=b"5"), "only a file", "'f'"),
    ("empty symlink", make_tar(symlink("f", "")), "1 to 4095", "'f'"),
    ("endless symlink", make_tar(symlink("f", "x" * 4096)), "1 to 4095", "'f'"),
    ("NUL in a pax path", extended(b"x", pax_record(b"path", b"a\0b")), "no NUL", "offset"),
    ("NUL in a long name", extended(b"L", b"a\0b"), "no NUL", "offset"),
    ("long component", make_tar(entry("x" * 256)), "255 bytes", "'xxx"),
    ("long path", make_tar(entry("/".join(["d" * 250] * 17))), "4095 bytes", "'ddd"),
    ("root as a file", raw_header(b"./"[:1]), "root must be a directory", "'.'"),
    ("whiteout of nothing", make_tar(entry("d/.wh.")), "name what it hides", "'d/.wh.'"),
    ("whiteout of .", make_tar(entry("d/.wh..")), "name what it hides", "'d/.wh..'"),
    ("whiteout of ..", make_tar(entry(".wh...")), "name what it hides", "'.wh...'"),
    ("below a whiteout", make_tar(entry(".wh.d/f")), "no directory", "'.wh.d/f'"),
    ("forged whiteout", make_tar(entry("f", kind=tarfile.CHRTYPE)), "forged whiteout", "'f'"),
    ("device number", raw_header(b"f", kind=b"3", magic=b"        "), "only ustar", "'f'"),
    ("redirect", xattr("trusted.overlay.redirect"), "forged", "'f'"),
    ("user redirect", xattr("user.overlay.opaque"), "forged", "'f'"),
    ("foreign attribute", xattr("trusted.x"), "only attributes user.*", "'f'"),
    ("selinux", xattr("security.selinux"), "only attributes user.*", "'f'"),
    ("capability revision", xattr("security.capability", CAPABILITY_V3), "revision 2", "'f'"),
    ("nameless attribute", xattr("user."), "has a name", "'f'"),
    ("long attribute name", xattr("user." + "x" * 251), "255 bytes", "'f'"),
    ("long attribute", xattr("user.x", "x" * 65536), "64 KiB", "'f'"),
    (
        "attribute flood",
        make_tar(entry("f", pax={f"SCHILY.xattr.user.{i:0240}": "" for i in range(300)})),
        "all attributes",
        "'f'",
    ),
    (
        "attribute on a pipe",
        make_tar(entry("f", kind=tarfile.FIFOTYPE, pax={"SCHILY.xattr.user.x": ""})),
        "only files and directories",
        "'f'",
    ),
    ("sparse, old GNU", raw_header(b"f", kind=b"S"), "sparse", "'f'"),
    ("sparse, pax", make_tar(pax("f", **{"GNU.sparse.major": "1"})), "sparse", "offset"),
    ("volume label", raw_header(b"f", kind=b"V"), "not known", "'f'"),
    ("unknown type", raw_header(b"f", kind=b"\xff"), "not known", "'f'"),
    ("bad checksum", raw_header(b"f")[:-1] + b"x", "checksum", "offset"),
    ("no header at all", b"x" * 512, "octal", "offset"),
    ("truncated header", raw_header(b"f")[:300], "truncated", "offset"),
    ("truncated data", raw_header(b"f", size=b"2000") + bytes(512), "inside the archive", "'f'"),
    ("truncated padding", raw_header(b"f", size=b"5") + b"12345", "inside the archive", "'f'"),
    (
        "lone zero block",
        raw_header(b"f") + bytes(512) + raw_header(b"g") + END,
        "lone zero block",
        "'f'",
    ),
    ("negative size", raw_header(b"f", size=b"\xff" * 12), "size is out of range", "'f'"),
    (
        "huge size",
        raw_header(b"f", size=b"\x80" + bytes(3) + b"\x7f" + b"\xff" * 7),
        "inside the archive",
        "'f'",
    ),
    ("size with sign", raw_header(b"f", size=b"-1"), "octal", "'f'"),
    ("size with underscore", raw_header(b"f", size=b"1_0"), "octal", "'f'"),
    ("size with prefix", raw_header(b"f", size=b"0o7"), "octal", "'f'"),
    ("uid -1", raw_header(b"f", uid=b"\xff" * 8), "uid is out of range", "'f'"),
    ("uid 2^32-1", make_tar(pax("f", uid="4294967295")), "uid is out of range", "'f'"),
    ("mtime", raw_header(b"f", mtime=b"\x80\x7f" + b"\xff" * 10), "mtime is out", "'f'"),
    ("pax size that lies", make_tar(pax("f", size="999999")), "inside the archive", "'f'"),
    ("pax size as text", extended(b"x", pax_record(b"size", b"+5")), "decimal", "offset"),
    ("pax mtime as text", extended(b"x", pax_record(b"mtime", b"1e9")), "seconds", "offset"),
    ("pax length that lies", extended(b"x", b"99 path=f\n"), "pax record", "offset"),
    ("pax length of zero", extended(b"x", b"0 path=f\n"), "begins with its length", "offset"),
    ("pax without newline", extended(b"x", b"9 path=fx"), "pax record", "offset"),
    ("pax without key", extended(b"x", b"5 =f\n"), "pax record", "offset"),
    ("global path", extended(b"g", pax_record(b"path", b"f")), "global", "offset"),
    ("global xattr", extended(b"g", pax_record(b"SCHILY.xattr.a", b"")), "global", "offset"),
    (
        "two pax headers",
        extended(b"x", b"", extended(b"x", b"")),
        "only one extended header",
        "offset",
    ),
    (
        "two names",
        extended(b"L", b"a", extended(b"x", pax_record(b"path", b"b"))),
        "not by both",
        "offset",
    ),
    (
        "nothing after pax",
        raw_header(b"x", kind=b"x") + END,
        "followed by its entry",
        "offset",
    ),
    (
        "long extended header",
        extended(b"x", bytes(2**20 + 1)),
        "extended header is too long",
        "offset",
    ),
    ("header flood", raw_header(b"g", kind=b"g") * (4 * MAX_ENTRIES + 1), "too many", "offset"),
]


@pytest.mark.parametrize(
    ("tar", "rule", "item"),
    [case[1:] for case in REFUSED],
    ids=[case[0].replace(" ", "-") for case in REFUSED],
)
def test_a_hostile_tar_is_refused_with_the_rule_and_the_place(
    tar: bytes, rule: str, item: str
) -> None:
    with pytest.raises(FormatError) as refused:
        read(tar)
    assert rule in refused.value.rule
    assert item in refused.value.item
    assert refused.value.item.startswith("layer, ")


def test_too_many_entries_are_refused() -> None:
    tar = make_tar(*(entry(f"{i}") for i in range(MAX_ENTRIES + 1)))
    with pytest.raises(FormatError) as refused:
        read(tar)
    assert "max_entries" in refused.value.rule
    assert f"'{MAX_ENTRIES}'" in refused.value.item
    read(tar, max_entries=MAX_ENTRIES + 1)


def test_a_hundred_thousand_entries_stop_at_the_cap() -> None:
    # One name again and again: entries count, not what is left of them.
    tar = raw_header(b"f") * 100_001 + END
    with pytest.raises(FormatError) as refused:
        read(tar, max_entries=100_000)
    assert "at most 100000 entries" in refused.value.rule


def test_directories_that_names_imply_count_too() -> None:
    deep = "/".join(["d"] * 600)
    with pytest.raises(FormatError) as refused:
        read(make_tar(entry(f"a/{deep}/f"), entry(f"b/{deep}/f")))
    assert "max_entries" in refused.value.rule


def test_absolute_names_and_double_slashes_are_relative_ones() -> None:
    tree = read(make_tar(entry("/a"), entry("./b"), entry("c//./d"), hard_link("e", "/c/d")))
    assert set(paths(tree)) == {"a", "b", "c", "c/d", "e"}
    assert paths(tree)["e"] is paths(tree)["c/d"]


def test_what_follows_the_end_of_the_archive_is_not_read() -> None:
    tar = raw_header(b"f") + END
    garbage = b"\xffgarbage" * 100
    assert set(paths(read(tar + raw_header(b"second") + garbage))) == {"f"}


@pytest.mark.parametrize("end", [b"", bytes(512), bytes(1024), bytes(10240)])
def test_an_archive_may_end_without_its_zero_blocks(end: bytes) -> None:
    assert set(paths(read(raw_header(b"f") + end))) == {"f"}


def test_the_last_of_several_entries_of_one_name_counts() -> None:
    tree = read(
        make_tar(entry("a", b"1"), symlink("a", "x"), folder("b"), entry("b/c"), entry("b", b"2"))
    )
    found = paths(tree)
    assert set(found) == {"a", "b"}
    assert found["a"].target == b"x"
    assert found["b"].size_bytes == 1


def test_a_directory_over_a_directory_keeps_what_is_in_it() -> None:
    tree = read(make_tar(folder("d", mode=0o700), entry("d/f"), folder("d", mode=0o755)))
    assert set(paths(tree)) == {"d", "d/f"}
    assert paths(tree)["d"].mode & 0o7777 == 0o755


def test_whiteouts_below_what_is_no_directory_are_dropped() -> None:
    tree = read(make_tar(entry("f"), entry("f/.wh.x"), entry(".wh.d"), entry("d/.wh.y")))
    found = paths(tree)
    assert set(found) == {"f", "d"}
    assert found["d"].is_whiteout


def test_book_keeping_of_aufs_is_passed_over() -> None:
    assert set(paths(read(make_tar(entry(".wh..wh.plnk"), entry(".wh..wh.aufs"))))) == set()


def test_set_user_id_and_devices_are_kept() -> None:
    tree = read(make_tar(entry("s", mode=0o6755), entry("z", kind=tarfile.CHRTYPE, device=(1, 5))))
    assert paths(tree)["s"].mode & 0o7777 == 0o6755
    assert paths(tree)["z"].device == (1, 5)


def test_a_global_header_with_a_comment_is_harmless() -> None:
    tar = extended(b"g", pax_record(b"comment", b"a commit"))
    assert set(paths(read(tar))) == {"f"}


@pytest.mark.root
async def test_a_refused_layer_s_bytes_are_freed(tmp_path: Path) -> None:
    before = memory_files()
    async with running(tmp_path) as rig:
        for tar in (make_tar(entry("a", bytes(10**6)), entry("../f")), b"x" * 10_000):
            layer = verified(await rig.send(tar))
            assert rig.store.budget.used_bytes == len(tar)
            with pytest.raises(FormatError) as refused:
                await rig.store.prepare(layer)
            assert str(layer.digest) in refused.value.item
            assert rig.leftovers() == NOTHING
            assert memory_files() == before
            with pytest.raises(UnknownItem):
                await rig.store.prepare(layer)


@pytest.mark.root
async def test_deep_trees_are_unpacked_and_removed(tmp_path: Path) -> None:
    deep = "/".join(["d"] * 2000)
    async with running(tmp_path) as rig:
        layer = await rig.add(make_tar(entry(f"{deep}/f", b"deep"), hard_link("g", f"{deep}/f")))
        root = await rig.mount(layer)
        assert (root.path / "g").read_bytes() == b"deep"
        assert (root.path / "g").stat().st_nlink == 2
        await root.close()
        await rig.store.discard(layer.stored)
        assert rig.leftovers() == NOTHING
