"""`acon plan`: what loading these images will do, before anything is loaded."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from acon.arguments import SubParsers, add_command

if TYPE_CHECKING:
    from acon.planning import Plan, Step
    from supervisor.formats.log_events import StartEvent

_DETAILS = """\
Says in which groups the images can be admitted (or why not at all), which layers
are left to whom and what they resolve to, and, with the identity that
`acond --print-identity` prints, what RTMR[3] will be after each step of: load
these images in this order, seal, start each image that can run once, in this
order. Nothing is asked of any daemon."""


def add_parser(sub: SubParsers) -> None:
    parser = add_command(
        sub,
        "plan",
        summary="predict admission, delegations and RTMR[3]",
        details=_DETAILS,
        example="acon plan python-2 gateway intake --identity identity.json",
        run=run,
    )
    parser.add_argument("directories", metavar="DIR", nargs="+", type=Path)
    parser.add_argument(
        "--identity", metavar="FILE", type=Path, help="what `acond --print-identity` printed"
    )
    parser.add_argument("--together", action="store_true", help="as with `acon load --together`")
    parser.add_argument("--no-seal", action="store_true", help="the TD stays open")
    parser.add_argument("--no-start", action="store_true", help="nothing is started")
    parser.add_argument(
        "--unsafe-allow-sha256", action="store_true", help="as the daemon's setting of that name"
    )


def run(args: argparse.Namespace) -> int:
    from acon.bundle import Bundle
    from acon.output import result
    from acon.planning import PlannedStart, make_plan, predict

    images = [
        Bundle(directory).signed(unsafe_allow_sha256=args.unsafe_allow_sha256)
        for directory in args.directories
    ]
    starts = [
        PlannedStart(image, ())
        for image in images
        if image.manifest.is_executable and not args.no_start
    ]
    plan = make_plan(images, starts, seal=not args.no_seal, together=args.together)
    steps = () if args.identity is None else predict(_identity(args.identity), plan.events)
    result(args, _as_json(plan, steps), "\n".join(_lines(plan, steps)))
    return 0


def _identity(path: Path) -> StartEvent:
    from acon.errors import UsageError
    from acon.files import read_bounded
    from supervisor.formats.log_events import StartEvent, decode_event

    raw = read_bounded(path, max_bytes=1024 * 1024).strip()
    event = decode_event("Start", raw)
    if not isinstance(event, StartEvent):
        raise UsageError(str(path), "must be what `acond --print-identity` prints")
    return event


def _as_json(plan: Plan, steps: tuple[Step, ...]) -> object:
    import msgspec

    return {
        "groups": [[str(image.image_id) for image in group] for group in plan.groups],
        "layers": {
            image_id: [
                {
                    "digest": str(layer.digest),
                    "delegation": [msgspec.to_builtins(hop) for hop in layer.delegation],
                }
                for layer in layers
            ]
            for image_id, layers in plan.layers.items()
        },
        "steps": [msgspec.to_builtins(step) for step in steps],
        "rtmr3": steps[-1].rtmr3 if steps else None,
    }


def _lines(plan: Plan, steps: tuple[Step, ...]) -> list[str]:
    lines = []
    for number, group in enumerate(plan.groups, 1):
        lines.append(f"group {number}: admitted together" if len(group) > 1 else f"group {number}")
        for image in group:
            names = ", ".join(image.manifest.self_aliases)
            kind = names if image.manifest.is_executable else "lends layers, never runs"
            lines.append(f"  {image.image_id}  {kind}".rstrip())
    for image_id, layers in plan.layers.items():
        for index, layer in enumerate(layers):
            for hop in layer.delegation:
                lines.append(
                    f"delegated: layer {index} of {image_id}\n"
                    f"  {hop.reference}\n  is {hop.alias}: {layer.digest}"
                )
    if not steps:
        lines.append("RTMR[3] needs --identity: the log begins with what the daemon is made of")
    lines += [f"RTMR[3] {step.rtmr3} after {step.operation}" for step in steps]
    return lines
