"""`acon image sign`: sign manifest.json, or take a signature that was made elsewhere."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from acon.arguments import SubParsers, add_command

if TYPE_CHECKING:
    from acon.bundle import Bundle

_DETAILS = """\
Signs with --key (PEM or DER; ECDSA P-256, P-384, P-521, Ed25519, RSA from 3072
bits) and writes `signature` and `cert.der`. The hash is the one that the
certificate itself was signed with, and must be SHA-384 or SHA-512.

With a key that cannot leave its HSM, sign the file manifest.json as it is, with
the certificate's hash (ECDSA in DER form), and give the result as --signature."""


def add_parser(sub: SubParsers) -> None:
    parser = add_command(
        sub,
        "sign",
        summary="sign a manifest with the owner's key",
        details=_DETAILS,
        example="acon image sign gateway --key owner.key --cert owner.pem",
        run=run,
    )
    add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """`acon vendor sign` takes the same."""
    parser.add_argument("directory", metavar="DIR", type=Path)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--key", metavar="FILE", type=Path, help="private key, PEM or DER")
    how.add_argument("--signature", metavar="FILE", type=Path, help="one made elsewhere (HSM)")
    parser.add_argument(
        "--cert", metavar="FILE", type=Path, required=True, help="certificate, PEM or DER"
    )


def run(args: argparse.Namespace) -> int:
    from acon.bundle import Bundle

    return sign(args, Bundle(args.directory))


def sign(args: argparse.Namespace, bundle: Bundle) -> int:
    """Sign `bundle` as `args` says; the signature is verified before it is written."""
    from acon.files import read_bounded, write_whole
    from acon.keys import load_certificate_der, load_private_key, require_pair
    from acon.output import remark, result
    from supervisor.formats import canonical_json
    from supervisor.formats.signature import (
        matching_form,
        sign_manifest,
        verify_signed_manifest,
    )

    certificate_der = load_certificate_der(args.cert)
    as_found = bundle.manifest_bytes()
    if args.signature is not None:
        signature = read_bounded(args.signature, max_bytes=64 * 1024)
        form, raw = matching_form(as_found, signature, certificate_der)
    else:
        private_key = load_private_key(args.key)
        require_pair(private_key, certificate_der, item=str(args.key))
        form, raw = "go", canonical_json.encode_go(bundle.manifest_object())
        signature = sign_manifest(raw, private_key, certificate_der)
    signed = verify_signed_manifest(raw, signature, certificate_der)
    if raw != as_found:
        write_whole(bundle.manifest_file, raw)
        if not args.json:
            remark(f"note: manifest.json was brought into the form that is signed ({form})")
    bundle.write_signature(signature, certificate_der)
    result(
        args,
        {
            "directory": str(bundle.directory),
            "image_id": str(signed.image_id),
            "signer": str(signed.signer),
            "form": form,
        },
        f"signed: {signed.image_id}",
    )
    return 0
