"""`acon events`: what happens in a TD, as it happens."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, TypeGuard

from acon.arguments import SubParsers, add_command

if TYPE_CHECKING:
    from acon.client import Client
    from acon.container_client import Happened, Occurrence

_DETAILS = """\
First the latest events that the daemon keeps; with -f those that follow, until Ctrl-C
(exit code 130). Nothing vouches for them: what has to be believed is in the
measurement log (`acon evidence`, `acon log show`).

With --json, one JSON object per line: number, time, event (with its type and its
fields); {"lost_events": N} where events are no longer kept."""


def add_parser(sub: SubParsers) -> None:
    parser = add_command(
        sub,
        "events",
        summary="show what happens, as it happens",
        details=_DETAILS,
        example="acon events\nacon events -f --type container",
        run=run,
        daemon=True,
    )
    parser.add_argument("-f", "--follow", action="store_true", help="go on with what happens")
    parser.add_argument(
        "--type",
        metavar="T",
        action="append",
        dest="types",
        help="only of this type (container.exited) or of this kind (container) (repeat)",
    )
    parser.set_defaults(json_lines=True)


def run(args: argparse.Namespace) -> int:
    from acon.daemon import converse

    converse(args, lambda client: _show(args, client))
    return 0


async def _show(args: argparse.Namespace, client: Client) -> None:
    from acon.container_client import Lost

    async with client.events(follow=args.follow) as events:
        async for entry in events:
            if isinstance(entry, Lost) or args.types is None or _is_one(entry, args.types):
                _tell(args, entry)


def _is_one(entry: Occurrence, types: list[str]) -> bool:
    return any(entry.type == one or entry.type.startswith(f"{one}.") for one in types)


def _tell(args: argparse.Namespace, entry: Happened) -> None:
    import sys

    from acon.container_client import Lost
    from acon.output import remark, say, write_json
    from acon.short_ids import shortened
    from acon.times import rfc3339

    if isinstance(entry, Lost):
        if args.json:
            write_json({"lost_events": entry.count}, lines=True)
        else:
            remark(f"acon: {entry.count} events are no longer kept")
    elif args.json:
        facts = {"number": entry.number, "time": rfc3339(entry.time), "event": entry.event}
        write_json(facts, lines=True)
    else:
        fields = " ".join(
            f"{name}={_shown(value)}"
            for name, value in entry.event.items()
            if name != "type" and value is not None
        )
        say(shortened(f"{rfc3339(entry.time)}  {entry.type:<20}  {fields}".rstrip()))
        sys.stdout.flush()


def _shown(value: object) -> str:
    """On one line, whatever it holds; JSON where it is not plain."""
    import json

    words = value if isinstance(value, list) else [value]
    plain = [word for word in words if _is_plain(word)]
    if not plain or len(plain) < len(words):
        return json.dumps(value)
    return ",".join(plain)


def _is_plain(word: object) -> TypeGuard[str]:
    return (
        isinstance(word, str)
        and bool(word)
        and word.isprintable()
        and not any(mark in word for mark in ' ,"')
    )
