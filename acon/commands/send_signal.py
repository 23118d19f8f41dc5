"""`acon signal`: send a container a signal that its manifest allows."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from acon.arguments import SubParsers, add_command, add_container
from acon.signals import parse_signal

if TYPE_CHECKING:
    from acon.client import Client


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
    add_container(parser)
    parser.add_argument("signum", metavar="N", type=parse_signal)


def run(args: argparse.Namespace) -> int:
    from acon.daemon import converse
    from acon.output import result

    container_id = converse(args, lambda client: _signal(args, client))
    result(
        args,
        {"container_id": container_id, "signal": args.signum},
        f"container {container_id}: signal {args.signum} sent",
    )
    return 0


async def _signal(args: argparse.Namespace, client: Client) -> int:
    from acon.container_names import container_id_of

    container_id = await container_id_of(client, args.container)
    await client.signal(container_id, args.signum)
    return container_id
