"""`acon seal`: no image can be admitted after it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from acon.arguments import SubParsers, add_command

if TYPE_CHECKING:
    from acon.client import Client
    from supervisor.operations import ImageView

_DETAILS = """\
Nothing can be loaded after it until the TD is booted again. So it is refused while an
image is there that delegates a layer to somebody whose image is not: it could never
start. With --anyway it is sealed all the same."""


def add_parser(sub: SubParsers) -> None:
    parser = add_command(
        sub,
        "seal",
        summary="end loading for good, in the log for every verifier to see",
        details=_DETAILS,
        example="acon seal",
        run=run,
        daemon=True,
    )
    parser.add_argument(
        "--anyway", action="store_true", help="also if an image could then never start"
    )


def run(args: argparse.Namespace) -> int:
    from acon.daemon import converse
    from acon.output import result

    async def seal(client: Client) -> None:
        if not args.anyway:
            _require_resolvable(await client.images())
        await client.seal()

    converse(args, seal)
    result(args, {"sealed": True}, "sealed: no image can be admitted any more")
    return 0


def _require_resolvable(images: tuple[ImageView, ...]) -> None:
    from supervisor.errors import Conflict

    for image in images:
        delegated = [layer for layer in image.missing_layers if layer.startswith("signer/")]
        if image.executable and delegated:
            raise Conflict(
                ", ".join(image.names) or image.image_id,
                "could never start: load the image of the one it delegates to, or --anyway",
                actual="missing " + ", ".join(delegated),
            )
