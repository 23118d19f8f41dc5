"""`acon invoke`: run one of the commands that a container offers to whoever asks."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from acon.arguments import Parser, SubParsers, add_command, add_container, non_negative, positive

if TYPE_CHECKING:
    from acon.client import Client
    from acon.container_client import Invoked

# As docker's: what acon itself has to say must not be taken for the command's word.
ACON_FAILED = 125
# As a shell's.
_KILLED = 128

MAX_STDIN_BYTES = 64 << 20

_DETAILS = """\
NAME is a file in the container's /lib/acon/entrypoint.d/ that begins with A to Z; all
that follows it goes to the command, so options of acon stand before it. The command
starts in /, with the environment given here and no other. It is not measured, and its
owner answers for what it lets strangers do.

Its standard output and error are written through when it has ended (control characters
are shown, not obeyed, on a terminal). At its deadline it is killed, with its whole
process group.

exit code: the command's own; 128+N if signal N killed it; 125 if acon or the daemon
failed or refused, if it was killed at its deadline, or for wrong usage.
With --json: exit_code, signal, stdout and stderr in base64, stdout_cut, stderr_cut."""


def add_parser(sub: SubParsers) -> None:
    parser = add_command(
        sub,
        "invoke",
        summary="run a command that a container offers",
        details=_DETAILS,
        example="acon invoke gateway Backup --full\n"
        "acon invoke --env LEVEL=debug --stdin request.json --timeout 10 3 Query",
        run=run,
        daemon=True,
    )
    add_container(parser)
    parser.add_argument("entry_point", metavar="NAME")
    parser.add_argument("arguments", metavar="ARG", nargs=argparse.REMAINDER)
    parser.add_argument(
        "--env",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a variable of the command's environment (repeat)",
    )
    parser.add_argument(
        "--stdin",
        metavar="FILE",
        help="what the command reads; - is this command's (default: none)",
    )
    parser.add_argument(
        "--timeout",
        metavar="S",
        type=positive,
        default=30,
        help="seconds after which it is killed (default: 30)",
    )
    parser.add_argument(
        "--capture",
        metavar="BYTES",
        type=non_negative,
        default=65_536,
        help="of each output, at most so much is kept (default: 65536)",
    )
    _own_codes(parser)


def _own_codes(parser: Parser) -> None:
    parser.usage_code = ACON_FAILED
    parser.set_defaults(failure_code=ACON_FAILED)


def run(args: argparse.Namespace) -> int:
    from acon.daemon import converse
    from acon.output import write_json

    stdin = _read_stdin(args.stdin)
    invoked = converse(args, lambda client: _invoke(args, client, stdin))
    if args.json:
        import msgspec

        write_json(msgspec.to_builtins(invoked))  # bytes become base64
    else:
        _show(invoked, args.capture)
    if invoked.signal is not None:
        return _KILLED + invoked.signal
    return invoked.exit_code or 0


async def _invoke(args: argparse.Namespace, client: Client, stdin: bytes) -> Invoked:
    from acon.container_names import container_id_of
    from supervisor.container_seams import Invocation

    container_id = await container_id_of(client, args.container)
    invocation = Invocation(
        entry_point=args.entry_point,
        arguments=tuple(args.arguments),
        environment=tuple(args.env),
        stdin=stdin,
        capture_bytes=args.capture,
        timeout_s=args.timeout,
    )
    return await client.invoke(container_id, invocation)


def _read_stdin(name: str | None) -> bytes:
    """The daemon has a smaller bound of its own (`max_request_bytes`); this one is for memory."""
    import sys

    from acon.errors import UsageError
    from acon.files import read_bounded

    if name is None:
        return b""
    if name != "-":
        return read_bounded(Path(name), max_bytes=MAX_STDIN_BYTES)
    data = sys.stdin.buffer.read(MAX_STDIN_BYTES + 1)
    if len(data) > MAX_STDIN_BYTES:
        raise UsageError("standard input", "is too large", expected=f"at most {MAX_STDIN_BYTES}")
    return data


def _show(invoked: Invoked, capture_bytes: int) -> None:
    from acon.container_output import standard_error, standard_output
    from acon.output import remark

    for output, data in (
        (standard_output(), invoked.stdout),
        (standard_error(), invoked.stderr),
    ):
        output.write(data)
        output.flush()
    for name, cut in (("output", invoked.stdout_cut), ("error", invoked.stderr_cut)):
        if cut:
            remark(f"acon: of its standard {name} only the first {capture_bytes} bytes were kept")
