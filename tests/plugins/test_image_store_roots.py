"""A container's root between its starts: held, visible nowhere, and the same at the next one."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import trio
from image_store_rig import FIRST_ID, ID_MAP, NOTHING, Rig, descriptors, entry, make_tar, running

from plugins.image_store.mount import held, rootfs, roots
from plugins.image_store.mount.kernel import _libc, mount, unmount
from supervisor import IdMap, Rootfs, RuntimeFailed

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("both_ways")]

TAR = make_tar(entry("f", b"from the image"), entry("big", bytes(70_000)))
MS_SHARED = 1 << 20


async def root_in(rig: Rig, *, writable: bool = True) -> Rootfs:
    layer = await rig.add(TAR)
    return await rig.store.mount((layer,), container_id=1, id_map=ID_MAP, writable=writable)


def folder_in(tmp_path: Path, name: str = "target") -> Path:
    target = tmp_path / name
    target.mkdir()
    return target


def mounts_in(tmp_path: Path) -> list[str]:
    """Lines of the mount table, without the numbers that every mount is given anew."""
    table = Path("/proc/self/mountinfo").read_text().splitlines()
    return sorted(line.split(" ", 2)[2] for line in table if f" {tmp_path}/" in line)


@pytest.mark.parametrize("id_shift", ["idmap", "copy"])
@pytest.mark.parametrize("writable", [False, True])
async def test_a_root_is_in_the_mount_table_only_while_it_is_attached(
    tmp_path: Path, id_shift: str, writable: bool
) -> None:
    target = folder_in(tmp_path)
    async with running(tmp_path, id_shift=id_shift) as rig:
        await rig.add(TAR)  # as many layers as below
        layer = await rig.add(TAR)
        before = mounts_in(tmp_path)
        root = await rig.store.mount((layer,), container_id=1, id_map=ID_MAP, writable=writable)
        assert mounts_in(tmp_path) == before
        root.attach(target)
        (line,) = set(mounts_in(tmp_path)) - set(before)
        assert line.split()[2] == str(target)
        assert len(mounts_in(tmp_path)) == len(before) + 1
        assert (target / "f").read_bytes() == b"from the image"
        root.detach()
        assert mounts_in(tmp_path) == before
        assert os.listdir(target) == []
        await root.close()


@pytest.mark.parametrize("id_shift", ["idmap", "copy"])
async def test_what_was_written_is_there_at_the_next_start_wherever_that_is(
    tmp_path: Path, id_shift: str
) -> None:
    async with running(tmp_path, id_shift=id_shift, writable_bytes=1 << 20) as rig:
        root = await root_in(rig)
        for number in range(5):
            target = folder_in(tmp_path, f"start {number}")
            root.attach(target)
            if number:
                assert (target / "f").read_bytes() == b"changed at start %d" % (number - 1)
                assert (target / "f").stat().st_uid == FIRST_ID
                assert not (target / "big").exists()
            else:
                (target / "big").unlink()
            (target / "f").write_bytes(b"changed at start %d" % number)
            with pytest.raises(OSError, match="No space left"):
                (target / "too much").write_bytes(bytes(2 << 20))
            (target / "too much").unlink()
            root.detach()
            target.rmdir()
        await root.close()
        again = await root_in(rig)
        target = folder_in(tmp_path)
        again.attach(target)
        assert (target / "f").read_bytes() == b"from the image"
        await again.close()


async def test_a_root_is_attached_once_at_a_time_and_not_after_its_end(tmp_path: Path) -> None:
    one, two = folder_in(tmp_path, "one"), folder_in(tmp_path, "two")
    async with running(tmp_path) as rig:
        root = await root_in(rig)
        root.detach()
        root.attach(one)
        with pytest.raises(OSError) as refused:
            root.attach(two)
        assert refused.value.errno == errno.EBUSY
        assert (one / "f").exists()
        root.detach()
        root.detach()
        root.attach(two)
        assert (os.listdir(one), (two / "f").exists()) == ([], True)
        await root.close()
        assert os.listdir(two) == []
        root.detach()
        with pytest.raises(OSError) as refused:
            root.attach(one)
        assert refused.value.errno == errno.EBADF


async def test_a_target_that_cannot_be_used_is_refused_and_the_root_stays_usable(
    tmp_path: Path,
) -> None:
    target = folder_in(tmp_path)
    (tmp_path / "file").touch()
    async with running(tmp_path) as rig:
        root = await root_in(rig)
        for wrong, code in (("missing", errno.ENOENT), ("file", errno.EINVAL)):
            with pytest.raises(OSError) as refused:
                root.attach(tmp_path / wrong)
            assert refused.value.errno == code
        root.attach(target)
        assert (target / "f").exists()
        await root.close()


async def test_who_still_uses_a_root_may_go_on_when_it_is_detached(tmp_path: Path) -> None:
    target = folder_in(tmp_path)
    async with running(tmp_path) as rig:
        root = await root_in(rig)
        root.attach(target)
        with (target / "f").open("r+b") as opened:
            root.detach()
            assert opened.read() == b"from the image"
            opened.write(b", and more")
        root.attach(target)
        assert (target / "f").read_bytes() == b"from the image, and more"
        await root.close()


def started_and_left(root: Rootfs, target: Path) -> tuple[int, bytes]:
    """Exit code and output of a process that has copied the mount table while it was attached."""
    script = f"echo ready; read _; cat {target}/f; echo inside > {target}/new"
    root.attach(target)
    with subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as container:
        assert container.stdin is not None and container.stdout is not None
        assert container.stdout.readline() == b"ready\n"
        root.detach()
        output, _ = container.communicate(b"go on\n", timeout=60)
    return container.returncode, output


async def test_a_mount_namespace_made_at_the_start_keeps_the_root(tmp_path: Path) -> None:
    """As a container's does: it lives on with the root that is not ours to see any more."""
    target = folder_in(tmp_path)
    async with running(tmp_path) as rig:
        root = await root_in(rig)
        assert started_and_left(root, target) == (0, b"from the image")
        root.attach(target)
        assert (target / "new").read_bytes() == b"inside\n"
        await root.close()


