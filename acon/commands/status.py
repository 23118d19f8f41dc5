"""`acon status`: what the daemon has and does, as it puts it into evidence."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from acon.arguments import SubParsers, add_command

if TYPE_CHECKING:
    from supervisor.formats.status import AttestationData, Status

_DETAILS = """\
Ids are cut short; `acon start` takes them so, too. What containers say of themselves
(attestation data) is shown, and checked by nobody.
Exit code 1 if measurement has halted: no evidence is given then."""


def add_parser(sub: SubParsers) -> None:
    parser = add_command(
        sub,
        "status",
        summary="show images, containers, seal and measurement",
        details=_DETAILS,
        example="acon status",
        run=run,
        daemon=True,
    )
    parser.add_argument("--no-trunc", "--long", action="store_true", help="whole ids")


def run(args: argparse.Namespace) -> int:
    import msgspec

    from acon.daemon import converse
    from acon.output import result
    from acon.short_ids import shortened
    from supervisor.formats.status import MEASUREMENT_OK

    status = converse(args, lambda client: client.status())
    text = "\n".join(_lines(status))
    result(args, msgspec.to_builtins(status), text if args.no_trunc else shortened(text))
    return 0 if status.measurement == MEASUREMENT_OK else 1


def _lines(status: Status) -> list[str]:
    from acon.human import state_in_words

    lines = [
        f"sealed       {'yes' if status.sealed else 'no: images can still be admitted'}",
        f"measurement  {status.measurement}",
    ]
    for image in status.images:
        kind = ", ".join(image.names) or ("" if image.executable else "lends layers")
        lines.append(f"image        {image.image_id}  {kind}".rstrip())
        lines += [f"               lacks {missing}" for missing in image.missing_layers]
    for one in status.containers:
        state = state_in_words(one)
        if one.restarts:
            state += f", restarts: {one.restarts}"
        lines.append(f"container    {one.container_id}  {state}  {one.image_id}")
        if one.attestation_data is not None:
            lines.append(f"               says {_in_words(one.attestation_data)}")
    return lines + [f"note         {note}" for note in status.notes]


def _in_words(data: AttestationData) -> str:
    """On one line; a stranger wrote it."""
    import base64
    import json

    raw = base64.b64decode(data.data)
    if data.kind == "text":
        return json.dumps(raw.decode("utf-8", "replace"), ensure_ascii=False)
    return f"{len(raw)} bytes, {raw[:16].hex()}{'...' if len(raw) > 16 else ''}"
