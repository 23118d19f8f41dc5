"""How many hook calls a second go through eight gate plugins."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import trio

from benchmarks.figures import Figure, Goal, Section, stopwatch
from supervisor import Allow, ImageAdmitting, PluginContext, hookimpl
from supervisor.formats.signature import verify_signed_manifest
from supervisor.plugin_host import PluginHost
from supervisor.testing import InMemoryConfig, Owner, manifest, plugin

PLUGINS = 8
CALLS_GOAL = Goal(at_least=50_000)


class ReadyGate:
    """Answers without waiting for anything."""

    Config = InMemoryConfig

    def __init__(self, config: InMemoryConfig, context: PluginContext) -> None:
        self._allow = Allow()

    @hookimpl
    async def judge_image(self, event: ImageAdmitting) -> Allow:
        return self._allow


class WaitingGate(ReadyGate):
    """Lets trio run all other tasks before it answers."""

    @hookimpl
    async def judge_image(self, event: ImageAdmitting) -> Allow:
        await trio.lowlevel.checkpoint()
        return self._allow


def run(*, walks: int = 10_000, rounds: int = 5) -> Section:
    ready = _walks_a_second(ReadyGate, walks, rounds)
    waiting = _walks_a_second(WaitingGate, walks // 5 or 1, rounds)
    return Section(
        name="hook_calls",
        title="Hook calls",
        method=(
            f"`PluginHost.judge` walks {PLUGINS} gate plugins, each under its own deadline, with "
            f"its answer checked. A call is one plugin's implementation; a walk is all "
            f"{PLUGINS}, one after the other. The goal is counted in calls. Median of {rounds} "
            "rounds."
        ),
        figures=(
            Figure(name="calls", value=ready * PLUGINS, unit="a second", goal=CALLS_GOAL),
            Figure(name=f"walks through all {PLUGINS}", value=ready, unit="a second"),
            Figure(
                name="calls, when each gate passes a checkpoint",
                value=waiting * PLUGINS,
                unit="a second",
            ),
        ),
    )


def _walks_a_second(gate: type[ReadyGate], walks: int, rounds: int) -> float:
    upload = Owner("somebody").sign(manifest(name="app:1"))
    event = ImageAdmitting(
        signed=verify_signed_manifest(upload.manifest, upload.signature, upload.certificate_der)
    )
    samples: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        gates = [plugin(gate, Path(folder), name=f"gate_{number}") for number in range(PLUGINS)]
    host = PluginHost(gates)

    async def walk() -> None:
        for _ in range(rounds):
            with stopwatch() as watch:
                for _ in range(walks):
                    await host.judge("judge_image", event, item="app:1")
            samples.append(walks / watch.seconds)

    trio.run(walk)
    return statistics.median(samples)