@contextmanager
def shared_place(tmp_path: Path) -> Iterator[Path]:
    """A mount that hands what is mounted in it on to its peers, and such a peer."""
    for name in ("place", "peer"):
        folder_in(tmp_path, name)
    place, peer = os.fsencode(tmp_path / "place"), os.fsencode(tmp_path / "peer")
    mount(b"test", place, filesystem=b"tmpfs", flags=0)
    assert _libc.mount(None, place, None, MS_SHARED, None) == 0
    assert _libc.mount(place, peer, None, 4096, None) == 0  # MS_BIND
    try:
        yield tmp_path / "place"
    finally:
        unmount(peer)
        unmount(place)


async def test_a_shared_place_does_not_make_the_root_shared(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        root = await root_in(rig)
        with shared_place(tmp_path) as place:
            target = folder_in(place)
            for _ in range(2):
                root.attach(target)
                lines = [line for line in mounts_in(tmp_path) if line.split()[2] == str(target)]
                assert len(lines) == 1
                assert "shared:" not in lines[0]
                root.detach()
                assert os.listdir(target) == os.listdir(tmp_path / "peer" / "target") == []
        await root.close()


async def test_only_what_was_attached_is_taken_away_with_what_lies_over_it(tmp_path: Path) -> None:
    target = folder_in(tmp_path)
    async with running(tmp_path) as rig:
        root = await root_in(rig)
        mount(b"below", os.fsencode(target), filesystem=b"tmpfs", flags=0)
        (target / "of the other mount").touch()
        root.attach(target)
        mount(b"above", os.fsencode(target), filesystem=b"tmpfs", flags=0)
        root.detach()
        assert os.listdir(target) == ["of the other mount"]
        unmount(os.fsencode(target))
        # Somebody else may have taken it away before.
        root.attach(target)
        unmount(os.fsencode(target), lazily=True)
        root.detach()
        root.attach(target)
        assert (target / "f").exists()
        await root.close()


@pytest.mark.parametrize("step", ["make_private", "cloned"])
async def test_a_kernel_that_refuses_halfway_leaves_nothing_visible_and_all_is_freed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def refuse(mount_fd: int) -> int:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    target = folder_in(tmp_path)
    async with running(tmp_path) as rig:
        layer = await rig.add(TAR)
        before = mounts_in(tmp_path), descriptors()
        root = await rig.store.mount((layer,), container_id=1, id_map=ID_MAP, writable=True)
        with monkeypatch.context() as patch:
            patch.setattr(held, step, refuse)
            with pytest.raises(OSError) as refused:
                root.attach(target)
        assert refused.value.errno == errno.ENOMEM
        assert mounts_in(tmp_path) == before[0]
        root.detach()
        with pytest.raises(OSError) as refused:
            root.attach(target)
        assert refused.value.errno == errno.EINVAL
        await root.close()
        assert (mounts_in(tmp_path), descriptors()) == before
        await rig.store.discard(layer.stored)
        assert rig.leftovers() == NOTHING


@pytest.mark.parametrize("module", [held, rootfs], ids=["the root", "what it is made of"])
async def test_a_mount_that_cannot_be_taken_away_is_not_kept_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType
) -> None:
    def refuse(target: bytes, *, lazily: bool = False) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    async with running(tmp_path) as rig:
        layer = await rig.add(TAR)
        before = rig.leftovers(), descriptors()
        with monkeypatch.context() as patch:
            patch.setattr(module, "unmount", refuse)
            with pytest.raises(Exception, match="could not be mounted"):
                await rig.store.mount((layer,), container_id=1, id_map=ID_MAP, writable=True)
        assert (rig.leftovers(), descriptors()) == before


