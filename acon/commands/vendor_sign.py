"""`acon vendor sign`: as `acon image sign`, and sure that what is signed can never run."""

from __future__ import annotations

import argparse

from acon.arguments import SubParsers, add_command
from acon.commands import image_sign


def add_parser(sub: SubParsers) -> None:
    parser = add_command(
        sub,
        "sign",
        summary="sign a layer's names with the vendor's key",
        details="As `acon image sign`; refuses an image that could run.",
        example="acon vendor sign python-3 --key csp.key --cert csp.pem",
        run=run,
    )
    image_sign.add_options(parser)


def run(args: argparse.Namespace) -> int:
    from acon.bundle import Bundle
    from acon.errors import UsageError
    from supervisor.formats.manifest import parse_manifest

    bundle = Bundle(args.directory)
    manifest = parse_manifest(bundle.manifest_bytes())
    if manifest.is_executable or not manifest.content_aliases:
        raise UsageError(
            str(args.directory),
            "a vendor signs images that only give names to layers",
            expected="aliases.contents, and no entry point",
            actual="an entry point" if manifest.is_executable else "no aliases.contents",
        )
    return image_sign.sign(args, bundle)
