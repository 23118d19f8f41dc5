"""Random trees, written by Python's tarfile: unpacked as GNU tar unpacks them."""

from __future__ import annotations

import os
import stat
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_store_rig import Entry, entry, folder, hard_link, make_tar, snapshot, symlink

from plugins.image_store.tar_reader import TarReader
from plugins.image_store.tree import build_tree
from plugins.image_store.unpack import write_tree

pytestmark = pytest.mark.root

NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=20
).filter(
    lambda name: (
        name not in (".", "..") and not name.startswith(".wh.") and len(name.encode()) <= 255
    )
)
MODES = st.integers(min_value=0, max_value=0o7777)
OWNERS = st.sampled_from([0, 1, 1000, 65533, 2**21 + 5, 2**32 - 2])
TIMES = st.one_of(
    st.integers(min_value=0, max_value=2**34), st.sampled_from([0.5, 1.25, 1700000000.125])
)
FORMATS = st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])


class Archive:
    """Shown by hypothesis as its headers, since the bytes are too many to read."""

    def __init__(self, entries: list[Entry], tar_format: int) -> None:
        self.entries = entries
        self.tar = make_tar(*entries, tar_format=tar_format)

    def __repr__(self) -> str:
        return str([{**info.get_info(), "data": data[:9]} for info, data in self.entries])[:20_000]


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
            folders.append(name + "/")
        elif kind == "symlink":
            made = symlink(name, draw(st.one_of(NAMES, st.just("../../x"), st.just("t" * 300))))
            made[0].mtime = int(mtime)
        elif kind == "hard link" and files:
            made = hard_link(name, draw(st.sampled_from(files)))
        elif kind == "pipe":
            made = entry(name, kind=tarfile.FIFOTYPE, mode=mode, uid=uid, gid=gid, mtime=mtime)
        elif kind == "device":
            made = entry(
                name, kind=tarfile.CHRTYPE, device=(draw(st.integers(1, 4095)), 259), mode=mode
            )
        else:
            notes = draw(st.dictionaries(st.sampled_from(["a", "b"]), NAMES, max_size=2))
            made = entry(
                name,
                draw(st.binary(max_size=2000)),
                mode=mode,
                uid=uid,
                gid=gid,
                mtime=mtime,
                pax={f"SCHILY.xattr.user.{key}": note for key, note in notes.items()}
                if is_pax
                else None,
            )
            files.append(name)
        entries.append(made)
    return Archive(entries, tar_format)


def unpack(tar: bytes, target: Path) -> None:
    entries = TarReader(tar, label="layer", max_entries=1000, between=lambda: None)
    tree = build_tree(entries, label="layer", max_entries=1000)
    root_fd = os.open(target, os.O_RDONLY)
    tar_fd = os.memfd_create("test")
    try:
        os.write(tar_fd, tar)
        write_tree(tree, root_fd, tar_fd=tar_fd, between=lambda: None)
    finally:
        os.close(tar_fd)
        os.close(root_fd)


def unpack_with_gnu_tar(tar: bytes, target: Path) -> None:
    # Delayed: else it leaves today's time on a directory that it fills later.
    options = ["-p", "--same-owner", "--numeric-owner", "--xattrs", "--delay-directory-restore"]
    subprocess.run(["tar", "-x", *options, "-C", target], input=tar, check=True)


def both(tar: bytes) -> tuple[dict[str, tuple[object, ...]], dict[str, tuple[object, ...]]]:
    with tempfile.TemporaryDirectory() as folder_name:
        ours, theirs = Path(folder_name, "ours"), Path(folder_name, "theirs")
        ours.mkdir()
        theirs.mkdir()
        unpack(tar, ours)
        unpack_with_gnu_tar(tar, theirs)
        trees = snapshot(ours), snapshot(theirs)
        # The root is not in these archives: theirs is the folder that the test made.
        for tree in trees:
            tree.pop(".")
        return trees


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(archives())
def test_random_trees_are_unpacked_as_gnu_tar_does(archive: Archive) -> None:
    ours, theirs = both(archive.tar)
    assert ours == theirs


@pytest.mark.parametrize("tar_format", ["gnu", "oldgnu", "pax", "ustar", "v7"])
def test_every_format_that_gnu_tar_writes_is_read(tmp_path: Path, tar_format: str) -> None:
    source = tmp_path / "source"
    (source / "d" / "e").mkdir(parents=True)
    name = "n" * (120 if tar_format not in ("v7", "ustar") else 60)
    (source / "d" / name).write_bytes(os.urandom(5000))
    (source / "d" / "e" / "executable").write_bytes(b"#!")
    (source / "d" / "e" / "executable").chmod(0o4755)
    (source / "link").symlink_to("d/e")
    os.link(source / "d" / name, source / "second")
    os.mkfifo(source / "pipe")
    if tar_format == "v7":
        (source / "pipe").unlink()
    made = subprocess.run(
        ["tar", "-c", f"--format={tar_format}", "-C", source, "."], check=True, capture_output=True
    )
    ours, theirs = both(made.stdout)
    assert ours == theirs
    assert set(ours) >= {"d", "d/e", "link", "second", f"d/{name}"}


def test_a_layer_without_entries_is_an_empty_tree(tmp_path: Path) -> None:
    for number, tar in enumerate((b"", bytes(1024), bytes(10240))):
        target = tmp_path / str(number)
        target.mkdir()
        unpack(tar, target)
        assert list(target.iterdir()) == []
        assert stat.S_IMODE(target.stat().st_mode) == 0o755
