"""Real mounts: what a container sees of its layers, by overlayfs and by idmapped mounts."""

from __future__ import annotations

import os
import signal
import stat
import struct
import subprocess
import sys
import tarfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from image_store_rig import (
    FIRST_ID,
    NOTHING,
    entry,
    folder,
    hard_link,
    make_tar,
    running,
    snapshot,
    symlink,
)

from plugins.image_store.mount import rootfs
from plugins.image_store.mount.kernel import mounts_under
from supervisor import Busy, Conflict, Event, IdMap, UnknownItem
from supervisor.formats.digest import digest_of

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("both_ways")]

PROGRAM = Path("/bin/true").read_bytes()
MOUNT_POINTS = {"dev", "proc", "run", "shared", "sys", "tmp"}
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)
BASE = make_tar(
    folder("./"),
    folder("etc"),
    entry("etc/kept", b"kept"),
    entry("etc/removed", b"old"),
    folder("opaque"),
    entry("opaque/hidden", b"old"),
    folder("gone"),
    entry("gone/file"),
    folder("tmp", mode=0o1777, mtime=7),
    folder("var", mode=0o700, uid=33),
    folder("var/lib", mode=0o751, uid=33),
)
UPPER = make_tar(
    entry("etc/.wh.removed"),
    entry("etc/new", b"new"),
    folder("opaque"),
    entry("opaque/.wh..wh..opq"),
    entry("opaque/shown", b"new"),
    entry(".wh.gone"),
    entry("tmp/x", b"x"),
    entry("var/lib/y", b"y"),
)
BASE_DIGEST = digest_of("sha384", BASE)


def run(command: list[str | Path], **options: Any) -> subprocess.CompletedProcess[str]:
    """Short enough to be waited for where it stands."""
    return subprocess.run(command, capture_output=True, text=True, **options)


def names(path: Path) -> set[str]:
    return set(os.listdir(path))


async def test_whiteouts_and_opaque_directories_hide_lower_layers(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        root = await rig.mount(await rig.add(BASE), await rig.add(UPPER))
        assert names(root.path) == {"etc", "opaque", "var", *MOUNT_POINTS}
        assert names(root.path / "etc") == {"kept", "new"}
        assert names(root.path / "opaque") == {"shown"}
        assert (root.path / "etc" / "new").read_bytes() == b"new"
        await root.close()


async def test_a_directory_that_a_layer_only_implies_keeps_the_lower_metadata(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as rig:
        root = await rig.mount(await rig.add(BASE), await rig.add(UPPER))
        status = (root.path / "tmp").stat()
        assert (stat.S_IMODE(status.st_mode), status.st_mtime) == (0o1777, 7)
        status = (root.path / "var" / "lib").stat()
        assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o751, FIRST_ID + 2)
        assert stat.S_IMODE((root.path / "var").stat().st_mode) == 0o700
        assert (root.path / "tmp" / "x").read_bytes() == b"x"
        await root.close()


async def test_an_implied_directory_takes_nothing_from_below_an_opaque_one(
    tmp_path: Path,
) -> None:
    lower = make_tar(folder("d"), folder("d/sub", mode=0o1777, uid=33), entry("d/sub/old"))
    opaque = make_tar(folder("d"), entry("d/.wh..wh..opq"))
    upper = make_tar(entry("d/sub/new"))
    async with running(tmp_path) as rig:
        root = await rig.mount(*[await rig.add(tar) for tar in (lower, opaque, upper)])
        status = (root.path / "d" / "sub").stat()
        assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o755, FIRST_ID)
        assert names(root.path / "d" / "sub") == {"new"}
        await root.close()


async def test_a_name_whited_out_and_added_in_one_layer_is_new(tmp_path: Path) -> None:
    lower = make_tar(folder("d"), entry("d/old"), entry("f", b"old"))
    upper = make_tar(
        folder("d"), entry("d/new"), entry(".wh.d"), entry(".wh.f"), entry("f", b"new")
    )
    async with running(tmp_path) as rig:
        root = await rig.mount(await rig.add(lower), await rig.add(upper))
        assert names(root.path / "d") == {"new"}
        assert (root.path / "f").read_bytes() == b"new"
        await root.close()


