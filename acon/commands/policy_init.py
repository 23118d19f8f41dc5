"""`acon policy init`: a policy that accepts just what one evidence file shows."""

from __future__ import annotations

import argparse
from pathlib import Path

from acon.arguments import SubParsers, add_command

_DETAILS = """\
The evidence is taken at its word: read the policy and compare every value with what
you know from elsewhere before you rely on it."""


def add_parser(sub: SubParsers) -> None:
    parser = add_command(
        sub,
        "init",
        summary="write a policy from an evidence file, to be read and edited",
        details=_DETAILS,
        example="acon policy init evidence.json -o policy.toml",
        run=run,
    )
    parser.add_argument("file", metavar="EVIDENCE", type=Path)
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, required=True)
    parser.add_argument(
        "--collateral", metavar="FILE", type=Path, help="expect the TCB evaluation of this one"
    )
    parser.add_argument(
        "--follow-vendors",
        action="store_true",
        help="expect images that lend layers by signer, name and least version, not by id",
    )


def run(args: argparse.Namespace) -> int:
    from acon.files import read_bounded, write_whole
    from acon.output import result
    from supervisor.formats.evidence import MAX_EVIDENCE_BYTES
    from verifier import policy_from_evidence

    collateral = args.collateral and read_bounded(args.collateral, max_bytes=16 * 1024 * 1024)
    text = policy_from_evidence(
        read_bounded(args.file, max_bytes=MAX_EVIDENCE_BYTES),
        collateral=collateral.decode("utf-8", "replace") if collateral else None,
        follow_vendors=args.follow_vendors,
    )
    write_whole(args.output, text.encode())
    result(
        args,
        {"file": str(args.output)},
        f"{args.output}: accepts just what this evidence shows; read it before you rely on it",
    )
    return 0
