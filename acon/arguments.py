"""What all subcommands share in how they are declared."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn, TypeAlias

Run: TypeAlias = Callable[[argparse.Namespace], int]


class Parser(argparse.ArgumentParser):
    """One that can be told with which code it ends when it is used wrongly."""

    usage_code = 2

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(self.usage_code, f"{self.prog}: error: {message}\n")


SubParsers: TypeAlias = "argparse._SubParsersAction[Parser]"


def add_command(
    sub: SubParsers,
    name: str,
    *,
    summary: str,
    example: str,
    run: Run,
    details: str = "",
    daemon: bool = False,
) -> Parser:
    """Declare a subcommand with `--json`, examples in its help (one a line) and, if `daemon`,
    a socket."""
    parser = sub.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.\n\n{details}".rstrip(),
        epilog="example:\n" + textwrap.indent(example, "  "),
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
    parser.set_defaults(run=run, command=parser)
    return parser


def add_container(parser: argparse.ArgumentParser) -> None:
    """The positional `ID`; `acon.container_names.container_id_of` understands it."""
    container = parser.add_argument(
        "container",
        metavar="ID",
        help="a container's number, or an image of which one container runs (or ended, if none "
        "runs)",
    )
    # What `acon completion` writes for it: functions of the shell.
    container.complete = {  # type: ignore[attr-defined]  # shtab's own
        "bash": "_acon_containers",
        "zsh": "_acon_containers",
    }


class RegistryAccess(NamedTuple):
    """How registries are reached.

    `auth_file`: a docker config.json with logins, none: anonymously. `ca_file`: PEM roots
    that replace the system's. `plain_http`: without TLS; else only this machine's loopback is
    spoken to plainly.
    """

    auth_file: Path | None = None
    ca_file: Path | None = None
    plain_http: bool = False


def add_registry_options(parser: argparse.ArgumentParser) -> None:
    """Options for commands that take images of registries; `registry_access` reads them."""
    options = parser.add_argument_group("registries (docker://)")
    options.add_argument(
        "--authfile",
        metavar="FILE",
        type=Path,
        help="docker config.json with logins (or REGISTRY_AUTH_FILE; default: where podman and "
        "docker keep theirs)",
    )
    options.add_argument(
        "--registry-ca",
        metavar="FILE",
        type=Path,
        help="PEM roots to believe instead of the system's",
    )
    options.add_argument(
        "--plain-http",
        action="store_true",
        help="without TLS: anyone on the way can read and alter",
    )


def registry_access(args: argparse.Namespace) -> RegistryAccess:
    """What the options of `add_registry_options` and the environment say."""
    return RegistryAccess(
        auth_file=args.authfile or _auth_file(),
        ca_file=args.registry_ca,
        plain_http=args.plain_http,
    )


def _auth_file() -> Path | None:
    """Where podman and docker look: a file that is named, else the first that is there."""
    named = os.environ.get("REGISTRY_AUTH_FILE")
    if named:
        return Path(named)
    places = []
    if runtime_dir := os.environ.get("XDG_RUNTIME_DIR"):
        places.append(Path(runtime_dir) / "containers" / "auth.json")
    if docker_dir := os.environ.get("DOCKER_CONFIG"):
        places.append(Path(docker_dir) / "config.json")
    elif home := os.environ.get("HOME"):
        places.append(Path(home) / ".docker" / "config.json")
    return next((place for place in places if place.is_file()), None)


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


def positive(text: str) -> int:
    """An argparse type: 1, 2, 3, ..."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be positive")
    return value
