"""The index as the kernel sees it: sizes, places and numbers at the ends of what there is."""

from __future__ import annotations

import os
import stat
import tarfile
from pathlib import Path

import pytest
from hostile_tars import pax_record
from image_store_rig import (
    END,
    Entry,
    entry,
    folder,
    hard_link,
    make_tar,
    padded,
    raw_header,
    snapshot,
    symlink,
)
from image_store_trees import extract_with_gnu_tar, indexed, indexed_file, memory_file

pytestmark = pytest.mark.root


def same_as_gnu_tar(tar: bytes, tmp_path: Path, *, max_entries: int = 20_000) -> Path:
    """Compares, and leaves what GNU tar unpacked."""
    extract_with_gnu_tar(tar, tmp_path / "theirs")
    theirs = snapshot(tmp_path / "theirs")
    with indexed(tar, tmp_path / "ours", max_entries=max_entries) as shown:
        ours = snapshot(shown)
    del ours["."], theirs["."]
    assert ours == theirs
    return tmp_path / "theirs"


def test_names_that_sort_around_the_dots_are_found(tmp_path: Path) -> None:
    names = ["!", "-", "...", "..a", ".a", "..-", ".-", "-.", "0", " ", "a", "\x01", "\x7f", "é"]
    tar = make_tar(folder("d"), *(entry(f"d/{name}", name.encode()) for name in names))
    assert len(list((same_as_gnu_tar(tar, tmp_path) / "d").iterdir())) == len(names)


def test_a_directory_of_ten_thousand_names_is_searched(tmp_path: Path) -> None:
    names = [f"{number:x}{'-' * (number % 61)}" for number in range(10_000)]
    tar = make_tar(folder("d"), *(entry(f"d/{name}") for name in names))
    with indexed(tar, tmp_path / "ours", max_entries=20_000) as shown:
        assert sorted(os.listdir(shown / "d")) == sorted(names)
        assert all((shown / "d" / name).exists() for name in names)
        assert not (shown / "d" / "zzz").exists()
        assert not (shown / "d" / "0-").exists()


def test_names_of_255_bytes_and_paths_of_4095(tmp_path: Path) -> None:
    deep = "/".join(["d" * 255] * 15)
    rest = 4095 - len(deep) - 1
    tar = make_tar(entry(f"{deep}/{'f' * rest}", b"deep"), entry("n" * 255, b"long"))
    with indexed(tar, tmp_path / "ours") as shown:
        assert (shown / ("n" * 255)).read_bytes() == b"long"
        assert not (shown / ("n" * 254)).exists()
        root_fd = os.open(shown, os.O_RDONLY)
        try:
            fd = os.open(f"{deep}/{'f' * rest}", os.O_RDONLY, dir_fd=root_fd)
            assert os.read(fd, 10) == b"deep"
            os.close(fd)
        finally:
            os.close(root_fd)


def test_2047_directories_in_one_another(tmp_path: Path) -> None:
    with indexed(make_tar(entry("d/" * 2047 + "f", b"x")), tmp_path / "o", max_entries=2048) as top:
        fds = [os.open(top, os.O_RDONLY)]
        try:
            for _ in range(2047):
                fds.append(os.open("d", os.O_RDONLY, dir_fd=fds[-1]))
                os.close(fds.pop(0))
            assert os.listdir(fds[-1]) == ["f"]
        finally:
            for fd in fds:
                os.close(fd)


def test_directories_of_every_length_lie_right_beside_their_inodes(tmp_path: Path) -> None:
    """Small ones lie behind their inodes, which may have attributes, and cross no block."""
    entries: list[Entry] = []
    for length in range(1, 256):
        name = f"{length:03}"
        made = folder(name, mtime=length)
        if length % 3:
            made[0].pax_headers = {"SCHILY.xattr.user.x": "v" * (length * 7 % 64)}
        entries += [made, entry(f"{name}/{'n' * length}"), entry(f"{name}/{'o' * (255 - length)}0")]
    same_as_gnu_tar(make_tar(*entries), tmp_path)


def test_symlinks_of_every_length(tmp_path: Path) -> None:
    lengths = range(1, 4096)
    tar = make_tar(*(symlink(f"{length}", "t" * length) for length in lengths))
    with indexed(tar, tmp_path / "ours", max_entries=5000) as shown:
        for length in lengths:
            assert os.readlink(shown / str(length)) == "t" * length
            assert (shown / str(length)).lstat().st_size == length


def test_files_of_sizes_around_blocks_and_pages(tmp_path: Path) -> None:
    sizes = {
        size
        for unit in (512, 1024, 4096, 8192, 65536, 2**20)
        for size in (0, 1, unit - 1, unit, unit + 1, 3 * unit)
    }
    tar = make_tar(*(entry(f"{size}", os.urandom(size)) for size in sorted(sizes)))
    same_as_gnu_tar(tar, tmp_path)


def test_owners_modes_and_devices_at_their_ends(tmp_path: Path) -> None:
    most = 2**32 - 2
    tar = make_tar(
        entry("owner", uid=most, gid=most, mode=0o7777),
        entry("nobody's", mode=0),
        entry("second device", kind=tarfile.CHRTYPE, device=(4095, 2**20 - 1), uid=most),
        entry("zero", kind=tarfile.BLKTYPE, device=(0, 0), mode=0o600),
        entry("pipe", kind=tarfile.FIFOTYPE, mode=0o6620, gid=most),
    )
    shown = same_as_gnu_tar(tar, tmp_path)
    assert (shown / "owner").stat().st_uid == most


