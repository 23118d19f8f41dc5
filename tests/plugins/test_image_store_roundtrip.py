"""Random trees, written by several tools: made visible both ways as GNU tar unpacks them."""

from __future__ import annotations

import os
import shutil
import stat
import struct
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_store_rig import Entry, entry, folder, hard_link, make_tar, snapshot, symlink
from image_store_trees import (
    TOOL_TIMEOUT_S,
    WAYS,
    Way,
    extract_with_gnu_tar,
    indexed,
    unpacked,
)

pytestmark = pytest.mark.root

Snapshot = dict[str, tuple[object, ...]]

NAMES = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=20),
    # Those that sort before and after "." and "..".
    st.text("!-./a", min_size=1, max_size=4).map(lambda name: name.replace("/", "0")),
    st.text("x", min_size=240, max_size=255),
).filter(
    lambda name: (
        name not in (".", "..") and not name.startswith(".wh.") and len(name.encode()) <= 255
    )
)
MODES = st.integers(min_value=0, max_value=0o7777)
OWNERS = st.sampled_from([0, 1, 1000, 65533, 2**21 + 5, 2**32 - 2])
# As far as the file system that GNU tar unpacks to can say: ext4's from 1901 to 2446.
TIMES = st.one_of(
    st.integers(min_value=-(2**31), max_value=15 * 10**9),
    st.sampled_from([0.5, 1.25, -1.5, 1700000000.125]),
)
FORMATS = st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
TARGETS = st.one_of(
    NAMES,
    st.just("../../x"),
    st.integers(min_value=1, max_value=4095).map(lambda length: "t" * length),
)
SIZES = st.sampled_from([0, 1, 511, 512, 513, 1024, 4095, 4096, 4097, 70_000])
CAPABILITY = struct.pack("<5I", 0x02000001, 0x400, 0, 0, 0).decode("utf-8", "surrogateescape")


class Archive:
    """Shown by hypothesis as its headers, since the bytes are too many to read."""

    def __init__(self, entries: list[Entry], tar_format: int) -> None:
        self.entries = entries
        self.tar = make_tar(*entries, tar_format=tar_format)

    def __repr__(self) -> str:
        return str([{**info.get_info(), "data": data[:9]} for info, data in self.entries])[:20_000]


@st.composite
def notes(draw: st.DrawFn, *, is_file: bool) -> dict[str, str]:
    """Extended attributes."""
    drawn = draw(st.dictionaries(st.sampled_from(["a", "b.c"]), NAMES, max_size=2))
    found = {f"SCHILY.xattr.user.{key}": note for key, note in drawn.items()}
    if is_file and draw(st.booleans()):
        found["SCHILY.xattr.security.capability"] = CAPABILITY
    return found


@st.composite
def archives(draw: st.DrawFn) -> Archive:
    """Directories before what is in them, each name once; links of both kinds among them."""
    tar_format = draw(FORMATS)
    is_pax = tar_format == tarfile.PAX_FORMAT
    folders = [""]
    files: list[str] = []
    taken: set[str] = set()
    entries: list[Entry] = []
    kinds = st.sampled_from(["file", "folder", "symlink", "hard link", "pipe", "device"])
    for _ in range(draw(st.integers(min_value=0, max_value=15))):
        name = draw(st.sampled_from(folders)) + draw(NAMES)
        if name in taken or len(name.encode()) > 2000:
            continue
        taken.add(name)
        kind = draw(kinds)
        mode, uid, gid = draw(MODES), draw(OWNERS), draw(OWNERS)
        mtime = draw(TIMES)
        if not is_pax:
            mtime = int(mtime)
        if kind == "folder":
            made = folder(name, mode=mode, uid=uid, mtime=mtime)
            if is_pax:
                made[0].pax_headers = draw(notes(is_file=False))
            folders.append(name + "/")
        elif kind == "symlink":
            made = symlink(name, draw(TARGETS))
            made[0].mtime = int(mtime)
        elif kind == "hard link" and files:
            made = hard_link(name, draw(st.sampled_from(files)))
        elif kind == "pipe":
            made = entry(name, kind=tarfile.FIFOTYPE, mode=mode, uid=uid, gid=gid, mtime=mtime)
        elif kind == "device":
            numbers = draw(st.integers(1, 4095)), draw(st.sampled_from([0, 255, 256, 2**20 - 1]))
            block = draw(st.sampled_from([tarfile.CHRTYPE, tarfile.BLKTYPE]))
            made = entry(name, kind=block, device=numbers, mode=mode, uid=uid)
        else:
            made = entry(
                name,
                os.urandom(1) * draw(SIZES),
                mode=mode,
                uid=uid,
                gid=gid,
                mtime=mtime,
                pax=draw(notes(is_file=True)) if is_pax else None,
            )
            files.append(name)
        entries.append(made)
    return Archive(entries, tar_format)


def as_seen(tar: bytes, directory: Path, way: Way) -> Snapshot:
    with way(tar, directory) as shown:
        seen = snapshot(shown)
    # The root is in few archives; else theirs is the folder that the test made.
    del seen["."]
    return seen


def all_ways(tar: bytes) -> tuple[Snapshot, Snapshot, Snapshot]:
    """What is seen through the index, of our unpacked tree, and of GNU tar's."""
    with tempfile.TemporaryDirectory() as folder_name:
        top = Path(folder_name)
        extract_with_gnu_tar(tar, top / "theirs")
        theirs = snapshot(top / "theirs")
        del theirs["."]
        return (
            as_seen(tar, top / "indexed", indexed),
            as_seen(tar, top / "unpacked", unpacked),
            theirs,
        )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(archives())
