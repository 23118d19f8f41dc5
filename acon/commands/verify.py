"""`acon verify`: judge evidence on the relying party's own machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from acon.arguments import SubParsers, add_command

_DETAILS = """\
Needs no network: collateral (Intel's word on the platform, as JSON of
QuoteCollateralV3) is a file, and without it no verdict passes. Everything is judged
at this machine's time, or at --at. The policy says what is expected; `acon policy
init` writes one from an evidence file, to be read and edited.

When a container shows evidence for a key of its own, --expect-key must be the
SHA-384 of the public key (SPKI, DER) that the connection uses."""


def add_parser(sub: SubParsers) -> None:
    parser = add_command(
        sub,
        "verify",
        summary="judge an evidence file",
        details=_DETAILS,
        example="acon verify evidence.json --nonce HEX --policy policy.toml "
        "--collateral collateral.json",
        run=run,
    )
    parser.add_argument("file", metavar="FILE", type=Path)
    parser.add_argument("--nonce", metavar="HEX", required=True, help="the one you asked with")
    parser.add_argument(
        "--policy",
        metavar="FILE",
        type=Path,
        required=True,
        help="what is expected, TOML (`acon policy init` writes one)",
    )
    parser.add_argument(
        "--collateral",
        metavar="FILE",
        type=Path,
        help="what the platform's maker says; without it no verdict passes",
    )
    parser.add_argument("--at", metavar="RFC3339", help="judge at this time (default: now)")
    parser.add_argument(
        "--trust-simulated-root",
        metavar="PEM",
        type=Path,
        help="believe this root instead of Intel's: for a software TD, which proves nothing",
    )
    parser.add_argument("--expect-key", metavar="SHA384", help="of the asking container, in hex")
    parser.add_argument("--expect-image", metavar="IMAGE_ID", help="of the asking container")
    parser.add_argument(
        "--expect-user-data", metavar="FILE", type=Path, help="what the container added"
    )
    parser.add_argument(
        "--details", action="store_true", help="unfold every check and write digests in full"
    )


def run(args: argparse.Namespace) -> int:
    import re
    import shutil
    import sys
    from datetime import UTC, datetime

    from acon.errors import UsageError
    from acon.files import read_bounded
    from acon.nonces import parse_nonce
    from acon.output import remark
    from acon.times import parse_rfc3339
    from supervisor.formats.evidence import MAX_EVIDENCE_BYTES
    from verifier import parse_policy, render_json, render_text, verify

    limit = 16 * 1024 * 1024

    def optional(path: Path | None) -> bytes | None:
        return None if path is None else read_bounded(path, max_bytes=limit)

    if args.expect_key is not None and not re.fullmatch("[0-9a-f]{96}", args.expect_key):
        raise UsageError(
            "--expect-key",
            "must be a SHA-384 in lower-case hex",
            expected="96 hex digits",
            actual=args.expect_key[:160],
        )
    collateral = optional(args.collateral)
    policy = parse_policy(read_bounded(args.policy, max_bytes=limit))
    if policy.trust.root == "simulated" and args.trust_simulated_root is None:
        remark(
            "note: the policy expects the simulation's root, which only you can trust: "
            "--trust-simulated-root PEM"
        )
    verdict = verify(
        read_bounded(args.file, max_bytes=MAX_EVIDENCE_BYTES),
        policy,
        nonce=parse_nonce(args.nonce),
        collateral=None if collateral is None else collateral.decode("utf-8", "replace"),
        at=datetime.now(UTC) if args.at is None else parse_rfc3339(args.at, item="--at"),
        trusted_root_pem=optional(args.trust_simulated_root),
        expected_container_key_sha384=args.expect_key,
        expected_user_data=optional(args.expect_user_data),
        expected_container_image_id=args.expect_image,
    )
    # Both renderings escape what the evidence says: a stranger wrote it.
    sys.stdout.write(
        render_json(verdict)
        if args.json
        else render_text(
            verdict,
            width=shutil.get_terminal_size().columns,
            colour=sys.stdout.isatty(),
            details=args.details,
        )
    )
    return 0 if verdict.ok else 1
