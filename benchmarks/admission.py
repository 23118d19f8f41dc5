"""How fast signed manifests are admitted, from bytes to a measured image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import trio

from benchmarks.cores import one_core
from benchmarks.figures import Figure, Goal, Section, Stopwatch, stopwatch
from benchmarks.ram import ram_folder
from plugins.csp_delegation import CspDelegation
from supervisor.measurement import in_worker_thread
from supervisor.operations import ManifestUpload
from supervisor.testing import Owner, in_memory_plugin, manifest, plugin, running

GOAL = Goal(at_least=300)


def run(*, images: int = 300) -> Section:
    owner = Owner("somebody")
    uploads = [
        owner.sign(manifest(name=f"app-{number}:1", accepts=[f"{owner.signer}/*"]))
        for number in range(images)
    ]
    third = max(images // 3, 1)
    with one_core(), ram_folder() as folder:
        watches = trio.run(_admit_each, uploads, folder)
    return Section(
        name="admission",
        title="Admission",
        method=(
            f"{images} images, one after the other, each signed with ECDSA P-384, accepting its "
            "owner and rejecting all others: signature, strict parsing, launch policy over all "
            "admitted so far, delegation plugin, gates, journal on a tmpfs, register (in "
            "memory). The whole process, threads included, is held on one core. Processor time "
            "is what it used of that core; by the clock, other programs' use of the core is in "
            "it as well. The launch policy is judged over all images anew each time, so the "
            "rate falls as they become many."
        ),
        figures=(
            Figure(
                name="admissions in a second of one core",
                value=_rate([watch.processor_seconds for watch in watches]),
                unit="a second",
                goal=GOAL,
            ),
            Figure(
                name=f"the first {third} of them",
                value=_rate([watch.processor_seconds for watch in watches[:third]]),
                unit="a second",
            ),
            Figure(
                name=f"the last {third} of them",
                value=_rate([watch.processor_seconds for watch in watches[-third:]]),
                unit="a second",
            ),
            Figure(
                name="all of them, by the clock",
                value=_rate([watch.seconds for watch in watches]),
                unit="a second",
            ),
        ),
    )


def _rate(seconds: Sequence[float]) -> float:
    return len(seconds) / sum(seconds)


async def _admit_each(uploads: Sequence[ManifestUpload], folder: Path) -> list[Stopwatch]:
    plugins = [in_memory_plugin(folder), plugin(CspDelegation, folder)]
    watches = []
    async with running(plugins, folder, run_blocking=in_worker_thread) as supervisor:
        for upload in uploads:
            with stopwatch() as watch:
                await supervisor.admit([upload])
            watches.append(watch)
    return watches
