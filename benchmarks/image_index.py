"""One index per layer under overlayfs, beside one merged index per image: what decides it.

The merged index is approximated by the image's tars put together into one, whose index has
the same files, of the same bytes, at the same places of one device instead of several.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tarfile
from collections.abc import Sequence
from pathlib import Path

import msgspec
import trio

from benchmarks.figures import Figure, Section, median_ms, require_root, stopwatch
from benchmarks.layer_inputs import CACHE, USUAL_BYTES, USUAL_ENTRIES, Layer, machine_layers
from benchmarks.ram import ram_folder
from benchmarks.store_side import OpenStore, Wanted, from_files, open_store
from supervisor import FileBlob, Rootfs, VerifiedLayer
from supervisor.formats.digest import Digest

RAM_MIB = 1024
DISCARD_TIMEOUT_S = 60
PER_LAYER, MERGED = "an index per layer", "one merged index"
# Beside tars, caches and copies of them, for the rest of the machine.
SPARE_BYTES = 2 << 30
_PLAIN_TAR = "application/vnd.oci.image.layer.v1.tar"
_READ_BYTES = 1 << 20
_KIB = 1024


class Costs(msgspec.Struct, kw_only=True):
    """Of one image one way. Seconds for all its layers, then for one more container's root."""

    index_s: float
    index_bytes: int
    root_s: list[float]
    walk_s: list[float]
    read_s: list[float]
    entries: int


def run(
    *,
    rounds: int = 5,
    cache: Path = CACHE,
    counts: Sequence[int] = (1, 5, 20, 60),
    layer_bytes: int = 4_000_000,
    layer_entries: int = 150,
    sharing: int = 10,
    base_bytes: int = USUAL_BYTES,
    base_entries: int = USUAL_ENTRIES,
) -> Section:
    require_root()
    wanted = max(*counts, sharing)
    parts = machine_layers(cache, size_bytes=layer_bytes, entries=layer_entries, count=wanted)
    (base,) = machine_layers(cache, size_bytes=base_bytes, entries=base_entries)
    left_out: list[str] = []
    with ram_folder(size_mib=RAM_MIB) as folder:
        figures = trio.run(_images, folder, [parts[:count] for count in counts], rounds)
        needed_bytes = 3 * sharing * base.tar_bytes + SPARE_BYTES
        if _meminfo_bytes("MemAvailable:") < needed_bytes:
            left_out.append(
                f"images that share a base: needs {needed_bytes / 1e9:.0f} GB of memory"
            )
        else:
            figures += trio.run(_shared, folder, base, parts[:sharing])
    return Section(
        name="image_index",
        title="An index per layer, or one per image",
        method=(
            f"Images of layers of this machine's files, {layer_bytes / 1e6:.0f} MB and "
            f"{layer_entries} entries each, in RAM. Either each layer has an index and a root is "
            "an overlay over their mounts; or there is one index, approximated by all tars put "
            "together into one. Index: reading the tars' headers, writing and mounting; once per "
            "layer, or once per image. Root: from the request to a mounted root with owners "
            "shifted for one container, layers ready. Walk: `lstat` of everything through a new "
            "root, once everything was read before. Read: all bytes of all files through it. "
            f"Medians of {rounds} roots. Page cache: what the kernel keeps of file systems' files "
            f"(active and inactive) more, after everything was read through {sharing} images' "
            f"roots that share a base ({base}) below a layer of their own."
        ),
        figures=tuple(figures),
        left_out=tuple(left_out),
        conclusion=(
            "**Decision: an index per layer.** A merged index has no lower stack, so roots of "
            "many layers are mounted and walked sooner, and reading is the same. But a layer that "
            "images share is then indexed again for each of them, its pages are cached once per "
            "image instead of once, and a start with a new list of layers (an updated delegated "
            "layer) waits for the index of the whole image instead of finding all of it ready. "
            "In a TD, where memory is planned and layers are shared, that weighs more than the "
            "milliseconds that overlayfs adds to the start of an image with many layers. "
            "Overlayfs also keeps whiteouts and merging in the kernel, out of our index writer."
        ),
    )


# --- images of many layers ------------------------------------------------------------------


async def _images(folder: Path, images: Sequence[Sequence[Layer]], rounds: int) -> list[Figure]:
    figures: list[Figure] = []
    largest = max(images, key=len)
    roots = [folder, *(Path(layer.blob).parent for layer in largest)]
    async with open_store(folder / "store", file_roots=roots) as opened:
        for layers in images:
            together = await trio.to_thread.run_sync(join, [*layers], folder / "together.tar")
            costs = {
                PER_LAYER: await _costs(opened, from_files(layers), rounds),
                MERGED: await _costs(opened, [together], rounds),
            }
            if len({cost.entries for cost in costs.values()}) != 1:
                raise RuntimeError("both ways must show the same files")
            for way, cost in costs.items():
                figures += _figures(f"{len(layers)} layers, {way}", cost)
    return figures


