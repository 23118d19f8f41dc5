"""From a layer of an OCI layout to a layer reference and where its bytes lie."""

from __future__ import annotations

import os
from pathlib import Path

from acon.bundle import OciSource
from acon.layer_bytes import LayerReader, hash_layer
from acon.oci_layout import OciImage, blob_path
from acon.output import Progress
from supervisor.formats.errors import DigestMismatch


def hash_oci_layers(
    image: OciImage, bundle_directory: Path, bars: Progress
) -> list[tuple[str, OciSource]]:
    """`sha384/HEX` and source of every layer, lowest first.

    Raises `DigestMismatch` for a blob that is not what the layout says it is, and
    `FormatError` for a compression that is not known.
    """
    layout = image.layout.resolve()
    found: list[tuple[str, OciSource]] = []
    for number, (layer, diff_id) in enumerate(zip(image.layers, image.diff_ids, strict=True)):
        bars.begin(f"layer {number}", layer.size)
        path = blob_path(layout, layer.digest)
        reader = LayerReader(path, media_type=layer.media_type, advance=bars.advance)
        digests = hash_layer(reader)
        for rule, expected, actual in (
            ("a blob must have the digest that names it", layer.digest, digests.blob_sha256),
            ("a layer must have its diff_id", diff_id, digests.sha256),
        ):
            if expected != f"sha256:{actual}":
                raise DigestMismatch(str(path), rule, expected=expected, actual=f"sha256:{actual}")
        source = OciSource(
            # Relative, so that layout and bundle can be moved together.
            directory=os.path.relpath(layout, bundle_directory.resolve()),
            blob_digest=layer.digest,
            media_type=layer.media_type,
            size_bytes=digests.blob_size_bytes,
        )
        found.append((f"sha384/{digests.sha384}", source))
    return found
