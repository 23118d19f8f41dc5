"""How soon those who follow the events hear of a container's end."""

from __future__ import annotations

import os
import signal
import statistics
import time

import trio

from acon.client import Client
from acon.container_client import Happened, Occurrence
from acon.following import Follower
from benchmarks.container_machine import ContainerMachine, container_machine
from benchmarks.figures import CannotMeasure, Figure, Goal, Section, percentile_ms
from benchmarks.starters import Acond

MEDIAN_GOAL = Goal(at_most=5.0)
EVENT_TIMEOUT_S = 60
EXITED = "container.exited"


def run(*, rounds: int = 100) -> Section:
    with container_machine() as machine:
        seconds = trio.run(_samples, machine, rounds)
    return Section(
        name="exit_to_event",
        title="A program's end to its event",
        method=(
            "A container's process is killed from outside the daemon: from before the signal is "
            "sent, so that the process's own end in the kernel is in it, until a follower of "
            "`GET /api/v2/events` on the daemon's Unix socket, our own client, has the event. "
            f"{rounds} times, one after another."
        ),
        figures=(
            Figure(
                name="median",
                value=statistics.median(seconds) * 1000,
                unit="ms",
                goal=MEDIAN_GOAL,
            ),
            Figure(name="90 of 100 within", value=percentile_ms(seconds, 90), unit="ms"),
        ),
    )


async def _samples(machine: ContainerMachine, rounds: int) -> list[float]:
    async with machine.acond() as (client, acond), client.events(follow=True) as events:
        return [await _sample(client, acond, events, number) for number in range(rounds)]


async def _sample(client: Client, acond: Acond, events: Follower[Happened], number: int) -> float:
    """Seconds from the signal to the event."""
    await acond.start(number)
    container_id = acond.id_of(number)
    pid = (await client.container(container_id)).pid
    if pid is None:
        raise CannotMeasure(f"container {container_id} does not run")
    killed_at = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    with trio.fail_after(EVENT_TIMEOUT_S):
        return await _heard(events, container_id) - killed_at


async def _heard(events: Follower[Happened], container_id: int) -> float:
    async for event in events:
        if isinstance(event, Occurrence) and event.type == EXITED:
            heard_at = time.monotonic()
            if event.event["container_id"] == container_id:
                return heard_at
    raise CannotMeasure("the events ended")