async def test_a_whiteout_never_shows_where_no_other_layer_has_the_directory(
    tmp_path: Path,
) -> None:
    tar = make_tar(folder("d"), entry("d/.wh.ghost"), entry("d/f"), entry("lost/.wh.ghost"))
    async with running(tmp_path) as rig:
        root = await rig.mount(await rig.add(tar))
        assert names(root.path / "d") == {"f"}
        assert names(root.path / "lost") == set()
        await root.close()


@pytest.mark.parametrize("id_shift", ["idmap", "copy"])
async def test_owners_are_shown_as_the_container_s_own_ids(tmp_path: Path, id_shift: str) -> None:
    tar = make_tar(
        folder("./"), entry("root"), entry("web", uid=33, gid=1), entry("foreign", uid=77, gid=78)
    )
    async with running(tmp_path, id_shift=id_shift) as rig:
        layer = await rig.add(tar)
        root = await rig.mount(layer)
        owners = {
            name: ((root.path / name).stat().st_uid, (root.path / name).stat().st_gid)
            for name in (".", "root", "web", "foreign", "proc")
        }
        assert owners == {
            ".": (FIRST_ID, FIRST_ID),
            "root": (FIRST_ID, FIRST_ID),
            "web": (FIRST_ID + 2, FIRST_ID + 1),
            "foreign": (65534, 65534),
            "proc": (FIRST_ID, FIRST_ID),
        }
        other = await rig.mount(layer, container_id=2, id_map=IdMap(pairs=((0, 555),)))
        assert (other.path / "root").stat().st_uid == 555
        assert (root.path / "root").stat().st_uid == FIRST_ID
        await root.close()
        await other.close()


async def test_idmapped_and_copied_trees_are_the_same(tmp_path: Path) -> None:
    upper = make_tar(
        entry("etc/.wh.removed"),
        entry("set-user-id", b"x", mode=0o4755),
        entry("capable", b"x", pax={"SCHILY.xattr.security.capability": CAPABILITY.decode()}),
        entry("labelled", b"x", pax={"SCHILY.xattr.user.note": "some text"}),
        symlink("link", "../../outside"),
        hard_link("etc/second", "labelled"),
        entry("null", kind=tarfile.CHRTYPE, device=(1, 3), mode=0o666),
        entry("disk", kind=tarfile.BLKTYPE, device=(8, 300), uid=33),
        entry("pipe", kind=tarfile.FIFOTYPE, mode=0o620, uid=5),
        entry("big", os.urandom(300_001), mtime=1234.5),
    )
    seen = {}
    for id_shift in ("idmap", "copy"):
        async with running(tmp_path / id_shift, id_shift=id_shift) as rig:
            for writable in (False, True):
                root = await rig.mount(await rig.add(BASE), await rig.add(upper), writable=writable)
                seen[id_shift, writable] = snapshot(root.path)
                await root.close()
    first = seen["idmap", False]
    assert all(tree == first for tree in seen.values())
    # Revision 3 of the attribute: it counts in the container's user namespace alone.
    attributes = first["capable"][6]
    assert isinstance(attributes, dict)
    assert attributes["security.capability"][-4:] == struct.pack("<I", FIRST_ID)
    assert first["etc/second"][7] == ("etc/second", "labelled")