def test_attributes_at_their_ends(tmp_path: Path) -> None:
    """The longest value and name, many, empty ones, and on directories too."""
    many = {f"SCHILY.xattr.user.{number:0200}": "v" * (number % 7) for number in range(300)}
    made = folder("directory")
    made[0].pax_headers = many
    tar = make_tar(
        entry("long", b"x", pax={"SCHILY.xattr.user.x": "v" * 65535}),
        entry("many", b"x" * 513, pax=many),
        entry("empty file", pax={"SCHILY.xattr.user." + "n" * 250: ""}),
        entry("between", b"y"),
        made,
        entry("directory/f", b"z"),
    )
    with indexed(tar, tmp_path / "ours") as shown:
        assert len(os.getxattr(shown / "long", "user.x")) == 65535
        assert os.listxattr(shown / "empty file") == ["user." + "n" * 250]
        for name in ("many", "directory"):
            found = {
                f"SCHILY.xattr.{key}": os.getxattr(shown / name, key).decode()
                for key in os.listxattr(shown / name)
            }
            assert found == many
        assert (shown / "many").read_bytes() == b"x" * 513
        assert (shown / "between").read_bytes() == b"y"
        assert (shown / "directory" / "f").read_bytes() == b"z"


def test_more_hard_links_than_16_bits_count(tmp_path: Path) -> None:
    count = 65_600
    links = b"".join(
        raw_header(b"%d" % number, kind=b"1", linkname=b"first") for number in range(1, count)
    )
    tar = raw_header(b"first", size=b"1") + padded(b"x") + links + END
    with indexed(tar, tmp_path / "ours", max_entries=count) as shown:
        assert (shown / "first").stat().st_nlink == count
        assert os.path.samefile(shown / "first", shown / str(count - 1))
        assert (shown / "777").read_bytes() == b"x"


def test_links_count_the_names_that_are_left(tmp_path: Path) -> None:
    """One of three goes with the directory that a file replaces."""
    tar = make_tar(
        entry("a", b"x"), hard_link("d/b", "a"), hard_link("c", "a"), entry("d", b"instead")
    )
    with indexed(tar, tmp_path / "ours") as shown:
        assert (shown / "a").stat().st_nlink == 2
        assert os.path.samefile(shown / "a", shown / "c")


def test_links_to_all_that_is_no_directory(tmp_path: Path) -> None:
    tar = make_tar(
        symlink("symlink", "x" * 600),
        hard_link("symlink again", "symlink"),
        entry("pipe", kind=tarfile.FIFOTYPE),
        hard_link("d/pipe again", "pipe"),
    )
    with indexed(tar, tmp_path / "ours") as shown:
        assert (shown / "symlink again").lstat().st_nlink == 2
        assert os.readlink(shown / "symlink again") == "x" * 600
        assert os.path.samefile(shown / "pipe", shown / "d" / "pipe again")


def test_directories_count_their_subdirectories(tmp_path: Path) -> None:
    tar = make_tar(folder("d"), folder("d/a"), folder("d/b"), entry("d/f"))
    with indexed(tar, tmp_path / "ours") as shown:
        assert shown.stat().st_nlink == 3
        assert (shown / "d").stat().st_nlink == 4
        assert (shown / "d" / "a").stat().st_nlink == 2
        assert os.path.samefile(shown / "d" / "a" / "..", shown / "d")


@pytest.mark.parametrize("size_bytes", [5 * 2**30, 9 * 2**30], ids=["in-base-256", "in-pax"])
def test_files_of_gigabytes_are_read_at_both_ends(tmp_path: Path, size_bytes: int) -> None:
    """Sparse, so that it costs nothing; the larger one's size is beyond eleven octal digits."""
    if size_bytes < 8**11:
        headers = raw_header(b"large", size=b"\x80" + size_bytes.to_bytes(11, "big"))
    else:
        record = pax_record(b"size", b"%d" % size_bytes)
        headers = raw_header(b"pax", kind=b"x", size=b"%o" % len(record)) + padded(record)
        headers += raw_header(b"large")
    behind = len(headers) + size_bytes
    with memory_file(headers) as tar_fd:
        os.pwrite(tar_fd, b"first", len(headers))
        os.pwrite(tar_fd, b"last", behind - 4)
        os.pwrite(tar_fd, raw_header(b"small", size=b"5") + padded(b"small") + END, behind)
        with indexed_file(tar_fd, tmp_path / "ours") as shown:
            assert (shown / "large").stat().st_size == size_bytes
            assert (shown / "small").read_bytes() == b"small"
            fd = os.open(shown / "large", os.O_RDONLY)
            try:
                assert os.pread(fd, 5, 0) == b"first"
                assert os.pread(fd, 10, size_bytes - 5) == b"\0last"
                assert os.pread(fd, 10, size_bytes // 2) == bytes(10)
            finally:
                os.close(fd)


def test_the_mount_takes_no_writes_and_opens_no_devices(tmp_path: Path) -> None:
    tar = make_tar(entry("f", b"x", mode=0o4755), entry("n", kind=tarfile.CHRTYPE, device=(1, 3)))
    with indexed(tar, tmp_path / "ours") as shown:
        assert stat.S_IMODE((shown / "f").stat().st_mode) == 0o4755
        flags = os.statvfs(shown).f_flag
        assert flags & os.ST_RDONLY
        assert flags & os.ST_NOSUID
        with pytest.raises(OSError):
            os.open(shown / "n", os.O_RDONLY)
        with pytest.raises(OSError):
            (shown / "new").touch()
