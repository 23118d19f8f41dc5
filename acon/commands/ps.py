"""`acon ps`: the containers, running and ended."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from acon.arguments import SubParsers, add_command

if TYPE_CHECKING:
    from collections.abc import Sequence

    from acon.client import Client
    from acon.container_client import ListedContainer

_HEADINGS = ("ID", "IMAGE", "SIGNER", "STATE", "SINCE", "RESTARTS", "PID", "MEMORY")

_DETAILS = """\
Ended ones are listed until the daemon forgets them (containers.max_remembered).
IMAGE is the first name that the image gives itself, else the beginning of its
manifest's digest; SIGNER is the beginning of the digest of its signer's certificate.
Times are those of the TD's clock, which nothing vouches for."""


def add_parser(sub: SubParsers) -> None:
    parser = add_command(
        sub,
        "ps",
        summary="list containers, running and ended",
        details=_DETAILS,
        example="acon ps\nacon ps --no-trunc",
        run=run,
        daemon=True,
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--no-trunc", "--long", action="store_true", help="whole ids, times in RFC 3339, bytes"
    )
    how.add_argument("-q", "--quiet", action="store_true", help="only the containers' numbers")


def run(args: argparse.Namespace) -> int:
    from acon.container_facts import facts_of
    from acon.daemon import converse
    from acon.output import result, table

    containers, names = converse(args, lambda client: _both(client, quiet=args.quiet))
    if args.quiet:
        text = "\n".join(str(one.container_id) for one in containers)
    else:
        row = _whole_row if args.no_trunc else _short_row
        rows = [row(one, names.get(one.image_id, ())) for one in containers]
        text = table(_HEADINGS, rows) if rows else "no containers"
    facts = [facts_of(one, names.get(one.image_id, ())) for one in containers]
    result(args, {"containers": facts}, text)
    return 0


async def _both(
    client: Client, *, quiet: bool
) -> tuple[tuple[ListedContainer, ...], dict[str, tuple[str, ...]]]:
    from acon.container_facts import names_of_images

    return await client.containers(memory=not quiet), await names_of_images(client)


def _short_row(one: ListedContainer, names: Sequence[str]) -> tuple[str, ...]:
    from acon.container_facts import signer_of
    from acon.human import ago, size, utc_now
    from acon.image_names import short

    signer = signer_of(one.image_id)
    return _row(
        one,
        short(one.image_id, names),
        short(signer),
        ago(one.since, utc_now()),
        size(one.memory_bytes),
    )


def _whole_row(one: ListedContainer, names: Sequence[str]) -> tuple[str, ...]:
    from acon.container_facts import signer_of

    memory = "-" if one.memory_bytes is None else str(one.memory_bytes)
    return _row(one, one.image_id, signer_of(one.image_id), one.since, memory)


def _row(one: ListedContainer, image: str, signer: str, since: str, memory: str) -> tuple[str, ...]:
    from acon.human import state_in_words

    return (
        str(one.container_id),
        image,
        signer,
        state_in_words(one),
        since,
        str(one.restarts),
        "-" if one.pid is None else str(one.pid),
        memory,
    )
