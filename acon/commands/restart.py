"""`acon restart`: end a container as its manifest allows, and start it again with what it had."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from acon.arguments import SubParsers, add_command, add_container, positive

if TYPE_CHECKING:
    from acon.client import Client
    from acon.container_client import ListedContainer

_DETAILS = """\
A container that runs is sent the first signal of its manifest (none if there is none,
or if it begins with 0) and has --timeout to end. If it does not, the command fails and
the container goes on: nobody may kill what its owner did not allow to be killed.
One that has ended is started again while what it wrote is kept
(containers.keep_exited_s). It keeps its number, its writable root, /tmp and /run."""


def add_parser(sub: SubParsers) -> None:
    parser = add_command(
        sub,
        "restart",
        summary="start a container again",
        details=_DETAILS,
        example="acon restart gateway --timeout 60",
        run=run,
        daemon=True,
    )
    add_container(parser)
    parser.add_argument(
        "--timeout",
        metavar="S",
        type=positive,
        default=30,
        help="seconds that it has to end (default: 30)",
    )


def run(args: argparse.Namespace) -> int:
    import msgspec

    from acon.daemon import converse
    from acon.output import result

    container = converse(args, lambda client: _restart(args, client))
    result(
        args,
        msgspec.to_builtins(container),
        f"container {container.container_id} runs again (restarts: {container.restarts})",
    )
    return 0


async def _restart(args: argparse.Namespace, client: Client) -> ListedContainer:
    from acon.container_names import container_id_of

    container_id = await container_id_of(client, args.container)
    return await client.restart(container_id, timeout_s=args.timeout)
