"""`acon image convert`: an OCI image becomes a manifest to be signed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from acon.arguments import (
    SubParsers,
    add_command,
    add_registry_options,
    non_negative,
    registry_access,
)
from acon.signals import parse_signal

if TYPE_CHECKING:
    from acon.bundle import JsonObject
    from acon.images.image import OciImage
    from acon.images.reference import ImageReference
    from supervisor.seams import LayerSource

_DETAILS = """\
Checks and hashes every layer of the image (manifests name layers by the SHA-384 of
the uncompressed tar, OCI by SHA-256), and writes manifest.json, which holds exactly
the bytes to sign, and sources.json, which says where the layers' bytes are and is
trusted for nothing.

SOURCE is one of
  oci:DIR[:TAG]                      a folder in OCI layout
  oci-archive:FILE[:TAG]             a tar of one, as `podman save` or `skopeo copy` make it
  docker-archive:FILE[:NAME:TAG]     as `docker save` makes it
  docker://HOST/NAME[:TAG|@DIGEST]   a registry's; without HOST docker.io
  acon-repo:DIR[:HASH/SIGNER/MANIFEST]  ACON's own repository: signed already, taken as it is

RULE of --accept is HASH/SIGNER/NAME, where NAME is a manifest digest, an alias
NAME:SVN or *, or a certificate file: cert.der (all that this signer signs) or
cert.der:NAME:SVN. RULE of --env is NAME=VALUE (may be that), NAME= (may be unset)
or NAME (anything); rules for a name replace those that the OCI image has for it."""
_ONE_INSTANCE = 1
_EXAMPLES = """\
acon image convert oci:layouts/gateway:1 -o gateway --name gateway:1 \
--accept owner.der --reject-unaccepted
acon image convert docker://registry.example.org/team/gateway:1 -o gateway
acon image convert docker-archive:gateway.tar -o gateway"""
# What shapes a manifest; of one that is signed already nothing can be changed.
_SHAPING = {
    "accept": "--accept",
    "reject_unaccepted": "--reject-unaccepted",
    "name": "--name",
    "env": "--env",
    "signal": "--signal",
    "log_fd": "--log-fd",
    "max_instances": "--max-instances",
    "writable": "--writable",
    "uid": "--uid",
    "workdir": "--workdir",
    "platform": "--platform",
}


def add_parser(sub: SubParsers) -> None:
    parser = add_command(
        sub,
        "convert",
        summary="make manifest.json and sources.json of an image",
        details=_DETAILS,
        example=_EXAMPLES,
        run=run,
    )
    parser.add_argument("source", metavar="SOURCE", help="an image, as above")
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
        type=parse_signal,
        help="a signal that the operator may send, as 15 or TERM; negative: to the process"
        " group (repeat)",
    )
    parser.add_argument(
        "--log-fd",
        metavar="N",
        action="append",
        default=[],
        type=non_negative,
        help="a descriptor whose output the operator may read (repeat)",
    )
    parser.add_argument("--max-instances", metavar="N", type=non_negative, default=_ONE_INSTANCE)
    parser.add_argument("--writable", action="store_true", help="a root that can be written")
    parser.add_argument(
        "--uid", metavar="N", action="append", default=[], type=int, help="a further uid (repeat)"
    )
    parser.add_argument("--workdir", metavar="DIR", help="default: that of the OCI image, or /")
    parser.add_argument(
        "--platform",
        metavar="OS/ARCH[/VARIANT]",
        help="of an image for several (default: this machine's)",
    )
    add_registry_options(parser)


def run(args: argparse.Namespace) -> int:
    from acon.bundle import Bundle
    from acon.images.reference import parse_reference
    from acon.output import remark, result
    from supervisor.formats.digest import digest_of

    reference = parse_reference(args.source)
    if reference.transport == "acon-repo":
        return _take_signed(args, reference)
    image, sources = _read(args, reference)
    bundle = Bundle(args.output)
    manifest = _manifest(args, image, [layer for layer, _ in sources])
    raw = bundle.write_manifest(manifest)
    bundle.write_sources(dict(sources))
    dropped = bundle.drop_signature()
    notes = _notes(args, image, manifest)
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
            "source": str(reference),
            "source_digest": image.manifest.digest,
            "manifest_digest_sha384": digest.hex,
            "layers": [layer for layer, _ in sources],
            "notes": notes,
        },
        f"{bundle.manifest_file}: {len(sources)} layer{'' if len(sources) == 1 else 's'}, "
        f"sha384 {digest.hex}; sign it with "
        f"`acon image sign {bundle.directory} --key KEY --cert CERTIFICATE`",
    )
    return 0


def _read(
    args: argparse.Namespace, reference: ImageReference
) -> tuple[OciImage, list[tuple[str, LayerSource]]]:
    """The image, and digest and source of each of its layers, lowest first."""
    import trio

    from acon.images.image import open_image
    from acon.images.layers import hash_layers
    from acon.output import progress

    access = registry_access(args)
    with progress(args) as bars:

        async def read() -> tuple[OciImage, list[tuple[str, LayerSource]]]:
            image = await open_image(reference, platform_name=args.platform, access=access)
            return image, await hash_layers(image.layers, access, bars)

        return trio.run(read)


def _take_signed(args: argparse.Namespace, reference: ImageReference) -> int:
    """An image of ACON's repository becomes a bundle; its owner signed it already."""
    from acon.bundle import Bundle
    from acon.errors import UsageError
    from acon.images.acon_repository import AconRepository
    from acon.output import remark, result
    from supervisor.formats.digest import Digest

    given = [option for name, option in _SHAPING.items() if getattr(args, name)]
    if args.max_instances == _ONE_INSTANCE:
        given.remove("--max-instances")
    if given:
        raise UsageError(
            str(reference),
            "the image is signed: only its owner can change it, by signing another",
            expected="no options that shape a manifest",
            actual=", ".join(given),
        )
    image = AconRepository(reference.place).image(reference.tag)
    bundle = Bundle(args.output)
    bundle.write_signed(image.signed)
    bundle.write_sources(image.layer_files)
    lacking = [
        str(layer)
        for layer in image.signed.manifest.layers
        if isinstance(layer, Digest) and str(layer) not in image.layer_files
    ]
    notes = [f"the repository does not hold the layer {layer}" for layer in lacking]
    if not args.json:
        for note in notes:
            remark(f"note: {note}")
    result(
        args,
        {
            "directory": str(bundle.directory),
            "source": str(reference),
            "image_id": str(image.signed.image_id),
            "layers": [str(layer) for layer in image.signed.manifest.layers],
            "notes": notes,
        },
        f"{bundle.manifest_file}: signed by {image.signed.signer}; load it with "
        f"`acon load {bundle.directory}`",
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


def _notes(args: argparse.Namespace, image: OciImage, manifest: JsonObject) -> list[str]:
    """What the OCI image says and a manifest cannot."""
    from acon.images.documents import host_platform, parse_platform

    notes: list[str] = []
    process = image.process
    here = parse_platform(args.platform or host_platform())
    if image.platform.is_known and not image.platform.runs_on(here):
        notes.append(f"the image is for {image.platform}, this machine is {here}")
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
