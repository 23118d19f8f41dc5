"""What it costs to measure an event, beside the bare extension of a register."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Sequence
from pathlib import Path

import trio

from benchmarks.figures import Figure, Section, median_seconds, stopwatch
from benchmarks.machine import Machine
from benchmarks.ram import ram_folder
from plugins.tdx_sim.client import SimRegisters
from supervisor.formats.log_events import StartContainerEvent, StartEvent
from supervisor.identity import own_component
from supervisor.journal import Journal
from supervisor.measurement import Measurement
from supervisor.seams import Registers
from supervisor.testing import MemoryRegisters

RTMR = 3
TIMEOUT_S = 30


def run(*, events: int = 500) -> Section:
    with ram_folder() as folder, Machine(folder) as machine:
        machine.power_on()
        simulated = SimRegisters(machine.td_socket, RTMR, timeout_s=TIMEOUT_S)
        whole = trio.run(_measure, simulated, folder / "journal-simulated", events)
        bare = _extend(simulated, events)
        in_memory = trio.run(_measure, MemoryRegisters(), folder / "journal-memory", events)
    return Section(
        name="measuring",
        title="Measuring an event",
        method=(
            f"{events} container starts recorded one after the other: journal on a tmpfs, "
            "extension in a worker thread, the register read back and compared. Beside it the "
            "bare extension of the same register of the software TD, a process of its own; and "
            "the same with a register in this process, which leaves our own share. For "
            "information; no goal."
        ),
        figures=(
            Figure(name="measured event, software TD", value=whole * 1000, unit="ms"),
            Figure(name="bare extension, software TD", value=bare * 1000, unit="ms"),
            Figure(name="measured beside bare", value=whole / bare, unit="times"),
            Figure(name="measured event, register in memory", value=in_memory * 1000, unit="ms"),
        ),
    )


async def _measure(registers: Registers, path: Path, events: int) -> float:
    measurement = Measurement([("registers", registers)], Journal.open(path), rtmr_index=RTMR)
    samples: list[float] = []
    try:
        await measurement.recover()
        async with measurement.writing() as log:
            await log.record_start(
                StartEvent(components=(own_component(),), config_digest_sha384="00" * 48)
            )
        for event in _starts(events):
            with stopwatch() as watch:
                async with measurement.writing() as log:
                    await log.record_container(event)
            samples.append(watch.seconds)
    finally:
        measurement.close()
    return statistics.median(samples)


def _starts(count: int) -> Sequence[StartContainerEvent]:
    """Different ones: the same start is measured once only."""
    image_id = "/".join(["sha384", "ab" * 48, "cd" * 48])
    layer = f"sha384/{'ef' * 48}"
    return [
        StartContainerEvent(
            image_id=image_id,
            layers=(layer,),
            delegations=(),
            argv=("/bin/app",),
            environment=(f"NUMBER={number}",),
        )
        for number in range(count)
    ]


def _extend(registers: Registers, rounds: int) -> float:
    digest = hashlib.sha384(b"anything").digest()
    return median_seconds(lambda: registers.extend(digest), rounds=rounds)