async def test_a_read_only_root_refuses_writes(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        root = await rig.mount(await rig.add(BASE))
        with pytest.raises(OSError, match="Read-only file system"):
            (root.path / "etc" / "kept").write_bytes(b"changed")
        await root.close()


async def test_what_a_container_writes_only_it_can_see(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        layer = await rig.add(BASE)
        one = await rig.mount(layer, container_id=1, writable=True)
        other_map = IdMap(pairs=((0, 300_000),))
        two = await rig.mount(layer, container_id=2, id_map=other_map, writable=True)
        (one.path / "etc" / "kept").write_bytes(b"changed")
        (one.path / "etc" / "removed").unlink()
        assert (two.path / "etc" / "kept").read_bytes() == b"kept"
        assert (two.path / "etc" / "removed").exists()
        await one.close()
        again = await rig.mount(layer, container_id=1, writable=True)
        assert (again.path / "etc" / "kept").read_bytes() == b"kept"
        await again.close()
        await two.close()


async def test_the_container_s_root_user_may_write_where_the_layer_s_root_could(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as rig:
        layer = await rig.add(BASE)
        root = await rig.mount(layer, writable=True)
        # The working folder is entered before the child gives its ids up.
        script = "echo new > etc/kept && cat etc/kept && echo more > tmp/own && rm etc/removed"
        done = run(
            ["sh", "-c", script],
            cwd=root.path,
            user=FIRST_ID,
            group=FIRST_ID,
            extra_groups=[],
        )
        assert (done.stdout, done.stderr) == ("new\n", "")
        assert (root.path / "etc" / "kept").stat().st_uid == FIRST_ID
        await root.close()


async def test_writable_space_is_bounded(tmp_path: Path) -> None:
    async with running(tmp_path, writable_bytes=1 << 20) as rig:
        root = await rig.mount(await rig.add(BASE), writable=True)
        with pytest.raises(OSError, match="No space left"):
            (root.path / "big").write_bytes(bytes(2 << 20))
        await root.close()


async def test_device_nodes_are_there_but_cannot_be_opened(tmp_path: Path) -> None:
    tar = make_tar(entry("null", kind=tarfile.CHRTYPE, device=(1, 3), mode=0o666))
    async with running(tmp_path) as rig:
        root = await rig.mount(await rig.add(tar))
        status = (root.path / "null").stat()
        assert stat.S_ISCHR(status.st_mode)
        assert status.st_rdev == os.makedev(1, 3)
        with pytest.raises(PermissionError):
            (root.path / "null").read_bytes()
        await root.close()


@pytest.mark.parametrize("writable", [False, True])
async def test_a_root_is_nodev_but_set_user_id_bits_count(tmp_path: Path, writable: bool) -> None:
    async with running(tmp_path) as rig:
        root = await rig.mount(await rig.add(BASE), writable=writable)
        flags = os.statvfs(root.path).f_flag
        assert flags & os.ST_NODEV
        assert not flags & (os.ST_NOSUID | os.ST_NOEXEC)
        assert bool(flags & os.ST_RDONLY) is not writable
        table = Path("/proc/self/mountinfo").read_text().splitlines()
        (line,) = [line for line in table if line.split()[4] == str(root.path)]
        # Of the features that a layer's extended attributes could ask for. The kernel does not
        # show the others while they are off.
        options = line.split()[-1].split(",")
        assert "redirect_dir=nofollow" in options
        assert not {"metacopy=on", "index=on"} & set(options)
        await root.close()


async def test_programs_run_from_a_root_though_the_store_itself_is_noexec(tmp_path: Path) -> None:
    tar = make_tar(entry("program", PROGRAM, mode=0o755))
    async with running(tmp_path) as rig:
        root = await rig.mount(await rig.add(tar))
        assert run([root.path / "program"]).returncode == 0
        await root.close()


async def test_missing_mount_points_are_supplied_and_present_ones_are_left_alone(
    tmp_path: Path,
) -> None:
    lower = make_tar(folder("proc", mode=0o711), symlink("run", "var/run"), entry("sys"))
    upper = make_tar(entry(".wh.sys"))
    async with running(tmp_path) as rig:
        root = await rig.mount(await rig.add(lower), await rig.add(upper))
        assert names(root.path) == MOUNT_POINTS
        modes = {
            name: oct(stat.S_IMODE((root.path / name).lstat().st_mode)) for name in MOUNT_POINTS
        }
        assert modes["proc"] == "0o711"
        assert modes["tmp"] == "0o1777"
        assert os.readlink(root.path / "run") == "var/run"
        assert (root.path / "sys").is_dir()
        await root.close()


async def test_one_hundred_layers_are_mounted_in_order(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        layers = [
            await rig.add(make_tar(entry("which", b"%d" % i), entry(f"own{i}"))) for i in range(100)
        ]
        root = await rig.mount(*layers)
        assert (root.path / "which").read_bytes() == b"99"
        assert len(names(root.path)) == 101 + len(MOUNT_POINTS)
        assert rig.root_mounts() == []
        await root.close()


async def test_more_layers_than_mount_takes_are_refused_and_nothing_is_left(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as rig:
        layer = await rig.add(make_tar(entry("f")))
        used_bytes = rig.store.budget.used_bytes
        for count in (0, 128):
            with pytest.raises(Conflict) as refused:
                await rig.mount(*[layer] * count)
            assert refused.value.actual == str(count)
        assert rig.root_mounts() == []
        assert rig.store.budget.used_bytes == used_bytes
        assert os.listdir(rig.runtime_dir / "store" / "roots") == []


async def test_a_container_has_one_root_at_a_time(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        layer = await rig.add(BASE)
        root = await rig.mount(layer)
        with pytest.raises(Conflict):
            await rig.mount(layer)
        assert (root.path / "etc").is_dir()
        await root.close()
        await root.close()
        again = await rig.mount(layer)
        await again.close()


async def test_a_discarded_layer_lives_until_its_last_root_is_closed(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        layer = await rig.add(BASE)
        one = await rig.mount(layer, container_id=1)
        two = await rig.mount(layer, container_id=2)
        await rig.store.discard(layer.stored)
        with pytest.raises(UnknownItem):
            await rig.mount(layer, container_id=3)
        await one.close()
        assert (two.path / "etc" / "kept").read_bytes() == b"kept"
        await two.close()
        await rig.store.discard(layer.stored)
        assert rig.leftovers() == NOTHING
        assert [type(event).__name__ for event in rig.events] == ["LayerMounted", "LayerFreed"]


async def test_a_root_that_somebody_still_uses_is_taken_away_lazily(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        layer = await rig.add(BASE)
        root = await rig.mount(layer)
        with (root.path / "etc" / "kept").open("rb") as held:
            await root.close()
            assert not root.path.exists()
            assert rig.root_mounts() == []
            assert held.read() == b"kept"


@pytest.mark.parametrize("id_shift", ["idmap", "copy"])
async def test_descriptors_that_a_forked_child_has_until_its_exec_do_not_fail_a_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, id_shift: str
) -> None:
    held: list[int] = []
    opened = rootfs._opened

    def opened_and_held(stack: ExitStack, directory: Path) -> int:
        fd = opened(stack, directory)
        held.append(os.dup(fd))
        return fd

    async with running(tmp_path, id_shift=id_shift) as rig:
        layer = await rig.add(BASE)
        monkeypatch.setattr(rootfs, "_opened", opened_and_held)
        root = await rig.mount(layer)
        assert held
        while held:
            os.close(held.pop())
        assert (root.path / "etc" / "kept").read_bytes() == b"kept"
        await root.close()
        assert rig.root_mounts() == []


@pytest.mark.parametrize("id_shift", ["idmap", "copy"])
async def test_roots_that_do_not_fit_the_budget_are_refused(tmp_path: Path, id_shift: str) -> None:
    async with running(
        tmp_path, id_shift=id_shift, budget_bytes=8 << 20, writable_bytes=3 << 20
    ) as rig:
        layer = await rig.add(make_tar(entry("f", bytes(1 << 20))))
        roots = [await rig.mount(layer, container_id=1, writable=True)]
        used_bytes = rig.store.budget.used_bytes
        with pytest.raises(Busy) as refused:
            for container_id in (2, 3):
                used_bytes = rig.store.budget.used_bytes
                roots.append(await rig.mount(layer, container_id=container_id, writable=True))
        assert refused.value.item == f"container {len(roots) + 1}"
        assert rig.store.budget.used_bytes == used_bytes
        for root in roots:
            await root.close()


async def killed_predecessor(tmp_path: Path, both_ways: str, *, at: str) -> set[str]:
    """What a store that is killed leaves mounted; `at`: a function that it never returns from."""
    script = """
import os, signal, sys, trio
from pathlib import Path
from image_store_rig import ID_MAP, entry, make_tar, running
from plugins.image_store.mount import rootfs

def end(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

async def main():
    async with running(Path(sys.argv[1]), mount=sys.argv[2]) as rig:
        await rig.send(make_tar(entry("unprepared")))
        layer = await rig.add(make_tar(entry("f")))
        for container_id, writable in ((1, True), (2, False)):
            root = await rig.mount(layer, container_id=container_id, writable=writable)
            root.hide()
        if sys.argv[3]:
            setattr(rootfs, sys.argv[3], end)
        await rig.store.mount((layer,), container_id=3, id_map=ID_MAP, writable=True)
        end()

trio.run(main)
"""
    here = Path(__file__).parent
    folders = os.pathsep.join(map(str, (here, here.parent, here.parents[1])))
    killed = run(
        [sys.executable, "-c", script, tmp_path, both_ways, at],
        env={**os.environ, "PYTHONPATH": folders},
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    store = tmp_path / "image_store" / "store"
    assert mounts_under(bytes(tmp_path)) == mounts_under(bytes(store))
    return {os.path.relpath(os.fsdecode(point), store) for point in mounts_under(bytes(store))}


@pytest.mark.parametrize(
    ("at", "of_roots"),
    [
        # Roots have ended with the process that held them.
        ("", set()),
        ("mount", {"roots/3/parts/0", "roots/3/parts/1"}),
        (
            "_unmount_parts",
            {"roots/3/parts/0", "roots/3/parts/1", "roots/3/parts/rw"},
        ),
    ],
)
async def test_stale_mounts_of_a_killed_predecessor_are_removed_at_the_start(
    tmp_path: Path, both_ways: str, at: str, of_roots: set[str]
) -> None:
    left = await killed_predecessor(tmp_path, both_ways, at=at)
    layers = {"layers/2"} if both_ways == "erofs" else set()
    assert left == {".", *layers, *of_roots}

    async with running(tmp_path) as rig:
        assert rig.leftovers() == NOTHING
        root = await rig.mount(await rig.add(BASE))
        assert names(root.path / "etc") == {"kept", "removed"}
        await root.close()


async def test_what_is_mounted_when_the_store_closes_is_taken_away(tmp_path: Path) -> None:
    events: list[Event] = []
    async with running(tmp_path) as rig:
        await rig.mount(await rig.add(BASE), writable=True)
        await rig.send(UPPER)
        await rig.store.upload(BASE_DIGEST, size_bytes=4096)
        events = rig.events
    assert [type(event).__name__ for event in events] == [
        "LayerMounted",
        "LayerFreed",
        "LayerFreed",
    ]


async def test_nobody_but_the_machine_s_root_finds_a_way_into_the_store(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        root = await rig.mount(await rig.add(BASE), writable=True)
        store = rig.runtime_dir / "store"
        folders = [store, *(Path(folder) for folder, _, _ in os.walk(store / "roots"))]
        folders.append(store / "layers")
        assert len(folders) > 5
        outermost = [folder for folder in folders if "parts" not in folder.parent.parts]
        modes = {str(one.relative_to(store)): stat.S_IMODE(one.stat().st_mode) for one in outermost}
        assert set(modes.values()) == {0o700}, modes
        await root.close()
