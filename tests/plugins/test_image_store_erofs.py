"""A layer's mount over its own tar: nothing of it has a path, and nothing can change it."""

from __future__ import annotations

import errno
import os
import struct
import tarfile
from pathlib import Path

import pytest
from image_store_rig import (
    NOTHING,
    entry,
    folder,
    hard_link,
    make_tar,
    memory_files,
    running,
    snapshot,
    symlink,
)

from plugins.image_store.mount.erofs import mount_index
from plugins.image_store.mount.kernel import detached_mount, mounts_under
from plugins.image_store.mount.memory_files import MemoryFiles
from supervisor import LayerMounted

pytestmark = pytest.mark.root

CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)
LOWER = make_tar(
    folder("./", mode=0o750),
    folder("etc"),
    entry("etc/removed", b"old"),
    folder("opaque"),
    entry("opaque/hidden", b"old"),
    folder("tmp", mode=0o1777, mtime=7),
)
UPPER = make_tar(
    entry("etc/.wh.removed"),
    folder("opaque", mode=0o700),
    entry("opaque/.wh..wh..opq"),
    entry("opaque/shown", b"new"),
    entry("tmp/x", b"below a directory that is only implied"),
    entry("set-user-id", b"x", mode=0o6755, uid=33),
    entry("capable", b"x", pax={"SCHILY.xattr.security.capability": CAPABILITY.decode()}),
    entry("labelled", os.urandom(5000), pax={"SCHILY.xattr.user.note": "some text"}),
    hard_link("etc/second", "labelled"),
    symlink("link", "../../outside"),
    entry("null", kind=tarfile.CHRTYPE, device=(1, 3), mode=0o666),
    entry("disk", kind=tarfile.BLKTYPE, device=(8, 300), uid=33),
    entry("pipe", kind=tarfile.FIFOTYPE, mode=0o620),
)


@pytest.mark.parametrize("writable", [False, True])
async def test_mounted_or_unpacked_a_container_sees_the_same_tree(
    tmp_path: Path, writable: bool
) -> None:
    seen = {}
    for mount in ("erofs", "unpack"):
        async with running(tmp_path / mount, mount=mount) as rig:
            root = await rig.mount(await rig.add(LOWER), await rig.add(UPPER), writable=writable)
            seen[mount] = snapshot(root.path)
            for device in ("null", "disk"):
                with pytest.raises(PermissionError):
                    (root.path / device).read_bytes()
            await root.close()
    assert seen["erofs"] == seen["unpack"]
    assert {"opaque/shown", "tmp/x", "etc/second", "null"} < set(seen["erofs"])
    assert not {"etc/removed", "opaque/hidden"} & set(seen["erofs"])


def descriptors() -> list[str]:
    """What the process has open, without the numbers of pipes and the like."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{fd}").partition(":[")[0])
        except FileNotFoundError:
            continue
    return sorted(found)


def loop_devices_in_use() -> list[str]:
    return [str(path) for path in Path("/sys/block").glob("loop*/loop/backing_file")]


async def test_a_mounted_layer_has_no_descriptor_no_path_and_no_loop_device(
    tmp_path: Path,
) -> None:
    loops = loop_devices_in_use()
    async with running(tmp_path, mount="erofs") as rig:
        first = await rig.add(LOWER)
        before = descriptors()
        layer = await rig.add(UPPER)
        assert memory_files() == 0
        # Tar and index are with the kernel alone.
        assert descriptors() == before
        assert loop_devices_in_use() == loops
        (point,) = {"layers/2"} & set(rig.mounts())
        place = os.fsencode(rig.runtime_dir / "store" / point)
        (line,) = [
            words
            for words in map(bytes.split, Path("/proc/self/mounts").read_bytes().splitlines())
            if words[1] == place
        ]
        source, _, filesystem, options, *_ = line
        assert filesystem == b"erofs"
        assert {b"ro", b"nosuid", b"nodev", b"noexec"} <= set(options.split(b","))
        assert source.startswith(b"/proc/self/fd/")
        # A name from the past: no descriptor of this process is one of the two files.
        assert not [name for name in descriptors() if "index" in name or "memfd:layer" in name]
        for held in (layer, first):
            await rig.store.discard(held.stored)
        assert rig.leftovers() == NOTHING


async def test_what_is_mounted_is_told_with_what_it_takes(tmp_path: Path) -> None:
    for mount in ("erofs", "unpack"):
        async with running(tmp_path / mount, mount=mount) as rig:
            layer = await rig.add(UPPER)
            assert rig.events == [
                LayerMounted(
                    digest=str(layer.digest),
                    how=mount,
                    memory_bytes=rig.store.budget.used_bytes,
                )
            ]
            assert rig.store.budget.used_bytes > (len(UPPER) if mount == "erofs" else 0)


async def test_neither_bytes_nor_names_of_a_mounted_layer_can_be_changed_by_root(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, mount="erofs") as rig:
        await rig.add(UPPER)
        (shown,) = (rig.runtime_dir / "store" / "layers").iterdir()
        for change in (
            lambda: (shown / "labelled").write_bytes(b"changed"),
            lambda: (shown / "labelled").unlink(),
            lambda: (shown / "more").touch(),
            lambda: (shown / "labelled").chmod(0o777),
            lambda: os.setxattr(shown / "labelled", "user.note", b"changed"),
        ):
            with pytest.raises(OSError) as refused:
                change()
            assert refused.value.errno == errno.EROFS


def test_what_the_kernel_says_of_a_refusal_is_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Unknown parameter 'no_such_option'"):
        detached_mount(b"erofs", ((b"no_such_option", b"1"),))
    with pytest.raises(OSError, match="No such device"):
        detached_mount(b"no_such_filesystem")


def test_an_index_that_is_none_is_refused_and_nothing_is_mounted(tmp_path: Path) -> None:
    before = descriptors()
    files = MemoryFiles()
    index = files.make()
    tar_fd = os.memfd_create("tar")
    try:
        os.write(index.fd, bytes(8192))
        os.write(tar_fd, bytes(8192))
        with pytest.raises(OSError, match="Invalid argument"):
            mount_index(index.fd, tar_fd, tmp_path)
        # Why the index is not simply a memfd, too.
        with pytest.raises(OSError, match="Block device required"):
            mount_index(tar_fd, tar_fd, tmp_path)
    finally:
        os.close(tar_fd)
        index.close()
    assert mounts_under(os.fsencode(tmp_path)) == []
    assert index.wait_gone(timeout_s=5)
    files.close()
    assert descriptors() == before
