"""Which daemon a command talks to, and one conversation with it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import trio

from acon.client import Client
from acon.errors import UsageError
from supervisor.formats.errors import FormatError, Refusal

# What the plugin `http_api` listens on unless configured otherwise.
DEFAULT_SOCKET = "/run/acond/api.sock"

T = TypeVar("T")


def client_of(args: argparse.Namespace) -> Client:
    """`--socket` or `--url`, else `ACON_SOCKET` or `ACON_URL`, else this machine's daemon."""
    socket, url = _where(args)
    if url:
        return Client.over_url(url, ca_file=Path(args.ca_file) if args.ca_file else None)
    return Client.over_socket(Path(socket or DEFAULT_SOCKET))


def is_of_this_machine(args: argparse.Namespace) -> bool:
    """Whether the daemon that `args` name sees the files that this machine has."""
    return not _where(args)[1]


def _where(args: argparse.Namespace) -> tuple[str | None, str | None]:
    """Socket and URL; at most one of them says anything."""
    if args.socket is not None or args.url is not None:
        return args.socket, args.url
    socket, url = os.environ.get("ACON_SOCKET"), os.environ.get("ACON_URL")
    if socket and url:
        raise UsageError("environment", "only one of ACON_SOCKET and ACON_URL may be set")
    return socket, url


def converse(args: argparse.Namespace, work: Callable[[Client], Awaitable[T]]) -> T:
    """Run `work` with a client of the daemon that `args` name; returns its result."""
    client = client_of(args)

    async def with_client() -> T:
        async with client:
            return await work(client)

    try:
        return trio.run(with_client)
    except FormatError as error:
        # The daemon (or its answer) is at odds with the format, not what the person typed.
        raise Refusal(
            error.item, error.rule, expected=error.expected, actual=error.actual
        ) from error
