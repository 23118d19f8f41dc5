"""`acon image delegate`: leave a layer to another signer, by name and least version."""

from __future__ import annotations

import argparse
from pathlib import Path

from acon.arguments import SubParsers, add_command, non_negative

_DETAILS = """\
The manifest then names the signer and an alias instead of the layer's digest: the
TD uses the layer that this signer gave the alias, and so a later one that lists it
too. Whoever reads the evidence sees it. Layers are counted from 0, the lowest, as
`acon image show` lists them. A signature that is there is dropped: sign again."""


def add_parser(sub: SubParsers) -> None:
    parser = add_command(
        sub,
        "delegate",
        summary="leave a layer to another signer's choice",
        details=_DETAILS,
        example="acon image delegate gateway --layer 1 --to csp.der:python:2",
        run=run,
    )
    parser.add_argument("directory", metavar="DIR", type=Path)
    parser.add_argument("--layer", metavar="N", type=non_negative, required=True)
    parser.add_argument(
        "--to",
        metavar="SIGNER/ALIAS",
        required=True,
        help="HASH/SIGNER/ALIAS, or CERTIFICATE_FILE:ALIAS",
    )


def run(args: argparse.Namespace) -> int:
    from acon.bundle import Bundle
    from acon.errors import UsageError
    from acon.output import remark, result
    from acon.signers import expand_signer
    from supervisor.formats.references import DelegatedReference, parse_layer_reference

    bundle = Bundle(args.directory)
    manifest = bundle.manifest_object()
    layers = manifest.get("layers")
    if not isinstance(layers, list) or args.layer >= len(layers):
        count = len(layers) if isinstance(layers, list) else 0
        raise UsageError(
            "--layer",
            "must be one of the image's layers, counted from 0",
            expected=f"0 to {count - 1}" if count else "an image with layers",
            actual=args.layer,
        )
    target = expand_signer(args.to.removeprefix("signer/"), item="--to")
    reference = parse_layer_reference(f"signer/{target}", item="--to")
    if not isinstance(reference, DelegatedReference):
        raise UsageError("--to", "must name a signer and an alias", actual=args.to)
    before = str(layers[args.layer])
    layers[args.layer] = str(reference)
    bundle.write_manifest(manifest)
    dropped = bundle.drop_signature()
    still_named = set(map(str, layers))
    bundle.write_sources(
        {name: one for name, one in bundle.sources().items() if name in still_named}
    )
    if dropped and not args.json:
        remark("note: the signature that was here was of other bytes and is gone; sign again")
    result(
        args,
        {
            "layer": args.layer,
            "before": before,
            "reference": str(reference),
            "signature_dropped": dropped,
        },
        f"layer {args.layer}: {before}\n      now {reference}",
    )
    return 0
