"""What is odd in tars and harmless: the tree that is made of it."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest
from hostile_tars import extended, link_attribute, pax, pax_record, xattr
from image_store_rig import END, entry, folder, hard_link, make_tar, raw_header, symlink
from image_store_trees import paths, read_tree, unpacked

from plugins.image_store.tar.tree import INODE_BYTES


def test_absolute_names_and_double_slashes_are_relative_ones() -> None:
    tree = read_tree(make_tar(entry("/a"), entry("./b"), entry("c//./d"), hard_link("e", "/c/d")))
    assert set(paths(tree)) == {"a", "b", "c", "c/d", "e"}
    assert paths(tree)["e"] is paths(tree)["c/d"]


def test_what_follows_the_end_of_the_archive_is_not_read() -> None:
    tar = raw_header(b"f") + END
    garbage = b"\xffgarbage" * 100
    assert set(paths(read_tree(tar + raw_header(b"second") + garbage))) == {"f"}


@pytest.mark.parametrize("end", [b"", bytes(512), bytes(1024), bytes(10240)])
def test_an_archive_may_end_without_its_zero_blocks(end: bytes) -> None:
    assert set(paths(read_tree(raw_header(b"f") + end))) == {"f"}


def test_a_plain_name_ends_at_its_first_nul() -> None:
    assert set(paths(read_tree(raw_header(b"a\0b") + END))) == {"a"}


def test_the_last_of_several_entries_of_one_name_counts() -> None:
    tree = read_tree(
        make_tar(entry("a", b"1"), symlink("a", "x"), folder("b"), entry("b/c"), entry("b", b"2"))
    )
    found = paths(tree)
    assert set(found) == {"a", "b"}
    assert found["a"].target == b"x"
    assert found["b"].size_bytes == 1


def test_a_directory_over_a_directory_keeps_what_is_in_it() -> None:
    tree = read_tree(make_tar(folder("d", mode=0o700), entry("d/f"), folder("d", mode=0o755)))
    assert set(paths(tree)) == {"d", "d/f"}
    assert paths(tree)["d"].mode & 0o7777 == 0o755


def test_names_of_changing_kinds_leave_the_last_one() -> None:
    tree = read_tree(
        make_tar(
            folder("x"),
            entry("x/old"),
            entry("x", b"1"),
            symlink("x", "/etc"),
            entry("x", kind=tarfile.CHRTYPE, device=(1, 3)),
            entry("x", kind=tarfile.FIFOTYPE),
            folder("x", mode=0o700),
            entry("x/new"),
        )
    )
    assert set(paths(tree)) == {"x", "x/new"}
    assert paths(tree)["x"].mode == 0o40700


def test_a_name_that_is_replaced_leaves_the_others_of_its_file() -> None:
    tree = read_tree(make_tar(entry("a", b"1"), hard_link("b", "a"), entry("a", b"22")))
    found = paths(tree)
    assert (found["a"].size_bytes, found["b"].size_bytes) == (2, 1)
    assert (found["a"].names, found["b"].names) == (1, 1)


def test_labels_of_the_building_machine_are_passed_over() -> None:
    for label in ("selinux", "ima", "evm"):
        assert paths(read_tree(xattr(f"security.{label}")))["f"].xattrs == {}


def test_a_second_name_brings_no_attributes() -> None:
    """Builders repeat them there; GNU tar makes only the link."""
    found = paths(read_tree(link_attribute("user.note")))
    assert found["f"] is found["a"]
    assert found["a"].xattrs == {}


def test_access_lists_as_text_are_passed_over() -> None:
    """GNU tar writes them beside the mode, and no image tool reads them."""
    tree = read_tree(make_tar(pax("f", **{"SCHILY.acl.access": "user::rw-,group::r--"})))
    assert paths(tree)["f"].xattrs == {}


def test_whiteouts_below_what_is_no_directory_are_dropped() -> None:
    tree = read_tree(make_tar(entry("f"), entry("f/.wh.x"), entry(".wh.d"), entry("d/.wh.y")))
    found = paths(tree)
    assert set(found) == {"f", "d"}
    assert found["d"].is_whiteout


def test_book_keeping_of_aufs_is_passed_over() -> None:
    assert set(paths(read_tree(make_tar(entry(".wh..wh.plnk"), entry(".wh..wh.aufs"))))) == set()


def test_set_user_id_and_devices_are_kept() -> None:
    tree = read_tree(
        make_tar(entry("s", mode=0o6755), entry("z", kind=tarfile.CHRTYPE, device=(1, 5)))
    )
    assert paths(tree)["s"].mode & 0o7777 == 0o6755
    assert paths(tree)["z"].device == (1, 5)


def test_a_global_header_with_a_comment_is_harmless() -> None:
    tar = extended(b"g", pax_record(b"comment", b"a commit"))
    assert set(paths(read_tree(tar))) == {"f"}


@pytest.mark.root
def test_an_unpacked_tree_takes_no_more_than_was_said(tmp_path: Path) -> None:
    tar = make_tar(
        *(entry(f"d{number}/f", b"x" * (number * 100)) for number in range(100)),
        hard_link("again", "d99/f"),
        symlink("long", "t" * 4000),
        entry("noted", pax={"SCHILY.xattr.user.x": "v" * 9000}),
        entry("replaced", b"x" * 9000),
        entry("replaced", b"y"),
    )
    with unpacked(tar, tmp_path / "unpacked") as shown:
        used = os.statvfs(shown)
        used_bytes = (used.f_blocks - used.f_bfree) * used.f_frsize
        inodes = used.f_files - used.f_ffree
    said_bytes = read_tree(tar).memory_bytes
    assert used_bytes + inodes * INODE_BYTES <= said_bytes
    assert said_bytes < 2 * (used_bytes + inodes * INODE_BYTES)
