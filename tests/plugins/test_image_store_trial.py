"""Which way of showing layers a store takes, and what it says of those that do not work here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from image_store_rig import entry, make_tar, running
from structlog.testing import capture_logs

from plugins.image_store.config import IdShift, MountWay, StoreConfig
from plugins.image_store.mount import erofs, rootfs
from plugins.image_store.mount.kernel import detached_mount, idmapped_clone, mounts_under
from plugins.image_store.trial import ways_of
from supervisor import LayerMounted, RuntimeFailed

TAR = make_tar(entry("f", b"some bytes" * 1000))


def no_erofs(
    filesystem: bytes, options: Sequence[tuple[bytes, bytes]] = (), *, read_only: bool = False
) -> int:
    """As on a kernel without EROFS: the words are this kernel's own."""
    return detached_mount(b"erofs-of-no-kernel", options, read_only=read_only)


def no_idmapped_erofs(source: bytes, target: bytes, user_namespace_fd: int) -> None:
    """As on a kernel that maps owners of tmpfs only."""
    if os.path.ismount(source):
        raise OSError(22, "Invalid argument")
    idmapped_clone(source, target, user_namespace_fd)


async def way_taken(tmp_path: Path, **settings: object) -> tuple[str, list[str]]:
    """How a layer became visible and was read, and which mounts were warned of before."""
    with capture_logs() as logs:
        async with running(tmp_path, **settings) as rig:
            root = await rig.mount(await rig.add(TAR))
            assert (root.path / "f").read_bytes() == b"some bytes" * 1000
            assert (root.path / "f").stat().st_uid == 100_000
            await root.close()
            (mounted,) = [event for event in rig.events if isinstance(event, LayerMounted)]
    warned = [f"{log['mount']} {log['id_shift']}" for log in logs if log["event"] == "way_missing"]
    return mounted.how, warned


@pytest.mark.parametrize(
    ("mount", "id_shift", "ways"),
    [
        ("auto", "auto", ["erofs idmap", "unpack idmap", "erofs copy", "unpack copy"]),
        ("erofs", "auto", ["erofs idmap", "erofs copy"]),
        ("auto", "copy", ["erofs copy", "unpack copy"]),
        ("unpack", "idmap", ["unpack idmap"]),
    ],
)
def test_settings_leave_ways_and_the_best_is_first(
    mount: MountWay, id_shift: IdShift, ways: list[str]
) -> None:
    found = ways_of(StoreConfig(mount=mount, id_shift=id_shift))
    assert [f"{way.mount} {way.id_shift}" for way in found] == ways


@pytest.mark.root
async def test_where_all_works_layers_are_mounted_without_a_warning(tmp_path: Path) -> None:
    assert await way_taken(tmp_path, mount="auto") == ("erofs", [])


@pytest.mark.root
async def test_without_erofs_layers_are_unpacked_and_a_warning_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erofs, "detached_mount", no_erofs)
    with capture_logs() as logs:
        assert await way_taken(tmp_path, mount="auto") == ("unpack", ["erofs idmap"])
        async with running(tmp_path, mount="auto"):
            pass
    (warning,) = [log for log in logs if log["event"] == "way_missing"]
    assert "No such device" in warning["reason"]


@pytest.mark.root
async def test_a_store_that_must_mount_refuses_to_start_with_the_kernel_s_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erofs, "detached_mount", no_erofs)
    with pytest.raises(RuntimeFailed) as refused:
        async with running(tmp_path, mount="erofs"):
            raise AssertionError("it must not have started")
    assert refused.value.item == "image_store"
    assert "No such device" in str(refused.value.actual)
    assert mounts_under(os.fsencode(tmp_path)) == []


@pytest.mark.root
@pytest.mark.parametrize(
    ("mount", "taken"),
    [
        ("auto", ("unpack", ["erofs idmap"])),
        ("erofs", ("erofs", ["erofs idmap"])),
    ],
)
async def test_where_erofs_cannot_be_idmapped_layers_are_unpacked_or_else_copied(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mount: str,
    taken: tuple[str, list[str]],
) -> None:
    monkeypatch.setattr(rootfs, "idmapped_clone", no_idmapped_erofs)
    assert await way_taken(tmp_path, mount=mount) == taken


@pytest.mark.root
async def test_a_kernel_that_shows_other_bytes_than_the_tar_s_is_not_trusted_to_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mount_another(index_fd: int, tar_fd: int, target: Path) -> None:
        """As if the kernel read the device wrongly: all files are zeros."""
        other_fd = os.memfd_create("other")
        try:
            os.ftruncate(other_fd, os.fstat(tar_fd).st_size)
            erofs.mount_index(index_fd, other_fd, target)
        finally:
            os.close(other_fd)

    monkeypatch.setattr("plugins.image_store.layer.mount_index", mount_another)
    with pytest.raises(RuntimeFailed) as refused:
        async with running(tmp_path, mount="erofs"):
            raise AssertionError("it must not have started")
    assert "must have the bytes that its tar has" in str(refused.value.actual)
    assert mounts_under(os.fsencode(tmp_path)) == []
