"""`acon start`: run a container of an admitted image."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from acon.arguments import SubParsers, add_command

if TYPE_CHECKING:
    from acon.client import Client
    from supervisor.operations import ImageView

_DETAILS = """\
IMAGE is a name that the image gives itself, with or without its version, or an image
id, which may be cut short as tables show it: HASH/SIGNER../MANIFEST.., or the
beginning of its manifest's digest, if only one image begins so. The environment must
be what the manifest's rules allow; it is measured, and so public."""


def add_parser(sub: SubParsers) -> None:
    parser = add_command(
        sub,
        "start",
        summary="start a container",
        details=_DETAILS,
        example="acon start gateway --env LEVEL=info",
        run=run,
        daemon=True,
    )
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument(
        "--env",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="set a variable; NAME= unsets it (repeat)",
    )


def run(args: argparse.Namespace) -> int:
    from acon.daemon import converse
    from acon.image_names import short
    from acon.output import result

    image, container_id = converse(args, lambda client: _start(args, client))
    result(
        args,
        {"container_id": container_id, "image_id": image.image_id},
        f"container {container_id} of {short(image.image_id, image.names)} runs",
    )
    return 0


async def _start(args: argparse.Namespace, client: Client) -> tuple[ImageView, int]:
    from acon.image_names import find_image

    image = find_image(await client.images(), args.image)
    return image, await client.start(image.image_id, args.env)
