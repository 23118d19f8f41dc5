"""`acon vendor make`: a layer and its names, to be signed by who vouches for it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from acon.arguments import (
    RegistryAccess,
    SubParsers,
    add_command,
    add_registry_options,
    registry_access,
)

if TYPE_CHECKING:
    from acon.images.image import ImageLayer
    from supervisor.seams import LayerSource

_DETAILS = """\
Makes an image without an entry point, which can never run: it only gives names to
one layer, so that images which delegate to its signer can use it. A layer that is
compatible with older ones lists their names too: --alias python:3 --alias python:2.
LAYER-SOURCE is an uncompressed tar file, or an image of one layer as
`acon image convert` takes it: oci:DIR[:TAG], oci-archive:FILE[:TAG],
docker-archive:FILE[:NAME:TAG], docker://HOST/NAME[:TAG|@DIGEST] or
acon-repo:DIR[:HASH/SIGNER/MANIFEST]."""


def add_parser(sub: SubParsers) -> None:
    parser = add_command(
        sub,
        "make",
        summary="give names to a layer that others may delegate to",
        details=_DETAILS,
        example="acon vendor make oci:layouts/python:3 --alias python:3 --alias python:2 "
        "-o python-3\n"
        "acon vendor make layer.tar --alias python:3 -o python-3",
        run=run,
    )
    parser.add_argument("source", metavar="LAYER-SOURCE")
    parser.add_argument("--alias", metavar="NAME:SVN", action="append", required=True)
    parser.add_argument("-o", "--output", metavar="DIR", required=True, type=Path)
    parser.add_argument(
        "--platform",
        metavar="OS/ARCH[/VARIANT]",
        help="of an image for several (default: this machine's)",
    )
    add_registry_options(parser)


def run(args: argparse.Namespace) -> int:
    from acon.bundle import Bundle
    from acon.output import remark, result

    bundle = Bundle(args.output)
    reference, source = _layer(args)
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


def _layer(args: argparse.Namespace) -> tuple[str, LayerSource]:
    """Reference and source of the one layer that the person names."""
    import trio

    from acon.images.layers import hash_layers
    from acon.images.reference import is_reference
    from acon.output import progress

    access = registry_access(args)
    path = Path(args.source)
    # As everywhere, a file that is there is what is meant.
    names_image = is_reference(args.source) and not path.exists()
    with progress(args) as bars:

        async def read() -> tuple[str, LayerSource]:
            if names_image:
                layers = await _only_layer(args, access)
            else:
                layers = (await trio.to_thread.run_sync(_layer_of_tar, path),)
            (found,) = await hash_layers(layers, access, bars)
            return found

        return trio.run(read)


async def _only_layer(args: argparse.Namespace, access: RegistryAccess) -> tuple[ImageLayer, ...]:
    import trio

    from acon.errors import UsageError
    from acon.images.image import open_image
    from acon.images.reference import parse_reference

    reference = parse_reference(args.source)
    if reference.transport == "acon-repo":
        layers = await trio.to_thread.run_sync(_acon_layers, reference.place, reference.tag)
    else:
        image = await open_image(reference, platform_name=args.platform, access=access)
        layers = image.layers
    if len(layers) != 1:
        raise UsageError(
            args.source, "must be an image of one layer", expected=1, actual=len(layers)
        )
    return layers


def _acon_layers(folder: Path, image_id: str | None) -> tuple[ImageLayer, ...]:
    """The layers that an image of ACON's repository names by their digests."""
    from acon.images.acon_repository import AconRepository
    from acon.images.image import ImageLayer

    image = AconRepository(folder).image(image_id)
    return tuple(
        ImageLayer(diff_id=name.replace("/", ":", 1), source=source)
        for name, source in image.layer_files.items()
    )


def _layer_of_tar(path: Path) -> ImageLayer:
    from acon.images.documents import TAR_MEDIA_TYPE
    from acon.images.image import ImageLayer
    from supervisor.seams import FileBlob

    _require_tar(path)
    file = path.resolve()
    return ImageLayer(
        diff_id=None,
        source=FileBlob(file=str(file), size_bytes=file.stat().st_size, media_type=TAR_MEDIA_TYPE),
    )


def _require_tar(path: Path) -> None:
    import tarfile

    from acon.errors import UsageError

    try:
        with tarfile.open(path, "r:"):
            return
    except tarfile.TarError as error:
        raise UsageError(
            str(path),
            "must be an uncompressed tar, or an image (oci:DIR, docker://HOST/NAME, ...)",
            actual=error,
        ) from None
