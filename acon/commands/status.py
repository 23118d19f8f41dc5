"""`acon status`: what the daemon has and does, as it puts it into evidence."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from acon.arguments import SubParsers, add_command

if TYPE_CHECKING:
    from supervisor.formats.status import Status


def add_parser(sub: SubParsers) -> None:
    add_command(
        sub,
        "status",
        summary="show images, containers, seal and measurement",
        details="Exit code 1 if measurement has halted: no evidence is given then.",
        example="acon status",
        run=run,
        daemon=True,
    )


def run(args: argparse.Namespace) -> int:
    import msgspec

    from acon.daemon import converse
    from acon.output import result
    from supervisor.formats.status import MEASUREMENT_OK

    status = converse(args, lambda client: client.status())
    result(args, msgspec.to_builtins(status), "\n".join(_lines(status)))
    return 0 if status.measurement == MEASUREMENT_OK else 1


def _lines(status: Status) -> list[str]:
    lines = [
        f"sealed       {'yes' if status.sealed else 'no: images can still be admitted'}",
        f"measurement  {status.measurement}",
    ]
    for image in status.images:
        kind = ", ".join(image.names) or ("" if image.executable else "lends layers")
        lines.append(f"image        {image.image_id}  {kind}".rstrip())
        lines += [f"               lacks {missing}" for missing in image.missing_layers]
    for one in status.containers:
        state = one.state if one.exit_code is None else f"exited with {one.exit_code}"
        state = state if one.signal is None else f"killed by signal {one.signal}"
        lines.append(f"container    {one.container_id}  {state}  {one.image_id}")
    return lines + [f"note         {note}" for note in status.notes]
