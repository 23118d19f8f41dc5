"""`acon`: finds the subcommand and turns what it raises into an exit code, here alone.

0 done or passed, 1 refused or failed, 2 wrong usage or unreadable input.
Commands import what they need when they run: `acon --help` must answer at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from acon.arguments import Parser, add_group
from acon.commands import (
    completion,
    doctor,
    events,
    evidence,
    image_convert,
    image_delegate,
    image_publish,
    image_show,
    image_sign,
    inspect,
    invoke,
    load,
    log_show,
    logs,
    plan,
    policy_init,
    ps,
    restart,
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


def build_parser() -> Parser:
    """The whole command line, as argparse and the shell completion see it."""
    parser = Parser(
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
    for command in (plan, load, seal, start, ps, inspect, logs, events):
        command.add_parser(sub)
    for command in (send_signal, restart, invoke, status, evidence, verify):
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
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        # Said by the command that does not know them, with its own usage and code.
        getattr(args, "command", parser).error(f"unrecognized arguments: {' '.join(unknown)}")
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
        return int(getattr(args, "failure_code", FAILED))
    except Exception as error:
        code = _failure(error, as_json=args.json, lines=getattr(args, "json_lines", False))
        # Commands that pass on another's exit code say their own failures with one code.
        return int(getattr(args, "failure_code", code))


def _failure(error: Exception, *, as_json: bool, lines: bool) -> int:
    """Say what went wrong; a bug of ours is no refusal and keeps its traceback.

    `lines`: the command writes one JSON object a line, and this is the last of them.
    """
    from acon.errors import UsageError
    from acon.output import remark, write_json
    from acon.short_ids import shortened
    from supervisor.errors import ConfigError
    from supervisor.formats.errors import FormatError, Refusal, Untrusted

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
        message = str(facts["message"])
        # What was judged and found wrong is compared in full; rules, signers and other words
        # of a command line are copied from what is said about them.
        if not isinstance(error, Untrusted | UsageError):
            message = shortened(message)
        remark(f"acon: {word}: {message}")
    return code


def _version() -> int:
    import importlib.metadata

    from acon.output import say

    say(f"acon {importlib.metadata.version('attested-containers')}")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