async def _costs(opened: OpenStore, wanted: Sequence[Wanted], rounds: int) -> Costs:
    costs = Costs(index_s=0, index_bytes=0, root_s=[], walk_s=[], read_s=[], entries=0)
    layers: list[VerifiedLayer] = []
    try:
        for item in wanted:
            layer = await opened.fetch(item)
            layers.append(layer)
            with stopwatch() as watch:
                await opened.store.prepare(layer)
            costs.index_s += watch.seconds
            costs.index_bytes += opened.mounted_bytes(layer) - layer.size_bytes
        await _through_a_root(opened, layers, costs)
        costs.root_s, costs.walk_s, costs.read_s = [], [], []  # the first found nothing cached
        for _ in range(rounds):
            await _through_a_root(opened, layers, costs)
    finally:
        with trio.move_on_after(DISCARD_TIMEOUT_S, shield=True):
            for layer in layers:
                await opened.store.discard(layer.stored)
    return costs


async def _through_a_root(opened: OpenStore, layers: Sequence[VerifiedLayer], costs: Costs) -> None:
    with stopwatch() as watch:
        root = await opened.mount(layers)
    costs.root_s.append(watch.seconds)
    try:
        with stopwatch() as watch:
            costs.entries = await trio.to_thread.run_sync(opened.look, root, walk)
        costs.walk_s.append(watch.seconds)
        with stopwatch() as watch:
            await trio.to_thread.run_sync(opened.look, root, read_all)
        costs.read_s.append(watch.seconds)
    finally:
        await root.close()


def _figures(what: str, cost: Costs) -> list[Figure]:
    return [
        Figure(name=f"{what}: index", value=cost.index_s * 1000, unit="ms"),
        Figure(name=f"{what}: index's size", value=cost.index_bytes / 1e6, unit="MB"),
        Figure(name=f"{what}: root", value=median_ms(cost.root_s), unit="ms"),
        Figure(name=f"{what}: walk", value=median_ms(cost.walk_s), unit="ms"),
        Figure(name=f"{what}: read", value=median_ms(cost.read_s), unit="ms"),
    ]


# --- images that share a base ---------------------------------------------------------------


async def _shared(folder: Path, base: Layer, own: Sequence[Layer]) -> list[Figure]:
    file_roots = [folder, *(Path(layer.blob).parent for layer in (base, *own))]
    async with open_store(folder / "shared", file_roots=file_roots) as opened:
        shared, *tops = [await opened.load(wanted) for wanted in from_files([base, *own])]
        per_layer = await _cached_bytes(opened, [[shared, top] for top in tops])
        together = []
        for top in own:
            joined = await trio.to_thread.run_sync(join, [base, top], folder / "together.tar")
            together.append([await opened.load(joined)])
        merged = await _cached_bytes(opened, together)
    return [
        Figure(name=f"{len(own)} images, {way}: page cache", value=size / 1e6, unit="MB")
        for way, size in ((PER_LAYER, per_layer), (MERGED, merged))
    ]


async def _cached_bytes(opened: OpenStore, images: Sequence[Sequence[VerifiedLayer]]) -> int:
    """How much more the page cache holds after all was read; the layers are discarded."""
    roots: list[Rootfs] = []
    try:
        for layers in images:
            roots.append(await opened.mount(layers))
        before_bytes = _file_cache_bytes()
        for root in roots:
            await trio.to_thread.run_sync(opened.look, root, read_all)
        return _file_cache_bytes() - before_bytes
    finally:
        with trio.move_on_after(DISCARD_TIMEOUT_S, shield=True):
            for root in roots:
                await root.close()
            for layer in {id(layer): layer for layers in images for layer in layers}.values():
                await opened.store.discard(layer.stored)


def _file_cache_bytes() -> int:
    """Pages that back files and can be given up; neither tmpfs nor memfd is in it."""
    return _meminfo_bytes("Active(file):") + _meminfo_bytes("Inactive(file):")


def _meminfo_bytes(key: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * _KIB
    raise KeyError(key)


# --- tars and trees -------------------------------------------------------------------------


def join(layers: Sequence[Layer], path: Path) -> Wanted:
    """One tar of all entries, lowest layer first, as a file; later entries win, as layers do."""
    hasher = hashlib.sha384()
    with path.open("wb") as joined:
        for layer in layers:
            with open(layer.tar, "rb") as tar:
                left = _entries_bytes(layer.tar)
                while left and (chunk := tar.read(min(left, _READ_BYTES))):
                    left -= len(chunk)
                    joined.write(chunk)
                    hasher.update(chunk)
        end = bytes(2 * tarfile.BLOCKSIZE)
        joined.write(end)
        hasher.update(end)
    source = FileBlob(file=str(path), media_type=_PLAIN_TAR, size_bytes=path.stat().st_size)
    return Digest("sha384", hasher.hexdigest()), source


def _entries_bytes(tar: str) -> int:
    """Where the last entry ends, padding and all."""
    with tarfile.open(tar) as archive:
        last = archive.getmembers()[-1]
    return last.offset_data + -(-last.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def walk(root: Path) -> int:
    """How many files and folders there are; each was looked at."""
    count = 0
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            os.lstat(os.path.join(folder, name))
            count += 1
    return count


def read_all(root: Path) -> None:
    for folder, _, files in os.walk(root):
        for name in files:
            path = os.path.join(folder, name)
            if stat.S_ISREG(os.lstat(path).st_mode):
                with open(path, "rb", buffering=0) as file:
                    while file.read(_READ_BYTES):
                        pass
