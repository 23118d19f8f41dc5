"""Many containers that do nothing: what the supervisor uses meanwhile."""

from __future__ import annotations

from functools import partial

import trio

from acon.parallel import in_parallel
from benchmarks.container_machine import ContainerMachine, container_machine
from benchmarks.figures import CannotMeasure, Figure, Goal, Section, stopwatch
from benchmarks.process_figures import (
    processor_seconds,
    proportional_megabytes,
    resident_megabytes,
)

AT_ONCE = 8
MEMORY_GOAL = Goal(at_most=100.0)
PROCESSOR_GOAL = Goal(at_most=1.0)
# What a start leaves to be done afterwards is no idling.
SETTLE_S = 2.0


def run(*, containers: int = 500, watched_s: float = 30.0) -> Section:
    with container_machine() as machine:
        empty_mb = resident_megabytes(machine.daemon_pid)
        starting_s = trio.run(_start_all, machine, containers)
        resident_mb = resident_megabytes(machine.daemon_pid)
        proportional_mb = proportional_megabytes(machine.daemon_pid)
        percent = trio.run(_processor_percent, machine.daemon_pid, watched_s)
        with stopwatch() as stopping:
            code = machine.machine.halt()
        if code != 0:
            raise CannotMeasure(f"the daemon did not end in order: exit code {code}")
    return Section(
        name="idle",
        title=f"{containers} idle containers",
        method=(
            f"{containers} containers of a static program that waits, each with its output "
            f"kept, started by requests {AT_ONCE} at a time until all are answered. The "
            f"daemon's memory right after that, 1 MB being 1,000,000 bytes; its processor time "
            f"over {watched_s:g} s, as a part of one core, when nobody asks for anything. The "
            "stop: the daemon is told to end, signals every container, clears everything away, "
            "and has ended."
        ),
        figures=(
            Figure(name="resident (VmRSS)", value=resident_mb, unit="MB", goal=MEMORY_GOAL),
            Figure(name="of it its own share (PSS)", value=proportional_mb, unit="MB"),
            Figure(name="resident without containers", value=empty_mb, unit="MB"),
            Figure(name="processor while idle", value=percent, unit="%", goal=PROCESSOR_GOAL),
            Figure(name="all started", value=starting_s, unit="s"),
            Figure(name="each started", value=starting_s / containers * 1000, unit="ms"),
            Figure(name="all stopped", value=stopping.seconds, unit="s"),
        ),
    )


async def _start_all(machine: ContainerMachine, containers: int) -> float:
    """Seconds; raises `CannotMeasure` unless all of them run."""
    async with machine.acond() as (client, acond):
        with stopwatch() as watch:
            await in_parallel(
                [partial(acond.start, number) for number in range(containers)], at_once=AT_ONCE
            )
        running = sum(view.state == "running" for view in await client.containers())
    if running != containers:
        raise CannotMeasure(f"only {running} of {containers} containers run")
    return watch.seconds


async def _processor_percent(pid: int, watched_s: float) -> float:
    """Of one core, while nobody asks for anything."""
    await trio.sleep(SETTLE_S)
    before = processor_seconds(pid)
    with stopwatch() as watch:
        await trio.sleep(watched_s)
    return (processor_seconds(pid) - before) / watch.seconds * 100
