"""`acon logs`: what a container wrote to the descriptors that its manifest lets be read."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from acon.arguments import SubParsers, add_command, add_container, non_negative

if TYPE_CHECKING:
    from datetime import datetime

    from acon.client import Client
    from acon.log_report import LogReport

_DETAILS = """\
Lines of descriptor 1 go to standard output, those of all others to standard error.
Control characters are shown, not obeyed, where they would reach a terminal. Of each
container the latest lines are kept (containers.log_kib), also over restarts; how many
are lost is said on standard error. Only descriptors in the manifest's logFDs are kept.

With -f it ends when the container has ended, or with Ctrl-C (130); where a restart
follows at once, it may go on with what the new program writes.
With --json, one JSON object per line: number, time, fd, cut, and text, or bytes in
base64 where it is not UTF-8; {"lost_lines": N} where lines are missing."""


def add_parser(sub: SubParsers) -> None:
    parser = add_command(
        sub,
        "logs",
        summary="show what a container wrote",
        details=_DETAILS,
        example="acon logs -f -t --tail 20 gateway\nacon logs 3 --fd 2 --since 10m",
        run=run,
        daemon=True,
    )
    add_container(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="go on with what it writes")
    parser.add_argument("-t", "--timestamps", action="store_true", help="begin lines with the time")
    parser.add_argument(
        "--tail", metavar="N", type=non_negative, help="of what is there, the last N lines only"
    )
    parser.add_argument(
        "--fd",
        metavar="N",
        type=non_negative,
        action="append",
        dest="fds",
        help="only lines of this descriptor (repeat)",
    )
    parser.add_argument(
        "--stderr", action="append_const", const=2, dest="fds", help="the same as --fd 2"
    )
    parser.add_argument(
        "--since",
        metavar="TIME",
        help="only later lines: RFC 3339 by the TD's clock, or ago by this one's, as 90s, 10m, 2h",
    )
    parser.set_defaults(json_lines=True)


def run(args: argparse.Namespace) -> int:
    from acon.daemon import converse
    from acon.human import utc_now
    from acon.log_report import LogReport
    from acon.times import parse_since

    since = None if args.since is None else parse_since(args.since, item="--since", now=utc_now())
    report = LogReport(as_json=args.json, timestamps=args.timestamps)
    try:
        converse(args, lambda client: _show(args, client, report, since))
    finally:
        report.end()
    return 0


async def _show(
    args: argparse.Namespace, client: Client, report: LogReport, since: datetime | None
) -> None:
    from collections import deque

    from acon.container_client import Lost, Output
    from acon.container_names import container_id_of

    def is_wanted(entry: Output) -> bool:
        if isinstance(entry, Lost):
            return True
        return (args.fds is None or entry.fd in args.fds) and (since is None or entry.time >= since)

    container_id = await container_id_of(client, args.container)
    after = 0
    if args.tail is not None:
        # What is no longer kept came before the last lines: nobody asked for it.
        last: deque[Output] = deque(maxlen=args.tail)
        async with client.logs(container_id) as kept:
            async for entry in kept:
                if not isinstance(entry, Lost):
                    after = entry.number
                    if is_wanted(entry):
                        last.append(entry)
        for entry in last:
            report.tell(entry)
        if not args.follow:
            return
    async with client.logs(container_id, after=after, follow=args.follow) as lines:
        async for entry in lines:
            if is_wanted(entry):
                report.tell(entry)
