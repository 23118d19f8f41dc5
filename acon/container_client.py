"""What clients can do with containers: start, watch, signal, restart, call into."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, TypeAlias

import msgspec

from acon.answers import typed, typed_line
from acon.connection import REQUEST_TIMEOUT_S, Connection
from acon.following import Follower, Told
from supervisor.container_seams import Invocation
from supervisor.errors import FormatError, Refusal
from supervisor.operations import ContainerView


class ListedContainer(ContainerView, frozen=True, kw_only=True):
    """A container as clients see it.

    `memory_bytes` that it uses now: None unless asked for, and of one that does not run.
    """

    memory_bytes: int | None = None


class OutputLine(msgspec.Struct, frozen=True, kw_only=True):
    """A line that a container wrote, without its newline; `cut`: the next one of this
    descriptor continues it. `time` is by the TD's clock.
    """

    number: int
    time: datetime
    fd: int
    data: bytes
    cut: bool


class Occurrence(msgspec.Struct, frozen=True, kw_only=True):
    """An event of the supervisor, with its `type` and its fields; `time` as `OutputLine`'s."""

    number: int
    time: datetime
    event: dict[str, object]

    @property
    def type(self) -> str:
        return str(self.event.get("type"))


class Lost(msgspec.Struct, frozen=True):
    """So many lines or events came before what follows, and are no longer kept."""

    count: int


class Invoked(msgspec.Struct, frozen=True, kw_only=True):
    """How a command in a container ended and what it wrote; `*_cut`: it wrote more.

    Exactly one of `exit_code` (0 to 255) and `signal` is set.
    """

    exit_code: int | None
    signal: int | None
    stdout: bytes
    stderr: bytes
    stdout_cut: bool
    stderr_cut: bool

    def __post_init__(self) -> None:
        if (self.exit_code is None) == (self.signal is None):
            raise ValueError("exactly one of exit code and signal must be there")


Output: TypeAlias = OutputLine | Lost
Happened: TypeAlias = Occurrence | Lost


class ContainerClient:
    """The part of `acon.client.Client` that concerns containers."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def start(self, image_id: str, environment: Sequence[str] = ()) -> int:
        """Start a container; `environment` holds NAME=VALUE requests. Returns its id."""
        body = {"image_id": image_id, "environment": list(environment)}
        answer = await self._connection.call("POST", "/api/v2/containers", body)
        return typed(answer, _Started).container_id

    async def containers(self, *, memory: bool = False) -> tuple[ListedContainer, ...]:
        """All that run and those that ended lately, in the order of starting."""
        path = "/api/v2/containers" + ("?memory=1" if memory else "")
        return typed(await self._connection.call("GET", path), _Containers).containers

    async def container(self, container_id: int) -> ListedContainer:
        """One of them, with the memory that it uses. Raises `UnknownItem`."""
        answer = await self._connection.call("GET", f"{_path(container_id)}?memory=1")
        return typed(answer, ListedContainer)

    async def signal(self, container_id: int, signum: int) -> None:
        """Send a signal that the manifest lists; negative: to the process group."""
        path = f"{_path(container_id)}/signal"
        await self._connection.call("POST", path, {"signal": signum})

    async def restart(self, container_id: int, *, timeout_s: int) -> ListedContainer:
        """Start it again with what it had; returns once the new program runs.

        A running one is sent its manifest's first signal and has `timeout_s` to end. Raises
        `DeadlineExceeded` if it does not (nothing was killed then), `PolicyDenied` if its
        owner forbade restarts, `Conflict`, `UnknownItem`.
        """
        answer = await self._connection.call(
            "POST",
            f"{_path(container_id)}/restart",
            {"timeout_s": timeout_s},
            timeout_s=timeout_s + REQUEST_TIMEOUT_S,
        )
        return typed(answer, ListedContainer)

    async def invoke(self, container_id: int, invocation: Invocation) -> Invoked:
        """Run an additional entry point; returns when its command has ended.

        Raises `UnknownItem` without such a container or entry point, `PolicyDenied` for a
        name that may not be asked for, `Conflict`, `Busy`, and `DeadlineExceeded` when the
        command was killed at its deadline.
        """
        answer = await self._connection.call(
            "POST",
            f"{_path(container_id)}/invoke",
            # msgspec writes bytes as base64, as the API has them; it takes whole seconds.
            msgspec.structs.asdict(invocation) | {"timeout_s": math.ceil(invocation.timeout_s)},
            timeout_s=invocation.timeout_s + REQUEST_TIMEOUT_S,
        )
        return typed(answer, Invoked)

    def logs(self, container_id: int, *, after: int = 0, follow: bool = False) -> Follower[Output]:
        """What it wrote in lines numbered above `after`, as far as it is kept:

            async with client.logs(3, follow=True) as lines:
                async for line in lines: ...

        With `follow`, also what it writes from now on, until it has ended.
        """
        return Follower(
            self._connection,
            f"{_path(container_id)}/logs",
            after=after,
            follow=follow,
            read=_output_of,
        )

    def events(self, *, after: int = 0, follow: bool = False) -> Follower[Happened]:
        """What happened in the TD, numbered above `after`, as far as it is kept.

        With `follow`, also what happens from now on, until the daemon is gone.
        """
        return Follower(
            self._connection, "/api/v2/events", after=after, follow=follow, read=_event_of
        )


# --- the JSON of answers --------------------------------------------------------------------


_Time: TypeAlias = Annotated[datetime, msgspec.Meta(tz=True)]


class _Containers(msgspec.Struct, frozen=True):
    containers: tuple[ListedContainer, ...]


class _Started(msgspec.Struct, frozen=True):
    container_id: int


class _OutputAnswer(msgspec.Struct, frozen=True):
    """A line that was written, or what else the daemon says between and after them."""

    number: int | None = None
    time: _Time | None = None
    fd: int | None = None
    text: str | None = None
    raw: bytes | None = msgspec.field(default=None, name="bytes")  # base64, if it is not UTF-8
    cut: bool = False
    lost_lines: int | None = None
    ended: bool | None = None
    after: int | None = None


class _EventAnswer(msgspec.Struct, frozen=True):
    number: int | None = None
    time: _Time | None = None
    event: dict[str, object] | None = None
    lost_events: int | None = None
    ended: bool | None = None
    after: int | None = None


def _output_of(line: bytes) -> Told[Output]:
    answer = typed_line(line, _OutputAnswer)
    if answer.ended is not None:
        return Told(after=answer.after, ended=answer.ended)
    if answer.lost_lines is not None:
        return Told(value=Lost(answer.lost_lines))
    data = answer.raw if answer.text is None else answer.text.encode()
    if answer.number is None or answer.time is None or answer.fd is None or data is None:
        raise _incomplete(line)
    written = OutputLine(
        number=answer.number, time=answer.time, fd=answer.fd, data=data, cut=answer.cut
    )
    return Told(value=written, after=answer.number)


def _event_of(line: bytes) -> Told[Happened]:
    answer = typed_line(line, _EventAnswer)
    if answer.ended is not None:
        return Told(after=answer.after, ended=answer.ended)
    if answer.lost_events is not None:
        return Told(value=Lost(answer.lost_events))
    if answer.number is None or answer.time is None or answer.event is None:
        raise _incomplete(line)
    happened = Occurrence(number=answer.number, time=answer.time, event=answer.event)
    return Told(value=happened, after=answer.number)


def _incomplete(line: bytes) -> Refusal:
    return FormatError("answer", "a line must be whole", actual=line[:200].decode(errors="replace"))


def _path(container_id: int) -> str:
    return f"/api/v2/containers/{container_id}"
