"""`acon`: finds the subcommand and turns what it raises into an exit code, here alone.

0 done or passed, 1 refused or failed, 2 wrong usage or unreadable input.
Commands import what they need when they run: `acon --help` must answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from acon.arguments import add_group
from acon.commands import (
    completion,
    doctor,
    evidence,
    image_convert,
    image_delegate,
    image_publish,
    image_show,
    image_sign,
    load,
    log_show,
    plan,
    policy_init,
    ps,
    seal,
    send_signal,
    sim,
    start,
    status,
    vendor_make,
    vendor_sign,
    verify,
)

DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130


def build_parser() -> argparse.ArgumentParser:
    """The whole command line, as argparse and the shell completion see it."""
    parser = argparse.ArgumentParser(
        prog="acon",
        description="Attested Containers: sign, load, run and verify.",
        epilog="exit codes: 0 done or passed, 1 refused or failed, 2 wrong usage or input",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    sub = parser.add_subparsers(title="commands", metavar="COMMAND")
    image = add_group(sub, "image", summary="owner: turn OCI images into signed manifests")
    for owner_command in (image_convert, image_delegate, image_sign, image_publish, image_show):
        owner_command.add_parser(image)
    vendor = add_group(sub, "vendor", summary="CSP: give signed layers to those who delegate")
    for vendor_command in (vendor_make, vendor_sign):
        vendor_command.add_parser(vendor)
    for command in (plan, load, seal, start, ps, send_signal, status, evidence, verify):
        command.add_parser(sub)
    policy_init.add_parser(add_group(sub, "policy", summary="relying party: what is expected"))
    log_show.add_parser(add_group(sub, "log", summary="read the measurement log of an evidence"))
    sim.add_parser(sub)
    doctor.add_parser(sub)
    completion.add_parser(sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code (argparse exits with 2 by itself)."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.version:
        return _version()
    run = getattr(args, "run", None)
    if run is None:
        parser.print_help(sys.stderr)
        return WRONG_USAGE
    try:
        code = run(args)
        sys.stdout.flush()
        return int(code)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader left (`acon ps | head`); Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        return _failure(error, as_json=args.json, lines=getattr(args, "json_lines", False))


def _failure(error: Exception, *, as_json: bool, lines: bool) -> int:
    """Say what went wrong; a bug of ours is no refusal and keeps its traceback.

    `lines`: the command writes one JSON object a line, and this is the last of them.
    """
    from acon.errors import UsageError
    from acon.output import remark, write_json
    from supervisor.errors import ConfigError
    from supervisor.formats.errors import FormatError, Refusal

    if isinstance(error, Refusal):
        code = WRONG_USAGE if isinstance(error, UsageError | ConfigError | FormatError) else FAILED
        facts = error.to_dict()
    elif isinstance(error, OSError):
        code = WRONG_USAGE
        item = str(error.filename) if error.filename is not None else "input"
        facts = UsageError(item, "cannot be read or written", actual=error.strerror).to_dict()
    else:
        raise error
    if as_json:
        write_json({"error": facts}, lines=lines)
    else:
        # Nobody refused anything where no daemon answered.
        word = "refused" if code == FAILED and facts["kind"] != "connection" else "error"
        remark(f"acon: {word}: {facts['message']}")
    return code


def _version() -> int:
    import importlib.metadata

    from acon.output import say

    say(f"acon {importlib.metadata.version('attested-containers')}")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
