"""What layers hide of one another: through overlayfs, both ways, and as umoci unpacks it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_store_rig import Entry, entry, folder, hard_link, make_tar, running, snapshot, symlink
from image_store_trees import TOOL_TIMEOUT_S, WAYS, Way, indexed, stacked, unpacked

pytestmark = pytest.mark.root

BASE = make_tar(
    folder("./"),
    folder("etc", mtime=1),
    entry("etc/gone", b"lower"),
    entry("etc/kept", b"lower"),
    entry("etc/again", b"lower"),
    folder("opaque", mtime=2),
    entry("opaque/lower", b"lower"),
    folder("opaque/d", mtime=3),
    entry("opaque/d/lower", b"lower"),
    folder("replaced", mtime=4),
    entry("replaced/lower", b"lower"),
    folder("dropped", mtime=5),
    entry("dropped/lower", b"lower"),
    symlink("link", "etc"),
    entry("long" + "x" * 251, b"lower"),
)
UPPER = make_tar(
    folder("./"),
    folder("etc", mtime=11),
    entry("etc/.wh.gone"),
    entry("etc/.wh.never there"),
    entry("etc/again", b"upper"),
    entry("etc/.wh.again"),
    folder("opaque", mtime=12),
    entry("opaque/upper", b"upper"),
    entry("opaque/.wh..wh..opq"),
    entry(".wh.replaced"),
    folder("replaced", mtime=14),
    entry("replaced/upper", b"upper"),
    entry(".wh.dropped"),
    entry(".wh.link"),
    entry(".wh.long" + "x" * 251),
    folder("new", mtime=15),
    entry("new/.wh.nothing below"),
    entry("new/upper", b"upper"),
)
MERGED = {
    "etc": None,
    "etc/kept": b"lower",
    "etc/again": b"upper",
    "opaque": None,
    "opaque/upper": b"upper",
    "replaced": None,
    "replaced/upper": b"upper",
    "new": None,
    "new/upper": b"upper",
}
TRUSTED = "trusted.overlay."


def contents(root: Path) -> dict[str, object]:
    """By path, files' bytes; None for directories. What readdir(3) shows, ghosts and all."""
    return {path: seen[5] for path, seen in snapshot(root).items() if path != "."}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_an_upper_layer_hides_what_its_whiteouts_name(tmp_path: Path, way: Way) -> None:
    with stacked([BASE, UPPER], tmp_path, way=way) as merged:
        assert contents(merged) == MERGED
        # A ghost would be listed, but not found.
        assert all(os.path.lexists(merged / name) for name in MERGED)
        assert (merged / "etc").stat().st_mtime == 11


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_directory_with_whiteouts_that_no_lower_layer_has_shows_none(
    tmp_path: Path, way: Way
) -> None:
    with stacked([make_tar(entry("f")), UPPER], tmp_path, way=way) as merged:
        assert os.listdir(merged / "new") == ["upper"]
        assert sorted(os.listdir(merged / "etc")) == ["again"]


@pytest.mark.parametrize("how", ["erofs", "unpack"])
async def test_an_opaque_root_hides_all_below(tmp_path: Path, how: str) -> None:
    """Which overlayfs does not look for: the store leaves the lower layers out."""
    opaque = make_tar(folder("./"), entry(".wh..wh..opq"), entry("middle", b"middle"))
    async with running(tmp_path, mount=how) as rig:
        tars = (BASE, opaque, make_tar(entry("upper", b"upper")))
        layers = [await rig.add(tar) for tar in tars]
        root = await rig.mount(*layers)
        assert {path.name for path in root.path.iterdir() if path.is_file()} == {"middle", "upper"}
        assert not {"etc", "opaque", "link"} & set(os.listdir(root.path))
        await root.close()


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_layer_in_the_middle_hides_and_an_upper_one_brings_back(tmp_path: Path, way: Way) -> None:
    middle = make_tar(folder("./"), entry(".wh.etc"), entry(".wh.link"))
    upper = make_tar(folder("./"), folder("etc"), entry("etc/new", b"upper"))
    with stacked([BASE, middle, upper], tmp_path, way=way) as merged:
        assert os.listdir(merged / "etc") == ["new"]
        assert not os.path.lexists(merged / "link")


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_whiteouts_are_what_overlayfs_knows_and_only_that(tmp_path: Path, way: Way) -> None:
    with way(UPPER, tmp_path / "layer") as shown:
        hidden = (shown / "etc" / "gone").lstat()
        assert (hidden.st_mode, hidden.st_rdev) == (0o20000, 0)
        assert trusted(shown / "etc") == {"origin": b""}
        assert trusted(shown / "opaque") == {"opaque": b"y"}
        assert trusted(shown / "replaced") == {"opaque": b"y"}
        assert trusted(shown / "new" / "upper") == {}
        assert trusted(shown) == {"origin": b""}


def trusted(path: Path) -> dict[str, bytes]:
    """Overlayfs' own attributes."""
    return {
        name.removeprefix(TRUSTED): os.getxattr(path, name)
        for name in os.listxattr(path)
        if name.startswith(TRUSTED)
    }


