"""`acon load`: bring signed images and their layers into a TD."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from acon.arguments import SubParsers, add_command, add_registry_options, positive, registry_access

if TYPE_CHECKING:
    from collections.abc import Sequence

    from acon.client import Client
    from acon.load_report import LoadReport
    from acon.loading import Loaded

_DETAILS = """\
ITEM is a bundle's folder, docker://HOST/NAME[:TAG|@DIGEST], oci:DIR[:TAG] or
oci-archive:FILE[:TAG] with which a signed manifest was published (`acon image
publish`), or acon-repo:DIR[:HASH/SIGNER/MANIFEST], a repository of ACON's client.

First everything is checked here that can be: signatures, the layers that lie on
this machine, and that there is an order of groups in which the images accept each
other and those that are loaded. Only then images are admitted and layers brought,
several at once: the daemon fetches those that its configuration lets it, the others
are read here, checked and sent.
Images that delegate layers need the vendor's: name it along.

With --json, one JSON object per line as things happen."""


def add_parser(sub: SubParsers) -> None:
    parser = add_command(
        sub,
        "load",
        summary="admit images and bring their layers",
        details=_DETAILS,
        example="acon load python-2 docker://registry.example.org/shop/gateway:1",
        run=run,
        daemon=True,
    )
    parser.add_argument("items", metavar="ITEM", nargs="+")
    parser.add_argument(
        "--together",
        action="store_true",
        help="one group, in the order given (default: the smallest groups that can be admitted)",
    )
    parser.add_argument(
        "--signed-by",
        metavar="SIGNER",
        action="append",
        default=[],
        help="whose signed manifest is meant, where several are published with an image: "
        "HASH/SIGNER or a certificate file (repeat)",
    )
    parser.add_argument(
        "--platform", metavar="OS/ARCH", help="of an image for several (default: this machine's)"
    )
    parser.add_argument(
        "--parallel", metavar="N", type=positive, default=4, help="layers at one time (default: 4)"
    )
    parser.add_argument(
        "--upload", action="store_true", help="read all layers here, whatever the daemon could"
    )
    parser.add_argument(
        "--unsafe-allow-sha256", action="store_true", help="as the daemon's setting of that name"
    )
    add_registry_options(parser)
    parser.set_defaults(json_lines=True)


def run(args: argparse.Namespace) -> int:
    import trio

    from acon.daemon import converse
    from acon.load_report import LoadReport
    from acon.output import progress

    with progress(args) as bars:
        report = LoadReport(args, bars)
        images = trio.run(_read, args, report)
        failed = converse(args, lambda client: _load(args, client, images, report))
    return 1 if failed else 0


async def _read(args: argparse.Namespace, report: LoadReport) -> list[Loaded]:
    from acon.images.documents import host_platform, parse_platform
    from acon.items import ItemOptions, read_items
    from acon.signers import parse_signer

    options = ItemOptions(
        access=registry_access(args),
        platform=parse_platform(args.platform or host_platform()),
        signers=frozenset(parse_signer(text, item="--signed-by") for text in args.signed_by),
        warn=report.warning,
        unsafe_allow_sha256=args.unsafe_allow_sha256,
    )
    return await read_items(args.items, options)


async def _load(
    args: argparse.Namespace, client: Client, images: Sequence[Loaded], report: LoadReport
) -> int:
    """Returns how many layers did not come."""
    from acon.daemon import is_of_this_machine
    from acon.grouping import groups_of
    from acon.loading import as_upload, loaded_images, wanted_layers
    from acon.transfers import Transfers, Way

    lacking = []
    for layer in wanted_layers(images):
        if (await client.layer_state(layer.digest)).state == "verified":
            report.layer(layer.digest, "already there")
        else:
            lacking.append(layer)
    # A daemon elsewhere cannot read files of this machine.
    way = Way(
        access=registry_access(args),
        parallel=args.parallel,
        upload_all=args.upload,
        upload_files=not is_of_this_machine(args),
    )
    transfers = Transfers(client, lacking, way, report)
    await transfers.check()
    wanted = [image.signed for image in images]
    loaded = await loaded_images(client, wanted)
    for group in groups_of(loaded, wanted, together=args.together):
        await client.admit([as_upload(signed) for signed in group])
        report.admitted(group)
    failed = await transfers.bring()
    asked_for = {str(signed.image_id) for signed in wanted}
    for view in await client.images():
        if view.image_id in asked_for and view.missing_layers:
            report.incomplete(view)
    return failed
