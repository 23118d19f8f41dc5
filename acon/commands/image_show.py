"""`acon image show`: what a manifest says, in words."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from acon.arguments import SubParsers, add_command

if TYPE_CHECKING:
    from acon.bundle import Bundle
    from supervisor.formats.manifest import Manifest


def add_parser(sub: SubParsers) -> None:
    parser = add_command(
        sub,
        "show",
        summary="show what a manifest says and whether its signature is right",
        example="acon image show gateway",
        run=run,
    )
    parser.add_argument("directory", metavar="DIR", type=Path)
    parser.add_argument(
        "--unsafe-allow-sha256",
        action="store_true",
        help="read images whose certificates are signed with SHA-256",
    )


def run(args: argparse.Namespace) -> int:
    from acon.bundle import Bundle
    from acon.output import result
    from supervisor.formats.manifest import parse_manifest, to_json_object

    bundle = Bundle(args.directory)
    raw = bundle.manifest_bytes()
    manifest = parse_manifest(raw, unsafe_allow_sha256=args.unsafe_allow_sha256)
    image_id, verdict, passed = _signature(bundle, unsafe_allow_sha256=args.unsafe_allow_sha256)
    facts = {
        "directory": str(bundle.directory),
        "image_id": image_id,
        "signature": verdict,
        "manifest": to_json_object(manifest),
    }
    result(args, facts, "\n".join(_lines(bundle, manifest, image_id, verdict)))
    return 0 if passed else 1


def _signature(bundle: Bundle, *, unsafe_allow_sha256: bool) -> tuple[str | None, str, bool]:
    """Image id if signed, words about the signature, whether nothing is wrong with it."""
    from supervisor.formats.errors import Untrusted

    if not bundle.is_signed:
        return None, "not signed", True
    try:
        signed = bundle.signed(unsafe_allow_sha256=unsafe_allow_sha256)
    except Untrusted as error:
        return None, f"WRONG: {error}", False
    return str(signed.image_id), "right", True


def _lines(bundle: Bundle, manifest: Manifest, image_id: str | None, verdict: str) -> list[str]:
    from supervisor.formats.references import DelegatedReference

    def listed(values: tuple[object, ...]) -> str:
        return ", ".join(map(str, values)) or "none"

    sources = bundle.sources()
    lines = [
        f"image       {image_id or '(no id before it is signed)'}",
        f"signature   {verdict}",
        f"names       {listed(manifest.self_aliases)}",
        f"runs        {' '.join(manifest.entrypoint) or 'never: it has no entry point'}",
    ]
    for number, reference in enumerate(manifest.layers):
        if isinstance(reference, DelegatedReference):
            lines.append(f"layer {number}     {reference.alias}, left to {reference.signer}")
        else:
            where = "" if str(reference) in sources else "  (sources.json does not say where it is)"
            lines.append(f"layer {number}     {reference}{where}")
    for target, aliases in manifest.content_aliases:
        lines.append(f"lends       {listed(aliases)} = {target}")
    if not manifest.is_executable:
        return lines
    policy = manifest.policy
    lines += [
        *(f"env         {rule}" for rule in manifest.env),
        f"directory   {manifest.working_dir}",
        f"root        {'can be written' if manifest.writable_fs else 'read-only'}",
        f"uids        {listed((0, *manifest.uids))}",
        f"log fds     {listed(manifest.log_fds)}",
        f"signals     {listed(manifest.signals)}",
        f"instances   {manifest.max_instances or 'any number'}",
        *(f"accepts     {rule}" for rule in policy.accepts),
        "others      "
        + ("rejected unless accepted" if policy.reject_unaccepted else "not rejected"),
    ]
    return lines
