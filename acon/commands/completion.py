"""`acon completion`: a script for the shell, made from the command line itself."""

from __future__ import annotations

import argparse

from acon.arguments import SubParsers, add_command

# What shells call for an `ID`; a daemon that is not there offers nothing.
_CONTAINERS = {
    "bash": """\
_acon_containers() {
  compgen -W "$(acon ps --quiet 2>/dev/null)" -- "$1"
}""",
    "zsh": """\
_acon_containers() {
  local -a numbers
  numbers=(${(f)"$(acon ps --quiet 2>/dev/null)"})
  compadd -a numbers
}""",
}


def add_parser(sub: SubParsers) -> None:
    parser = add_command(
        sub,
        "completion",
        summary="print a completion script for a shell",
        example='eval "$(acon completion bash)"',
        run=run,
    )
    parser.add_argument("shell", choices=("bash", "zsh"))


def run(args: argparse.Namespace) -> int:
    import shtab

    from acon.cli import build_parser
    from acon.output import result

    script = shtab.complete(build_parser(), shell=args.shell, preamble=_CONTAINERS[args.shell])
    result(args, {"shell": args.shell, "script": script}, script)
    return 0