def unpack_with_umoci(layers: list[bytes], directory: Path) -> Path:
    """The root file system that umoci makes of an image of these layers, as root."""
    layout = directory / "layout"

    def umoci(*words: str | Path) -> None:
        subprocess.run(["umoci", *words], check=True, capture_output=True, timeout=TOOL_TIMEOUT_S)

    umoci("init", "--layout", layout)
    image = f"{layout}:tag"
    umoci("new", "--image", image)
    for number, tar in enumerate(layers):
        path = directory / f"layer{number}.tar"
        path.write_bytes(tar)
        umoci("raw", "add-layer", "--image", image, path)
    umoci("unpack", "--image", image, directory / "bundle")
    return directory / "bundle" / "rootfs"


needs_umoci = pytest.mark.skipif(shutil.which("umoci") is None, reason="umoci is not installed")


@needs_umoci
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_two_layers_look_as_umoci_unpacks_them(tmp_path: Path, way: Way) -> None:
    # umoci refuses some of these in one layer: that an entry and its whiteout go together.
    upper = make_tar(
        folder("./"),
        folder("etc", mtime=11),
        entry("etc/.wh.gone"),
        entry("etc/again", b"upper", mtime=9),
        folder("opaque", mtime=12),
        entry("opaque/.wh..wh..opq"),
        entry("opaque/upper", b"upper"),
        hard_link("opaque/second", "opaque/upper"),
        entry(".wh.dropped"),
        entry(".wh.link"),
        entry("replaced", b"a file now"),
        entry(".wh.long" + "x" * 251),
    )
    theirs = snapshot(unpack_with_umoci([BASE, upper], tmp_path))
    del theirs["."]
    (tmp_path / "ours").mkdir()
    with stacked([BASE, upper], tmp_path / "ours", way=way) as merged:
        ours = snapshot(merged)
    del ours["."]
    assert ours == theirs


NAMES = st.sampled_from(["a", "b", "c"])
LOWEST_KINDS = st.sampled_from(["file", "folder", "symlink"])
KINDS = st.sampled_from(["file", "folder", "symlink", "whiteout", "opaque"])


@st.composite
def layers(draw: st.DrawFn) -> list[list[Entry]]:
    """Two layers of a few names, so that they meet; each name once, directories first."""
    made = []
    for number in range(2):
        entries = [folder("./")]
        folders = [""]
        taken: set[str] = set()
        for _ in range(draw(st.integers(min_value=1, max_value=10))):
            parent = draw(st.sampled_from(folders))
            kind = draw(KINDS if number else LOWEST_KINDS)
            name = parent + (".wh..wh..opq" if kind == "opaque" else draw(NAMES))
            # What overlayfs makes of an opaque root is another test's matter.
            if name in taken or name == ".wh..wh..opq":
                continue
            taken.add(name)
            if kind == "file":
                entries.append(entry(name, name.encode() * (number + 1), mtime=number))
            elif kind == "folder":
                entries.append(folder(name, mtime=10 + number, mode=0o700 + number))
                folders.append(name + "/")
            elif kind == "symlink":
                entries.append(symlink(name, f"target{number}"))
            elif kind == "opaque":
                entries.append(entry(name))
            else:
                entries.append(entry(f"{parent}.wh.{name.removeprefix(parent)}"))
        made.append(entries)
    return made


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(drawn=layers())
def test_random_layers_merge_alike_both_ways(
    drawn: list[list[Entry]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    tars = [make_tar(*entries) for entries in drawn]
    top = tmp_path_factory.mktemp("merge")
    seen = []
    for way in (indexed, unpacked):
        directory = top / way.__name__
        directory.mkdir()
        with stacked(tars, directory, way=way) as merged:
            seen.append(snapshot(merged))
    assert seen[0] == seen[1]
    # And a third opinion, without overlayfs: the lower layer, less what the upper one hides.
    assert {path for path in seen[0] if path != "."} == merged_names(*drawn)


def merged_names(lower: list[Entry], upper: list[Entry]) -> set[str]:
    """Which names remain (OCI image spec 1.1, layer.md, "Whiteouts")."""
    here = {info.name: info.isdir() for info, _ in upper if ".wh." not in info.name}
    hidden = {
        info.name.replace(".wh.", "")
        for info, _ in upper
        if ".wh." in info.name and ".wh..wh." not in info.name
    }
    opaque = {info.name.rpartition("/")[0] for info, _ in upper if ".wh..wh..opq" in info.name}
    below = set()
    for info, _ in lower:
        parents = [
            "/".join(info.name.split("/")[:depth]) for depth in range(info.name.count("/") + 1)
        ]
        is_covered = (
            info.name in hidden
            or any(parent in hidden or parent in opaque for parent in parents if parent)
            or any(here.get(parent) is False for parent in parents if parent)
        )
        if not is_covered:
            below.add(info.name)
    return {name for name in below | set(here) if name not in ("", ".", "./")}