def test_random_trees_look_as_gnu_tar_unpacks_them_both_ways(archive: Archive) -> None:
    through_index, unpacked_tree, theirs = all_ways(archive.tar)
    assert through_index == theirs
    assert unpacked_tree == theirs


def source_tree(top: Path, *, tar_format: str) -> Path:
    """Files of many kinds, as far as the format can say them."""
    source = top / "source"
    (source / "d" / "e").mkdir(parents=True)
    name = "n" * (60 if tar_format in ("v7", "ustar") else 250)
    (source / "d" / name).write_bytes(os.urandom(5000))
    (source / "d" / "empty").touch()
    (source / "d" / "block").write_bytes(bytes(range(256)) * 2)
    (source / "d" / "e" / "executable").write_bytes(b"#!")
    (source / "d" / "e" / "executable").chmod(0o4755)
    os.utime(source / "d" / "empty", ns=(0, 1_234_567_890_987_654_321))
    (source / "link").symlink_to("d/e")
    (source / "long link").symlink_to("x" * (90 if tar_format in ("v7", "ustar") else 900))
    os.link(source / "d" / name, source / "second")
    os.chown(source / "second", 200_000, 100_000)
    if tar_format != "v7":
        os.mkfifo(source / "pipe")
        os.mknod(source / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        os.mknod(source / "disk", 0o660 | stat.S_IFBLK, os.makedev(259, 200_000))
    if tar_format in ("pax", "posix"):
        os.setxattr(source / "d", "user.note", b"a\0b=c\nd")
        os.setxattr(source / "d" / "block", "user.empty", b"")
        os.chown(source / "d" / "e", 2**32 - 2, 2**31)
    return source


@pytest.mark.parametrize("tar_format", ["gnu", "oldgnu", "posix", "ustar", "v7"])
def test_every_format_that_gnu_tar_writes_is_read(tmp_path: Path, tar_format: str) -> None:
    source = source_tree(tmp_path, tar_format=tar_format)
    options = [f"--format={tar_format}", "--numeric-owner", "--sort=name"]
    if tar_format == "posix":
        options += ["--xattrs", "--xattrs-include=user.*"]
    made = subprocess.run(
        ["tar", "-c", *options, "-C", source, "."],
        check=True,
        capture_output=True,
        timeout=TOOL_TIMEOUT_S,
    )
    through_index, unpacked_tree, theirs = all_ways(made.stdout)
    assert through_index == theirs
    assert unpacked_tree == theirs
    assert set(through_index) >= {"d", "d/e", "link", "long link", "second", "d/block"}
    if tar_format == "posix":
        without_root = snapshot(source)
        del without_root["."]
        assert through_index == without_root


@pytest.mark.parametrize("tar_format", ["pax", "gnutar", "ustar"])
def test_every_format_that_bsdtar_writes_is_read(tmp_path: Path, tar_format: str) -> None:
    if shutil.which("bsdtar") is None:
        pytest.skip("bsdtar is not installed")
    source = source_tree(tmp_path, tar_format=tar_format)
    made = subprocess.run(
        ["bsdtar", "-c", "--numeric-owner", "-f", "-", "--format", tar_format, "-C", source, "."],
        check=True,
        capture_output=True,
        timeout=TOOL_TIMEOUT_S,
    )
    through_index, unpacked_tree, theirs = all_ways(made.stdout)
    assert through_index == theirs
    assert unpacked_tree == theirs
    assert set(through_index) >= {"d", "d/e", "link", "long link", "second", "d/block"}


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_every_format_that_python_writes_is_read(tmp_path: Path, tar_format: int) -> None:
    source = source_tree(tmp_path, tar_format="ustar")
    path = tmp_path / "made.tar"
    with tarfile.open(path, "w", format=tar_format) as archive:
        archive.add(source, arcname=".")
    through_index, unpacked_tree, theirs = all_ways(path.read_bytes())
    assert through_index == theirs
    assert unpacked_tree == theirs
    assert set(through_index) >= {"d", "d/e", "link", "second", "pipe", "null", "disk"}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_the_root_is_as_its_entry_says(tmp_path: Path, way: Way) -> None:
    root = folder("./", mode=0o1750, uid=7, mtime=1.5)
    root[0].pax_headers = {"SCHILY.xattr.user.note": "root"}
    with way(make_tar(root, entry("f")), tmp_path / "root") as shown:
        status = shown.stat()
        assert stat.S_IMODE(status.st_mode) == 0o1750
        assert (status.st_uid, status.st_mtime_ns) == (7, 1_500_000_000)
        assert os.getxattr(shown, "user.note") == b"root"


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("zeros", [0, 512, 1024, 10240])
def test_a_layer_without_entries_is_an_empty_tree(tmp_path: Path, way: Way, zeros: int) -> None:
    with way(bytes(zeros), tmp_path / "empty") as shown:
        assert list(shown.iterdir()) == []
        assert stat.S_IMODE(shown.stat().st_mode) == 0o755


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_times_far_from_today_are_kept(tmp_path: Path, way: Way) -> None:
    # Beyond what disks can say, so that GNU tar is no help: the kernel's own clock types can.
    times = {"before": -(2**40), "after": 2**40, "fraction": -0.25, "1969": -1}
    tar = make_tar(*(entry(name, mtime=mtime) for name, mtime in times.items()))
    with way(tar, tmp_path / "times") as shown:
        found = {name: (shown / name).stat().st_mtime_ns for name in times}
    assert found == {name: int(mtime * 10**9) for name, mtime in times.items()}
