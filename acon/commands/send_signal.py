"""`acon signal`: send a container a signal that its manifest allows."""

from __future__ import annotations

import argparse

from acon.arguments import SubParsers, add_command


def add_parser(sub: SubParsers) -> None:
    parser = add_command(
        sub,
        "signal",
        summary="send a container a signal that its manifest allows",
        details="N is a number or a name such as TERM; negative: to the whole process group.",
        example="acon signal 3 TERM",
        run=run,
        daemon=True,
    )
    parser.add_argument("container_id", metavar="ID", type=int)
    parser.add_argument("signum", metavar="N", type=_signal_number)


def run(args: argparse.Namespace) -> int:
    from acon.daemon import converse
    from acon.output import result

    converse(args, lambda client: client.signal(args.container_id, args.signum))
    result(
        args,
        {"container_id": args.container_id, "signal": args.signum},
        f"container {args.container_id}: signal {args.signum} sent",
    )
    return 0


def _signal_number(text: str) -> int:
    import signal

    sign, name = (-1, text[1:]) if text.startswith("-") else (1, text)
    if name.isdecimal():
        return sign * int(name)
    try:
        return sign * signal.Signals[f"SIG{name.upper().removeprefix('SIG')}"].value
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is no signal") from None
