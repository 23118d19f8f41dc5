"""Who starts containers, as benchmarks see them; and the first of them, `acond`.

The others are `bare_runtime` (the OCI runtime alone) and `podman`.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Protocol

import trio

from acon.client import Client
from acon.container_client import OutputLine
from benchmarks.clock_program import time_in
from benchmarks.figures import CannotMeasure
from benchmarks.program_image import load_image

END_TIMEOUT_S = 60
POLL_S = 0.01


class Starter(Protocol):
    """`start` is timed, the others are not. Numbers are used once.

    `start` returns when it is known that the program runs. `first_instruction` tells when
    it began to, in `time.monotonic()`'s seconds.
    """

    name: str

    async def prepare(self, number: int) -> None: ...

    async def start(self, number: int) -> None: ...

    async def first_instruction(self, number: int) -> float: ...

    async def end(self, number: int) -> None: ...


class Acond:
    """Requests over the daemon's Unix socket, on connections that are kept."""

    name = "acond"

    def __init__(self, client: Client) -> None:
        self._client = client
        self._image_id = ""
        self._containers: dict[int, int] = {}

    async def load(self, layer: Path) -> None:
        self._image_id = await load_image(self._client, layer)

    async def prepare(self, number: int) -> None:
        await trio.lowlevel.checkpoint()

    async def start(self, number: int) -> None:
        self._containers[number] = await self._client.start(self._image_id, [f"NUMBER={number}"])

    def id_of(self, number: int) -> int:
        """The daemon's number for a container."""
        return self._containers[number]

    async def first_instruction(self, number: int) -> float:
        """From the daemon's log of what the container wrote. Raises `CannotMeasure`."""
        with trio.move_on_after(END_TIMEOUT_S):
            while True:
                async with self._client.logs(self._containers[number]) as log:
                    lines = [line async for line in log]
                if lines and isinstance(lines[0], OutputLine):
                    return time_in(lines[0].data)
                await trio.sleep(POLL_S)
        raise CannotMeasure("the program wrote nothing")

    async def end(self, number: int) -> None:
        container_id = self._containers.pop(number)
        await self._client.signal(container_id, int(signal.SIGKILL))
        with trio.fail_after(END_TIMEOUT_S):
            while True:
                if (await self._client.container(container_id)).state == "exited":
                    return
                await trio.sleep(POLL_S)
