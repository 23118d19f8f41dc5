"""What is asked of the kernel, where no container would show the difference."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from image_store_rig import ID_MAP, entry, make_tar, running

from plugins.image_store.mount.kernel import (
    attach,
    detached_mount,
    idmapped_clone,
    mount,
    mounts_under,
)
from plugins.image_store.mount.removal import remove_all
from plugins.image_store.mount.user_namespace import user_namespace

pytestmark = pytest.mark.root


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder to mount in; nothing of it is left."""
    folder = tmp_path / "place"
    folder.mkdir()
    yield folder
    remove_all(folder)


def mount_tmpfs(target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    mount(b"test", os.fsencode(target), filesystem=b"tmpfs", flags=0)


def test_a_clone_is_read_only_whatever_it_was_made_of(place: Path) -> None:
    source, target = place / "source", place / "target"
    mount_tmpfs(source)
    target.mkdir()
    with user_namespace(ID_MAP.pairs, item="test") as namespace_fd:
        idmapped_clone(os.fsencode(source), os.fsencode(target), namespace_fd)
    (source / "f").write_bytes(b"here")
    assert (target / "f").read_bytes() == b"here"
    assert os.statvfs(target).f_flag & os.ST_RDONLY
    assert not os.statvfs(source).f_flag & os.ST_RDONLY


def test_what_a_link_leads_to_is_not_removed(place: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").touch()
    (place / "sub").mkdir()
    for link in (place / "link", place / "sub" / "link"):
        link.symlink_to(outside)
    remove_all(place)
    assert not place.exists()
    assert (outside / "file").exists()


def test_mounts_come_deeper_ones_later_whenever_they_were_made(place: Path) -> None:
    older = detached_mount(b"tmpfs")
    try:
        mount_tmpfs(place / "upper")
        (place / "upper" / "lower").mkdir()
        attach(older, os.fsencode(place / "upper" / "lower"))
    finally:
        os.close(older)
    assert [os.fsdecode(point) for point in mounts_under(os.fsencode(place))] == [
        str(place / "upper"),
        str(place / "upper" / "lower"),
    ]


async def test_overlayfs_is_told_to_follow_no_layer_elsewhere(tmp_path: Path) -> None:
    """Attributes that would redirect it are refused in tars; this is the second wall."""
    async with running(tmp_path) as rig:
        root = await rig.mount(await rig.add(make_tar(entry("f"))))
        (line,) = (
            line
            for line in Path("/proc/self/mountinfo").read_text().splitlines()
            if line.split()[4] == str(root.path)
        )
        options = line.split()[-1].split(",")
        assert "redirect_dir=nofollow" in options
        assert not {"metacopy=on", "index=on"} & set(options)
        await root.close()
