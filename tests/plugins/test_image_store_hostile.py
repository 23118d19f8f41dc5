"""Hostile tars: each refused with the entry's name and the rule."""

from __future__ import annotations

from pathlib import Path

import pytest
from hostile_tars import NULL_DEVICE, REFUSED, extended, pax_record
from hypothesis import given, settings
from hypothesis import strategies as st
from image_store_fixtures import CHOSEN
from image_store_rig import (
    END,
    NOTHING,
    entry,
    folder,
    hard_link,
    make_tar,
    memory_files,
    raw_header,
    running,
    symlink,
    verified,
)
from image_store_trees import MAX_ENTRIES, index_bytes, paths, read_tree

from plugins.image_store.config import StoreConfig
from plugins.image_store.index import plan_index
from plugins.image_store.mount.roots import ROOT_BYTES
from plugins.image_store.mount.supplement import HINT_BYTES
from plugins.image_store.tar.tree import (
    INODE_BYTES,
    MAX_REMEMBERED_DIRECTORIES,
    MAX_TEXT_BYTES,
    XATTR_BYTES,
)
from supervisor import Busy, FormatError, UnknownItem

FUZZED = make_tar(
    folder("d"),
    entry("d/f", b"x" * 600, pax={"SCHILY.xattr.user.note": "v", "mtime": "1.5"}),
    hard_link("d/link", "d/f"),
    symlink("s", "d"),
    entry("d/" + "n" * 150, b"y"),
    entry(".wh.gone"),
    NULL_DEVICE,
)
TOKENS = [b"\0" * 8, b"../", b"/", b".wh.", b"\xff" * 12, b"7777777", b"=", b"\n", b"9 ", b"xgLK2"]


@pytest.mark.parametrize(
    ("tar", "rule", "item"),
    [case[1:] for case in REFUSED],
    ids=[case[0].replace(" ", "-") for case in REFUSED],
)
def test_a_hostile_tar_is_refused_with_the_rule_and_the_place(
    tar: bytes, rule: str, item: str
) -> None:
    with pytest.raises(FormatError) as refused:
        read_tree(tar)
    assert rule in refused.value.rule
    assert item in refused.value.item
    assert refused.value.item.startswith("layer, ")


def test_too_many_entries_are_refused() -> None:
    tar = make_tar(*(entry(f"{i}") for i in range(MAX_ENTRIES + 1)))
    with pytest.raises(FormatError) as refused:
        read_tree(tar)
    assert "max_entries" in refused.value.rule
    assert f"'{MAX_ENTRIES}'" in refused.value.item
    read_tree(tar, max_entries=MAX_ENTRIES + 1)


def test_a_million_entries_stop_at_the_operator_s_cap() -> None:
    # One name again and again: entries count, not what is left of them. What lies behind
    # the first one too many is not read, so that it need not be there.
    cap = StoreConfig().max_entries
    assert cap < 10**6
    with pytest.raises(FormatError) as refused:
        read_tree(raw_header(b"f") * (cap + 1), max_entries=cap)
    assert f"at most {cap} entries" in refused.value.rule


def test_directories_that_names_imply_count_too() -> None:
    deep = "/".join(["d"] * 600)
    with pytest.raises(FormatError) as refused:
        read_tree(make_tar(entry(f"a/{deep}/f"), entry(f"b/{deep}/f")))
    assert "max_entries" in refused.value.rule


def test_an_archive_cut_off_anywhere_is_refused_or_shorter() -> None:
    tar = make_tar(
        folder("d"),
        entry("d/" + "n" * 200, b"data" * 200),
        hard_link("link", "d/" + "n" * 200),
        entry("last", b"x", pax={"SCHILY.xattr.user.note": "v"}),
    )
    whole = set(paths(read_tree(tar)))
    end = tar.rindex(b"x" + bytes(511)) + 512
    for cut in range(end):
        try:
            found = set(paths(read_tree(tar[:cut])))
        except FormatError:
            continue
        assert cut % 512 == 0
        assert found < whole
    assert set(paths(read_tree(tar[:end]))) == whole


