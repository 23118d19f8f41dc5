"""From a layout or a registry to a mounted image, beside podman, umoci and skopeo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import trio

from benchmarks.compare import Samples, beside, median_of_rounds, times_of
from benchmarks.figures import CannotMeasure, Figure, Section, median_ms, require_root
from benchmarks.image_peers import (
    Gunzip,
    IsalAlone,
    PodmanPull,
    Sha384Alone,
    Side,
    SkopeoThenUmoci,
    UmociUnpack,
    push,
)
from benchmarks.layer_inputs import (
    CACHE,
    TAG,
    USUAL_BYTES,
    USUAL_ENTRIES,
    Layer,
    machine_layers,
    make_layout,
    small_files_layer,
    warm,
)
from benchmarks.ram import ram_folder
from benchmarks.registry import running_registry
from benchmarks.store_side import StoreSide, from_files, open_store
from supervisor import RegistryBlob

RAM_MIB = 4096
LAYOUT_GOAL = 1 / 5
PARTS_GOAL = 1.3
REGISTRY_GOAL = 1 / 4
SMALL_FILES_GOAL = 1 / 3
REPOSITORY = "benchmark/layer"


def run(
    *,
    rounds: int = 5,
    cache: Path = CACHE,
    size_bytes: int = USUAL_BYTES,
    entries: int = USUAL_ENTRIES,
    small_files: int = 100_000,
) -> Section:
    require_root()
    (layer,) = machine_layers(cache, size_bytes=size_bytes, entries=entries)
    small = small_files_layer(cache, files=small_files)
    warm(layer.tar, layer.blob, small.blob)
    with ram_folder(size_mib=RAM_MIB) as folder:
        figures, left_out = trio.run(_compare, folder, layer, small, rounds)
    return Section(
        name="image_sources",
        title="From a layout or a registry to a mounted image",
        method=(
            f"One layer of this machine's own files ({layer}), and one of small files ({small}), "
            "both packed by `gzip -6`. Image store: its `Store` used directly, in RAM, with its "
            "default settings; from `fetch` over verifying, indexing and mounting to a root for "
            "a container, mounted. `podman pull`: root, overlay, a storage that is new each time "
            "but set up before. `umoci unpack`: root. All that these write lies on one tmpfs; "
            "what is read is in the page cache for all alike. `gunzip -c >/dev/null`, isal's "
            "decompressor and SHA-384 alone are what nobody can leave out. The registry is "
            "Debian's docker-registry on loopback, without TLS. In turn, "
            f"{rounds} rounds, medians."
        ),
        figures=tuple(figures),
        left_out=tuple(dict.fromkeys(left_out)),
    )


async def _compare(
    folder: Path, layer: Layer, small: Layer, rounds: int
) -> tuple[list[Figure], list[str]]:
    figures: list[Figure] = []
    left_out: list[str] = []
    layout = make_layout(folder / "layout", [layer])
    small_layout = make_layout(folder / "small-layout", [small])
    roots = [Path(item.blob).parent for item in (layer, small)]
    async with open_store(folder / "store", file_roots=roots) as opened:
        ours = StoreSide(opened, from_files([layer]))
        sides: list[Side] = [
            *(ours, Gunzip(layer, folder / "gunzip.log"), IsalAlone(layer), Sha384Alone(layer)),
            *_there(left_out, lambda: PodmanPull(f"oci:{layout}:{TAG}", folder / "podman")),
            *_there(left_out, lambda: UmociUnpack(layout, folder / "umoci")),
        ]
        samples = await median_of_rounds(sides, rounds=rounds)
        figures += _from_layout(samples, ours)
        sides = [
            StoreSide(opened, from_files([small])),
            *_there(left_out, lambda: PodmanPull(f"oci:{small_layout}:{TAG}", folder / "podman")),
        ]
        samples = await median_of_rounds(sides, rounds=rounds)
        figures += _against(samples, "small files", ours.name, [], SMALL_FILES_GOAL)
        try:
            with running_registry(folder / "registry") as name:
                reference = f"docker://{name}/{REPOSITORY}:{TAG}"
                await push(layout, reference, folder)
                blob = RegistryBlob(
                    registry=name,
                    repository=REPOSITORY,
                    blob_digest=f"sha256:{layer.blob_sha256}",
                    media_type=layer.source.media_type,
                    size_bytes=layer.blob_bytes,
                    tar_size_bytes=layer.tar_bytes,
                )
                podman = PodmanPull.name
                sides = [
                    StoreSide(opened, [(layer.digest, blob)]),
                    *_there(left_out, lambda: SkopeoThenUmoci(reference, folder / "skopeo")),
                    *_there(left_out, lambda: PodmanPull(reference, folder / "podman")),
                ]
                samples = await median_of_rounds(sides, rounds=rounds)
            figures += _against(samples, "registry", ours.name, [podman], REGISTRY_GOAL)
        except CannotMeasure as error:
            left_out.append(f"from a registry: {error}")
    return figures, left_out


def _from_layout(samples: Samples, side: StoreSide) -> list[Figure]:
    ours = side.name
    figures = [
        Figure(name=f"layout, {ours}, of it {part}", value=median_ms(seconds) / 1000, unit="s")
        for part, seconds in side.parts.items()
    ]
    figures += _against(
        samples,
        "layout",
        ours,
        [Gunzip.name, IsalAlone.name, Sha384Alone.name],
        LAYOUT_GOAL,
    )
    for part in (Gunzip.name, IsalAlone.name):
        longer = max(samples[part], samples[Sha384Alone.name])
        name = f"the longer of {part} and {Sha384Alone.name}"
        figures.append(
            beside(samples[ours], longer, what="layout", other_name=name, at_most=PARTS_GOAL)
        )
    return figures


def _against(
    samples: Samples, what: str, ours: str, no_goal: Sequence[str], at_most: float
) -> list[Figure]:
    """All times, and ours beside each of the others'; those of `no_goal` are for information."""
    figures = times_of(samples, what=what)
    figures += [
        beside(
            samples[ours],
            seconds,
            what=what,
            other_name=name,
            at_most=None if name in no_goal else at_most,
        )
        for name, seconds in samples.items()
        if name != ours
    ]
    return figures


def _there(left_out: list[str], make: Callable[[], Side]) -> list[Side]:
    """The side, or none and a word about what is not installed."""
    try:
        return [make()]
    except CannotMeasure as error:
        left_out.append(str(error))
        return []
