"""From an image's layers to the references of a manifest, and where the bytes lie."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial

import msgspec
import trio

from acon.arguments import RegistryAccess
from acon.images.image import Advance, ImageLayer, local_blob
from acon.layer_bytes import hash_layer
from acon.output import Progress
from acon.parallel import in_parallel
from supervisor.formats.errors import DigestMismatch
from supervisor.seams import FileBlob, LayerSource, RegistryBlob

# What a manifest names layers by; SHA-512 would do as well.
ALGORITHM = "sha384"
_MAX_AT_ONCE = 8


async def hash_layers(
    layers: Sequence[ImageLayer], access: RegistryAccess, bars: Progress
) -> list[tuple[str, LayerSource]]:
    """`sha384/HEX` of every layer, in their order, and its source with `tar_size_bytes`.

    Several are read at once, in threads. Raises `DigestMismatch` for a blob that is not what
    leads to it or a tar that is not its diff_id, `FormatError` for damaged compression, and
    what registries raise. Cancelled (Ctrl-C): threads end at their next read, temporary
    files are gone.
    """
    at_once = min(os.cpu_count() or 1, _MAX_AT_ONCE)
    jobs = [
        partial(_hash_layer, number, layer, access, bars) for number, layer in enumerate(layers)
    ]
    return await in_parallel(jobs, at_once=at_once)


async def _hash_layer(
    number: int, layer: ImageLayer, access: RegistryAccess, bars: Progress
) -> tuple[str, LayerSource]:
    source = layer.source
    algorithm = ALGORITHM if layer.diff_id is None else layer.diff_id.partition(":")[0]
    arriving: Advance = _no_bar
    if isinstance(source, RegistryBlob):
        arriving = bars.begin(f"fetch {number}", source.size_bytes).advance
    async with local_blob(source, access, advance=arriving) as blob:
        bar = bars.begin(f"layer {number}", blob.size_bytes)
        digests = await trio.to_thread.run_sync(
            partial(
                hash_layer,
                blob,
                algorithms=tuple({algorithm, ALGORITHM}),
                advance=bar.advance,
                between=trio.from_thread.check_cancelled,
            )
        )
    actual = f"{algorithm}:{digests.hex_digests[algorithm]}"
    if layer.diff_id not in (None, actual):
        raise DigestMismatch(
            source.file if isinstance(source, FileBlob) else source.blob_digest,
            "a layer must have its diff_id",
            expected=layer.diff_id,
            actual=actual,
        )
    located = msgspec.structs.replace(source, tar_size_bytes=digests.size_bytes)
    return str(digests.digest(ALGORITHM)), located


def _no_bar(_count_bytes: int) -> None:
    pass
