"""`acon load`: bring signed images and their layers into a TD."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from acon.arguments import SubParsers, add_command

if TYPE_CHECKING:
    from collections.abc import Callable

    from acon.client import Client
    from acon.loading import Loaded, LocalLayer
    from acon.output import Progress
    from supervisor.formats.digest import Digest
    from supervisor.formats.signature import SignedManifest
    from supervisor.operations import ImageView

_DETAILS = """\
First everything is checked here: signatures, the bytes of every layer that the
daemon lacks, and that there is an order of groups in which the images accept each
other and those that are loaded. Only then images are admitted and layers sent.
Images that delegate layers need the vendor's: give its folder along.

With --json, one JSON object per line as things happen."""


def add_parser(sub: SubParsers) -> None:
    parser = add_command(
        sub,
        "load",
        summary="admit images and send their layers",
        details=_DETAILS,
        example="acon load python-2 gateway intake features model audit",
        run=run,
        daemon=True,
    )
    parser.add_argument("directories", metavar="DIR", nargs="+", type=Path)
    parser.add_argument(
        "--together",
        action="store_true",
        help="one group, in the order given (default: the smallest groups that can be admitted)",
    )
    parser.add_argument(
        "--unsafe-allow-sha256", action="store_true", help="as the daemon's setting of that name"
    )


def run(args: argparse.Namespace) -> int:
    from acon.daemon import converse
    from acon.loading import read_bundles
    from acon.output import progress

    images = read_bundles(args.directories, unsafe_allow_sha256=args.unsafe_allow_sha256)
    with progress(args) as bars:
        views = converse(args, lambda client: _load(args, client, images, bars))
    for view in views:
        if view.missing_layers:
            _tell(
                args,
                {"event": "incomplete", "image_id": view.image_id, "missing": view.missing_layers},
                f"cannot start yet: {view.image_id} lacks {', '.join(view.missing_layers)}"
                + _vendor_hint(view),
            )
    return 0


def _vendor_hint(view: ImageView) -> str:
    """What to do about a layer that was left to somebody whose image is not here."""
    left = any(missing.startswith("signer/") for missing in view.missing_layers)
    return "; before the seal, load the vendor's image that gives this name" if left else ""


async def _load(
    args: argparse.Namespace, client: Client, images: list[Loaded], bars: Progress
) -> list[ImageView]:
    """Returns what the daemon then says of the images that were asked for."""
    from acon.grouping import groups_of
    from acon.loading import (
        as_upload,
        check_layer,
        digests_of,
        find_source,
        loaded_images,
    )

    lacking: list[LocalLayer] = []
    for digest, _named_by in digests_of(images):
        if (await client.layer_state(digest)).state == "verified":
            _tell_layer(args, digest, "already there")
            continue
        source, path = find_source(images, digest)
        lacking.append(check_layer(source, path, digest, bars))
    loaded = await loaded_images(client, images)
    wanted = [image.signed for image in images]
    for group in groups_of(loaded, wanted, together=args.together):
        await client.admit([as_upload(signed) for signed in group])
        _tell(args, {"event": "admitted", "image_ids": _ids(group)}, _admitted(group))
    for layer in lacking:
        bars.begin(f"upload {layer.digest.hex[:12]}", layer.size_bytes)
        await client.upload_layer(layer.digest, layer, progress=_advancing(bars))
        _tell_layer(args, layer.digest, "verified")
    asked_for = {str(image.signed.image_id) for image in images}
    return [view for view in await client.images() if view.image_id in asked_for]


def _advancing(bars: Progress) -> Callable[[int, int], None]:
    """Bars count steps; the client tells totals."""
    before = 0

    def report(sent: int, _total: int) -> None:
        nonlocal before
        bars.advance(sent - before)
        before = sent

    return report


def _ids(group: tuple[SignedManifest, ...]) -> list[str]:
    return [str(signed.image_id) for signed in group]


def _admitted(group: tuple[SignedManifest, ...]) -> str:
    lines = ["admitted" if len(group) == 1 else f"admitted together, {len(group)} images"]
    for signed in group:
        names = ", ".join(signed.manifest.self_aliases)
        lines.append(f"  {signed.image_id}  {names}".rstrip())
    return "\n".join(lines)


def _tell_layer(args: argparse.Namespace, digest: Digest, state: str) -> None:
    _tell(
        args, {"event": "layer", "digest": str(digest), "state": state}, f"layer {digest}: {state}"
    )


def _tell(args: argparse.Namespace, event: object, text: str) -> None:
    from acon.output import say, write_json

    if args.json:
        write_json(event, lines=True)
    else:
        say(text)
