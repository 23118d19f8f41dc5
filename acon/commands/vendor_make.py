"""`acon vendor make`: a layer and its names, to be signed by who vouches for it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from acon.arguments import SubParsers, add_command

if TYPE_CHECKING:
    from acon.bundle import LayerSource

_DETAILS = """\
Makes an image without an entry point, which can never run: it only gives names to
one layer, so that images which delegate to its signer can use it. A layer that is
compatible with older ones lists their names too: --alias python:3 --alias python:2.
LAYER-SOURCE is an OCI layout of one layer, oci:FOLDER[:TAG], or a tar file."""


def add_parser(sub: SubParsers) -> None:
    parser = add_command(
        sub,
        "make",
        summary="give names to a layer that others may delegate to",
        details=_DETAILS,
        example="acon vendor make oci:layouts/python:3 --alias python:3 --alias python:2 "
        "-o python-3",
        run=run,
    )
    parser.add_argument("source", metavar="LAYER-SOURCE")
    parser.add_argument("--alias", metavar="NAME:SVN", action="append", required=True)
    parser.add_argument("-o", "--output", metavar="DIR", required=True, type=Path)
    parser.add_argument(
        "--platform", metavar="OS/ARCH", help="of an image for several (default: this machine's)"
    )


def run(args: argparse.Namespace) -> int:
    from acon.bundle import Bundle
    from acon.output import remark, result

    bundle = Bundle(args.output)
    bundle.directory.mkdir(parents=True, exist_ok=True)
    reference, source = _layer(args, bundle.directory)
    bundle.write_manifest(
        {
            "aconSpecVersion": [1, 0],
            "layers": [reference],
            "aliases": {"contents": {reference: args.alias}},
            "entrypoint": [],
            "policy": {"accepts": [], "rejectUnaccepted": False},
        }
    )
    bundle.write_sources({reference: source})
    if bundle.drop_signature() and not args.json:
        remark("note: the signature that was here was of other bytes and is gone; sign again")
    result(
        args,
        {"directory": str(bundle.directory), "layer": reference, "aliases": args.alias},
        f"{', '.join(args.alias)} = {reference}; sign it with "
        f"`acon vendor sign {bundle.directory} --key KEY --cert CERTIFICATE`",
    )
    return 0


def _layer(args: argparse.Namespace, directory: Path) -> tuple[str, LayerSource]:
    """Reference and source of the one layer that the person names."""
    import os

    from acon.bundle import TarSource
    from acon.errors import UsageError
    from acon.layer_bytes import LayerReader, hash_layer
    from acon.oci_layers import hash_oci_layers
    from acon.oci_layout import host_platform, open_image
    from acon.output import progress

    if not args.source.startswith("oci:"):
        path = Path(args.source).resolve()
        with progress(args) as bars:
            bars.begin(path.name, path.stat().st_size)
            digests = hash_layer(LayerReader(path, advance=bars.advance))
        _require_tar(path)
        return f"sha384/{digests.sha384}", TarSource(
            file=os.path.relpath(path, directory.resolve()), size_bytes=digests.size_bytes
        )
    image = open_image(args.source, platform_name=args.platform or host_platform())
    if len(image.layers) != 1:
        raise UsageError(
            args.source, "must be an image of one layer", expected=1, actual=len(image.layers)
        )
    with progress(args) as bars:
        return hash_oci_layers(image, directory, bars)[0]


def _require_tar(path: Path) -> None:
    import tarfile

    from acon.errors import UsageError

    try:
        with tarfile.open(path, "r:"):
            return
    except tarfile.TarError as error:
        raise UsageError(
            str(path), "must be an uncompressed tar, or an OCI layout (oci:FOLDER)", actual=error
        ) from None