@pytest.mark.parametrize("number", range(256))
def test_every_type_is_known_or_refused(number: int) -> None:
    kind = bytes([number])
    tar = raw_header(b"f", kind=kind, linkname=b"a", magic=b"ustar\x0000") + END
    if kind in b"\x00024567g":
        assert set(paths(read_tree(tar))) == (set() if kind == b"g" else {"f"})
        return
    with pytest.raises(FormatError):
        read_tree(tar)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whatever_stands_in_headers_is_read_or_refused(data: st.DataObject) -> None:
    """Nothing else is ever raised, and the index takes every tree that was read."""
    tar = bytearray(FUZZED)
    for _ in range(data.draw(st.integers(min_value=1, max_value=6))):
        at = data.draw(st.integers(min_value=0, max_value=len(tar) - 1025))
        junk = data.draw(st.one_of(st.binary(min_size=1, max_size=12), st.sampled_from(TOKENS)))
        tar[at : at + len(junk)] = junk[: len(tar) - at]
    for start in range(0, len(tar) - 1024, 512):
        if tar[start + 257 : start + 262] == b"ustar":  # so that more than checksums is tried
            tar[start + 148 : start + 156] = b" " * 8
            tar[start + 148 : start + 156] = b"%06o\0 " % sum(tar[start : start + 512])
    try:
        tree = read_tree(bytes(tar))
    except FormatError:
        return
    plan = plan_index(tree, len(tar))
    assert len(index_bytes(plan)) == plan.size_bytes


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


def test_a_tiny_tar_cannot_imply_directories_without_end() -> None:
    deep = "d/" * 1000
    tar = make_tar(*(entry(f"{i}/{deep}f") for i in range(MAX_REMEMBERED_DIRECTORIES // 1001 + 1)))
    with pytest.raises(FormatError) as refused:
        read_tree(tar, max_entries=250_000)
    assert "opaque, or only implied" in refused.value.rule
    assert refused.value.expected == f"at most {MAX_REMEMBERED_DIRECTORIES}"


def test_directories_that_are_described_after_all_are_not_counted_as_implied() -> None:
    pairs = [(entry(f"{i}/f"), folder(f"{i}")) for i in range(MAX_REMEMBERED_DIRECTORIES + 1)]
    tar = make_tar(*(item for pair in pairs for item in pair))
    assert len(read_tree(tar, max_entries=250_000).root.children) == len(pairs)


def test_many_tiny_attributes_are_refused_before_they_fill_the_memory() -> None:
    names = [f"user.{number:04}" for number in range(4000)]
    per_file = sum(len(name) + XATTR_BYTES for name in names)
    records = b"".join(pax_record(b"SCHILY.xattr." + name.encode(), b"") for name in names)
    one = extended(b"x", records).removesuffix(END)
    with pytest.raises(FormatError) as refused:
        read_tree(one * (MAX_TEXT_BYTES // per_file + 1) + END)
    assert "bounded together" in refused.value.rule


@pytest.mark.root
async def test_what_is_remembered_and_laid_on_top_is_on_the_account(tmp_path: Path) -> None:
    deep = "d/" * 500
    tar = make_tar(entry(f"{deep}f"))
    async with running(tmp_path) as rig:
        layer = await rig.add(tar)
        kept_bytes = rig.store.budget.used_bytes
        assert kept_bytes > len(tar) + 500 * HINT_BYTES or CHOSEN.mount == "unpack"
        root = await rig.mount(layer)
        assert rig.store.budget.used_bytes - kept_bytes >= ROOT_BYTES + 500 * INODE_BYTES
        await root.close()
        assert rig.store.budget.used_bytes == kept_bytes


@pytest.mark.root
async def test_a_supplement_beyond_the_budget_is_refused_and_leaves_nothing(
    tmp_path: Path,
) -> None:
    tar = make_tar(entry("d/" * 1500 + "f"))
    async with running(tmp_path, mount="unpack") as measured:
        await measured.add(tar)
        kept_bytes = measured.store.budget.used_bytes
        at_once_bytes = len(tar) + kept_bytes
    (tmp_path / "second").mkdir()
    budget_bytes = max(kept_bytes + ROOT_BYTES, at_once_bytes)
    async with running(
        tmp_path / "second", mount="unpack", id_shift="idmap", budget_bytes=budget_bytes
    ) as rig:
        layer = await rig.add(tar)
        with pytest.raises(Busy):
            await rig.mount(layer)
        assert rig.root_mounts() == []
        assert rig.store.budget.used_bytes == kept_bytes
