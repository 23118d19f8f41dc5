"""`acon ps`: the containers, running and ended."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from acon.arguments import SubParsers, add_command

if TYPE_CHECKING:
    from acon.client import Client
    from supervisor.operations import ContainerView, ImageView


def add_parser(sub: SubParsers) -> None:
    add_command(
        sub,
        "ps",
        summary="list containers, running and ended",
        example="acon ps",
        run=run,
        daemon=True,
    )


def run(args: argparse.Namespace) -> int:
    import msgspec

    from acon.daemon import converse
    from acon.image_names import short
    from acon.output import result, table

    containers, images = converse(args, _both)
    names = {image.image_id: image.names for image in images}
    rows = [
        (
            str(one.container_id),
            short(one.image_id, names.get(one.image_id, ())),
            _state(one),
            "-" if one.pid is None else str(one.pid),
            " ".join(one.argv),
        )
        for one in containers
    ]
    result(
        args,
        {"containers": [msgspec.to_builtins(one) for one in containers]},
        table(("ID", "IMAGE", "STATE", "PID", "COMMAND"), rows) if rows else "no containers",
    )
    return 0


async def _both(client: Client) -> tuple[tuple[ContainerView, ...], tuple[ImageView, ...]]:
    return await client.containers(), await client.images()


def _state(container: ContainerView) -> str:
    if container.exit_code is not None:
        return f"exited with {container.exit_code}"
    if container.signal is not None:
        return f"killed by signal {container.signal}"
    return container.state
