"""`acon image convert`: an OCI image becomes a manifest to be signed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from acon.arguments import SubParsers, add_command, non_negative

if TYPE_CHECKING:
    from acon.bundle import JsonObject
    from acon.oci_layout import OciImage

_DETAILS = """\
Reads the image of an OCI layout folder, checks and hashes every layer (manifests
name layers by the SHA-384 of the uncompressed tar, OCI by SHA-256), and writes
manifest.json, which holds exactly the bytes to sign, and sources.json, which says
where the layers' bytes are and is trusted for nothing.

RULE of --accept is HASH/SIGNER/NAME, where NAME is a manifest digest, an alias
NAME:SVN or *, or a certificate file: cert.der (all that this signer signs) or
cert.der:NAME:SVN. RULE of --env is NAME=VALUE (may be that), NAME= (may be unset)
or NAME (anything); rules for a name replace those that the OCI image has for it."""


def add_parser(sub: SubParsers) -> None:
    parser = add_command(
        sub,
        "convert",
        summary="make manifest.json and sources.json of an OCI image",
        details=_DETAILS,
        example="acon image convert oci:layouts/gateway:1 -o gateway --name gateway:1 "
        "--accept owner.der --reject-unaccepted",
        run=run,
    )
    parser.add_argument("source", metavar="SOURCE", help="oci:LAYOUTFOLDER[:TAG]")
    parser.add_argument("-o", "--output", metavar="DIR", required=True, type=Path)
    parser.add_argument(
        "--accept",
        "--signer-accepts",
        metavar="RULE",
        action="append",
        default=[],
        help="an image that may share the TD with this one (repeat)",
    )
    parser.add_argument(
        "--reject-unaccepted",
        action="store_true",
        help="refuse to share the TD with an image that is not accepted",
    )
    parser.add_argument(
        "--name",
        metavar="NAME:SVN",
        action="append",
        default=[],
        help="a name of this image for others' rules (repeat)",
    )
    parser.add_argument("--env", metavar="RULE", action="append", default=[])
    parser.add_argument(
        "--signal",
        metavar="N",
        action="append",
        default=[],
        type=int,
        help="a signal that the operator may send; negative: to the process group (repeat)",
    )
    parser.add_argument(
        "--log-fd",
        metavar="N",
        action="append",
        default=[],
        type=non_negative,
        help="a descriptor whose output the operator may read (repeat)",
    )
    parser.add_argument("--max-instances", metavar="N", type=non_negative, default=1)
    parser.add_argument("--writable", action="store_true", help="a root that can be written")
    parser.add_argument(
        "--uid", metavar="N", action="append", default=[], type=int, help="a further uid (repeat)"
    )
    parser.add_argument("--workdir", metavar="DIR", help="default: that of the OCI image, or /")
    parser.add_argument(
        "--platform", metavar="OS/ARCH", help="of an image for several (default: this machine's)"
    )


def run(args: argparse.Namespace) -> int:
    from acon.bundle import Bundle
    from acon.oci_layers import hash_oci_layers
    from acon.oci_layout import host_platform, open_image
    from acon.output import progress, remark, result
    from supervisor.formats.digest import digest_of

    image = open_image(args.source, platform_name=args.platform or host_platform())
    bundle = Bundle(args.output)
    with progress(args) as bars:
        sources = hash_oci_layers(image, bundle.directory, bars)
    manifest = _manifest(args, image, [reference for reference, _ in sources])
    raw = bundle.write_manifest(manifest)
    bundle.write_sources(dict(sources))
    dropped = bundle.drop_signature()
    notes = _notes(image, manifest)
    if dropped:
        notes.append("the signature that was here was of other bytes and is gone")
    digest = digest_of("sha384", raw)
    if not args.json:
        for note in notes:
            remark(f"note: {note}")
    result(
        args,
        {
            "directory": str(bundle.directory),
            "manifest_digest_sha384": digest.hex,
            "layers": [reference for reference, _ in sources],
            "notes": notes,
        },
        f"{bundle.manifest_file}: {len(sources)} layer{'' if len(sources) == 1 else 's'}, "
        f"sha384 {digest.hex}; sign it with "
        f"`acon image sign {bundle.directory} --key KEY --cert CERTIFICATE`",
    )
    return 0


def _manifest(args: argparse.Namespace, image: OciImage, layers: list[str]) -> JsonObject:
    from acon.signers import expand_signer

    process = image.process
    return {
        "aconSpecVersion": [1, 0],
        "layers": layers,
        "aliases": {"self": {".": args.name}} if args.name else {},
        "entrypoint": [*(process.entrypoint or ()), *(process.cmd or ())],
        "env": _environment(list(process.env or ()), args.env),
        "workingDir": args.workdir or process.working_dir or "/",
        "uids": args.uid,
        "logFDs": args.log_fd,
        "writableFS": args.writable,
        "noRestart": False,
        "signals": args.signal,
        "maxInstances": args.max_instances,
        "policy": {
            "accepts": [
                expand_signer(rule, item="--accept", default_rest="*") for rule in args.accept
            ],
            "rejectUnaccepted": args.reject_unaccepted,
        },
    }


def _environment(of_image: list[str], rules: list[str]) -> list[str]:
    """The OCI image's values, pinned, but for the names that have rules of their own."""
    ruled = {rule.partition("=")[0] for rule in rules}
    return [one for one in of_image if one.partition("=")[0] not in ruled] + rules


def _notes(image: OciImage, manifest: JsonObject) -> list[str]:
    """What the OCI image says and a manifest cannot."""
    notes: list[str] = []
    process = image.process
    if not manifest["entrypoint"]:
        notes.append("no entry point: the image can lend layers, and never run")
    if process.user not in (None, "", "0", "root", "0:0", "root:root"):
        notes.append(
            f"the OCI user {process.user!r} is not kept: entry points run as uid 0 of a user "
            "namespace of their own; --uid maps further ids"
        )
    if process.volumes:
        notes.append(
            f"volumes are not kept ({', '.join(sorted(process.volumes))}): /tmp and /run can be "
            "written, everything else only with --writable"
        )
    return notes
