"""`acon image publish`: put a signed manifest beside its image in a registry."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from acon.arguments import SubParsers, add_command, add_registry_options, registry_access

if TYPE_CHECKING:
    from acon.images.reference import ImageReference
    from acon.publishing import Bundled, Publication

_DETAILS = """\
Pushes the signed manifest, its signature and certificate as an OCI artifact that
refers to the image, and where in that repository each layer is: `acon load` finds
them there. Every layer that the manifest pins must be in the image, as the same
blob or with the same diff_id. If there is no image with that tag yet, it is made of
the bundle's layers and pushed first. Publishing again changes nothing.

Registries without the referrers API get the tag sha256-HEX, which lists what refers
to the image HEX; copy it with the image: `skopeo copy --all` of both."""


def add_parser(sub: SubParsers) -> None:
    parser = add_command(
        sub,
        "publish",
        summary="push a signed manifest to a registry, beside its image",
        details=_DETAILS,
        example="acon image publish gateway docker://registry.example.org/shop/gateway:1",
        run=run,
    )
    parser.add_argument("directory", metavar="DIR", type=Path)
    parser.add_argument("image", metavar="IMAGE", help="docker://HOST/NAME[:TAG|@DIGEST]")
    parser.add_argument(
        "--platform",
        metavar="OS/ARCH",
        help="of an image for several, or of one that is made (default: this machine's)",
    )
    parser.add_argument(
        "--unsafe-allow-sha256", action="store_true", help="as the daemon's setting of that name"
    )
    add_registry_options(parser)


def run(args: argparse.Namespace) -> int:
    from acon.bundle import Bundle
    from acon.errors import UsageError
    from acon.images.reference import parse_reference
    from acon.output import result
    from acon.publishing import Bundled

    reference = parse_reference(args.image)
    if reference.transport != "docker":
        raise UsageError(
            "IMAGE",
            "manifests are published in registries",
            expected="docker://HOST/NAME[:TAG|@DIGEST]",
            actual=args.image,
        )
    bundle = Bundle(args.directory)
    signed = bundle.signed(unsafe_allow_sha256=args.unsafe_allow_sha256)
    done = _publish(args, reference, Bundled(signed=signed, sources=bundle.sources()))
    registry, repository = reference.remote
    place = f"docker://{registry}/{repository}"
    listed = "by the registry" if done.fallback_tag is None else f"in the tag {done.fallback_tag}"
    result(
        args,
        {
            "image_id": str(signed.image_id),
            "image": f"{place}@{done.image}",
            "pushed_image": done.pushed_image,
            "artifact": f"{place}@{done.artifact}",
            "fallback_tag": done.fallback_tag,
            "sent_bytes": done.sent_bytes,
        },
        f"published: {signed.image_id}\n"
        f"  image     {place}@{done.image}{' (pushed)' if done.pushed_image else ''}\n"
        f"  artifact  {place}@{done.artifact}, listed {listed}",
    )
    return 0


def _publish(args: argparse.Namespace, reference: ImageReference, bundled: Bundled) -> Publication:
    import trio

    from acon.images.documents import host_platform, parse_platform
    from acon.output import progress
    from acon.publishing import publisher

    with progress(args) as bars:

        async def publish() -> Publication:
            async with publisher(reference, registry_access(args), bars) as one:
                return await one.publish(
                    bundled,
                    tag=reference.tag,
                    digest=reference.digest,
                    platform_name=args.platform,
                    new_platform=parse_platform(args.platform or host_platform()),
                )

        return trio.run(publish)
