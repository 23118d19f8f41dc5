"""`acon seal`: no image can be admitted after it."""

from __future__ import annotations

import argparse

from acon.arguments import SubParsers, add_command


def add_parser(sub: SubParsers) -> None:
    add_command(
        sub,
        "seal",
        summary="end loading for good, in the log for every verifier to see",
        example="acon seal",
        run=run,
        daemon=True,
    )


def run(args: argparse.Namespace) -> int:
    from acon.daemon import converse
    from acon.output import result

    converse(args, lambda client: client.seal())
    result(args, {"sealed": True}, "sealed: no image can be admitted any more")
    return 0
