"""The index as bytes: its size is known beforehand, and nothing but the tree is in it."""

from __future__ import annotations

import os
import tarfile

import pytest
from image_store_rig import entry, folder, hard_link, make_tar, symlink
from image_store_trees import index_bytes, memory_file, nothing, read_tree

from plugins.image_store.index import IndexPlan, plan_index
from plugins.image_store.index.directories import directory_bytes, packed_directory
from plugins.image_store.index.records import chunk_format, packed_xattrs, xattrs_bytes
from plugins.image_store.index.writer import INODES_BETWEEN, WRITE_BYTES

TAR = make_tar(
    folder("d", mode=0o1777),
    *(entry(f"d/{number:03}" + "x" * (number % 90), b"data") for number in range(300)),
    hard_link("d/again", "d/007xxxxxxx"),
    symlink("short", "d"),
    symlink("long", "t" * 4000),
    entry("null", kind=tarfile.CHRTYPE, device=(1, 3)),
    entry("noted", b"x", pax={"SCHILY.xattr.user.note": "v" * 3000}),
    entry(".wh.gone"),
)


def plan(tar: bytes) -> IndexPlan:
    return plan_index(read_tree(tar), len(tar))


@pytest.mark.parametrize("tar", [TAR, b"", bytes(1024), make_tar(entry("f", b"x"))])
def test_the_size_is_known_before_anything_is_written(tar: bytes) -> None:
    planned = plan(tar)
    written = index_bytes(planned)
    assert len(written) == planned.size_bytes
    assert planned.size_bytes % 512 == 0


def test_one_tar_has_one_index() -> None:
    assert index_bytes(plan(TAR)) == index_bytes(plan(TAR))
    again = plan(TAR)
    assert index_bytes(again) == index_bytes(again)


def test_the_order_of_entries_does_not_show() -> None:
    """Only where their data lie does: these have none."""
    entries = [entry(name) for name in ("b", "a", "c", "-", "!")]
    forwards, backwards = make_tar(*entries), make_tar(*reversed(entries))
    assert index_bytes(plan(forwards)) == index_bytes(plan(backwards))


def test_files_contents_are_not_in_the_index() -> None:
    secret = os.urandom(64)
    planned = plan(make_tar(entry("f", secret * 1000)))
    assert planned.size_bytes < 4096
    assert secret[:16] not in index_bytes(planned)


def test_it_is_written_from_the_file_s_beginning_whatever_its_position() -> None:
    planned = plan(TAR)
    with memory_file(b"") as fd:
        os.lseek(fd, 1000, os.SEEK_SET)
        planned.write(fd, between=nothing)
        assert os.lseek(fd, 0, os.SEEK_CUR) == 1000
        assert os.pread(fd, planned.size_bytes + 1, 0) == index_bytes(planned)


def test_between_is_called_often_and_may_stop_the_writing() -> None:
    calls = 0

    def between() -> None:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise InterruptedError

    planned = plan(TAR)
    with memory_file(b"") as fd, pytest.raises(InterruptedError):
        planned.write(fd, between=between)
    assert calls == 2
    assert INODES_BETWEEN < 1000
    assert WRITE_BYTES < 2**20


def test_a_file_that_cannot_take_it_says_so() -> None:
    with open("/dev/full", "wb") as full, pytest.raises(OSError):
        plan(TAR).write(full.fileno(), between=nothing)


def test_a_tree_of_another_tar_is_refused() -> None:
    tree = read_tree(make_tar(entry("f", b"x" * 2000)))
    with pytest.raises(ValueError, match="no blocks of the tar"):
        plan_index(tree, 2048)
    for node in tree.root.children.values():
        node.data_offset += 1
    with pytest.raises(ValueError, match="no blocks of the tar"):
        plan_index(tree, 10240)


def test_a_tar_beyond_a_chunk_is_refused() -> None:
    with pytest.raises(ValueError, match="beyond"):
        plan_index(read_tree(b""), 2**40 + 512)
    plan_index(read_tree(b""), 2**40)


def test_a_tar_may_end_amid_a_block() -> None:
    """What follows its end is read by nobody."""
    tar = make_tar(entry("f", b"x")) + b"rest"
    assert index_bytes(plan(tar))[1152 + 64 :][:4] == (len(tar) // 512).to_bytes(4, "little")


def test_directories_fill_blocks_and_end_with_their_last_name() -> None:
    for lengths in ([1], [244, 244], [244, 245], [255] * 9, [1] * 39, [1] * 40, list(range(1, 99))):
        names = sorted(os.urandom(length) for length in lengths)
        blocks = list(packed_directory(names, range(len(names)), bytes(len(names))))
        assert sum(map(len, blocks)) == directory_bytes(names)
        assert all(len(block) == 512 for block in blocks[:-1])
        assert 0 < len(blocks[-1]) <= 512
        assert blocks[-1].endswith(names[-1])


def test_attributes_take_what_was_planned() -> None:
    for length in range(9):
        xattrs = {b"user.x": b"v" * length, b"security.capability": b"c" * 20}
        packed = packed_xattrs(xattrs)
        assert len(packed) == xattrs_bytes(xattrs)
        assert len(packed) % 4 == 0
    assert packed_xattrs({}) == b""
    assert xattrs_bytes({}) == 0


@pytest.mark.parametrize("bits", [0, 1, 8, 31])
def test_a_file_s_chunk_is_the_smallest_that_holds_it(bits: int) -> None:
    chunk_bytes = 512 << bits
    assert chunk_format(chunk_bytes) == 0x20 | bits
    assert chunk_format(chunk_bytes + 1) == 0x20 | bits + 1


def test_attributes_that_no_tree_holds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"system\.x"):
        packed_xattrs({b"system.x": b""})
