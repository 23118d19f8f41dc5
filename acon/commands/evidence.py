"""`acon evidence`: ask a TD to prove what runs in it."""

from __future__ import annotations

import argparse
from pathlib import Path

from acon.arguments import SubParsers, add_command


def add_parser(sub: SubParsers) -> None:
    parser = add_command(
        sub,
        "evidence",
        summary="get evidence for a nonce of your own",
        details="The nonce, 16 to 64 bytes in hex, must be fresh and nobody else's choice; it is "
        "what\nmakes this evidence an answer to you. Verify the file with `acon verify`.",
        example="acon evidence --nonce $(openssl rand -hex 32) -o evidence.json",
        run=run,
        daemon=True,
    )
    parser.add_argument("--nonce", metavar="HEX", required=True)
    parser.add_argument("-o", "--output", metavar="FILE", required=True, type=Path)


def run(args: argparse.Namespace) -> int:
    from acon.daemon import converse
    from acon.files import write_whole
    from acon.nonces import parse_nonce
    from acon.output import result

    nonce = parse_nonce(args.nonce)
    raw = converse(args, lambda client: client.evidence(nonce))
    write_whole(args.output, raw)
    result(
        args,
        {"file": str(args.output), "size_bytes": len(raw), "nonce": nonce.hex()},
        f"{args.output}: {len(raw)} bytes, not verified yet",
    )
    return 0
