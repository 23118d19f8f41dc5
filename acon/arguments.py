"""What all subcommands share in how they are declared."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeAlias

SubParsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Run: TypeAlias = Callable[[argparse.Namespace], int]


def add_command(
    sub: SubParsers,
    name: str,
    *,
    summary: str,
    example: str,
    run: Run,
    details: str = "",
    daemon: bool = False,
) -> argparse.ArgumentParser:
    """Declare a subcommand with `--json`, an example in its help and, if `daemon`, a socket."""
    parser = sub.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.\n\n{details}".rstrip(),
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")
    if daemon:
        where = parser.add_mutually_exclusive_group()
        where.add_argument(
            "--socket",
            metavar="PATH",
            help="Unix socket of the daemon (or ACON_SOCKET; default: the one of this machine)",
        )
        where.add_argument(
            "--url",
            metavar="URL",
            help="https://HOST:PORT of a daemon that config opened on TCP (or ACON_URL)",
        )
        parser.add_argument(
            "--ca-file",
            metavar="FILE",
            help="PEM roots to believe for --url, instead of the system's",
        )
    parser.set_defaults(run=run)
    return parser


def add_group(sub: SubParsers, name: str, *, summary: str) -> SubParsers:
    """Declare a command that has subcommands of its own."""
    parser = sub.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", allow_abbrev=False
    )
    return parser.add_subparsers(title="commands", metavar="COMMAND", required=True)


def non_negative(text: str) -> int:
    """An argparse type: 0, 1, 2, ..."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return value