async def test_what_could_not_be_removed_stays_on_the_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(directory: Path) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(directory))

    async with running(tmp_path) as rig:
        before = rig.store.budget.used_bytes
        root = await root_in(rig)
        with monkeypatch.context() as patch:
            patch.setattr(roots, "remove_all", refuse)
            await root.close()
        _, _, folders, used_bytes = rig.leftovers()
        assert folders == ["1"]
        assert used_bytes > before
        # Else the rig finds, rightly, that not all was given back.
        assert isinstance(root, roots.MountedRoot)
        root._reservation.release()
        await root._ended()


@pytest.mark.parametrize("pairs", [((0, 65534),), ((0, FIRST_ID), (7, 65534)), ((7, FIRST_ID),)])
async def test_a_map_without_root_or_to_the_overflow_id_is_refused(
    tmp_path: Path, pairs: tuple[tuple[int, int], ...]
) -> None:
    async with running(tmp_path) as rig:
        layer = await rig.add(TAR)
        before = rig.leftovers()
        with pytest.raises(RuntimeFailed, match="may not show 65534"):
            await rig.store.mount(
                (layer,), container_id=1, id_map=IdMap(pairs=pairs), writable=False
            )
        assert rig.leftovers() == before


async def test_threads_that_attach_detach_and_close_at_once_leave_nothing(tmp_path: Path) -> None:
    targets = [folder_in(tmp_path, f"target {number}") for number in range(4)]
    attached: list[int] = []
    enough = trio.Event()

    def work(root: Rootfs, target: Path) -> None:
        """Until the root is closed."""
        while True:
            try:
                root.attach(target)
            except OSError as error:
                if error.errno == errno.EBADF:
                    return
                assert error.errno == errno.EBUSY
            else:
                root.detach()
                attached.append(1)
                if len(attached) == 100:
                    trio.from_thread.run_sync(enough.set)

    async with running(tmp_path) as rig:
        layer = await rig.add(TAR)
        before = mounts_in(tmp_path), descriptors()
        root = await rig.store.mount((layer,), container_id=1, id_map=ID_MAP, writable=True)
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for target in targets:
                    nursery.start_soon(trio.to_thread.run_sync, work, root, target)
                await enough.wait()
                await root.close()
        assert (mounts_in(tmp_path), descriptors()) == before


async def test_many_roots_hold_one_descriptor_each_and_no_place_in_the_table(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as rig:
        layer = await rig.add(TAR)
        before = mounts_in(tmp_path), descriptors()
        roots = [
            await rig.store.mount((layer,), container_id=number, id_map=ID_MAP, writable=False)
            for number in range(20)
        ]
        assert (mounts_in(tmp_path), descriptors()) == (before[0], before[1] + len(roots))
        for root in roots:
            await root.close()
        assert (mounts_in(tmp_path), descriptors()) == before
