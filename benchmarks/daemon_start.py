"""How soon the daemon answers, and how much memory it then holds."""

from __future__ import annotations

import statistics

from benchmarks.figures import Figure, Goal, Section, require_root, stopwatch
from benchmarks.machine import PLUGINS, Machine
from benchmarks.process_figures import proportional_megabytes, resident_megabytes
from benchmarks.ram import ram_folder

READY_GOAL = Goal(at_most=1.0)
MEMORY_GOAL = Goal(at_most=64.0)


def run(*, rounds: int = 7) -> Section:
    require_root()
    ready: list[float] = []
    resident: list[float] = []
    proportional: list[float] = []
    with ram_folder() as folder, Machine(folder) as machine:
        machine.power_on()
        for _ in range(rounds):
            machine.boot()
            with stopwatch() as watch:
                daemon = machine.start_daemon()
            ready.append(watch.seconds)
            resident.append(resident_megabytes(daemon.pid))
            proportional.append(proportional_megabytes(daemon.pid))
            machine.halt()
    return Section(
        name="daemon_start",
        title="The daemon's start",
        method=(
            f"`acond` with {', '.join(PLUGINS)}: from before its process is made until its API "
            "has answered a request. Memory is read right after that; 1 MB is 1,000,000 bytes. "
            f"Median of {rounds} starts."
        ),
        figures=(
            Figure(name="ready", value=statistics.median(ready), unit="s", goal=READY_GOAL),
            Figure(
                name="resident (VmRSS)",
                value=statistics.median(resident),
                unit="MB",
                goal=MEMORY_GOAL,
            ),
            Figure(
                name="of it its own share (PSS)", value=statistics.median(proportional), unit="MB"
            ),
        ),
    )
