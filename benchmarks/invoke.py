"""A command in a container that runs, beside `runc exec` and `podman exec`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import trio

from acon.client import Client
from benchmarks.bare_runtime import require_runc
from benchmarks.compare import beside
from benchmarks.container_machine import ContainerMachine, container_machine
from benchmarks.figures import CannotMeasure, Figure, Section, median_ms, stopwatch
from benchmarks.podman import Podman, podman_storage
from benchmarks.program_image import ENTRY_POINT, ENTRY_POINT_PATH
from benchmarks.programs import run_program
from supervisor import Invocation

RUNC_GOAL = 1.3
ACOND, RUNC, PODMAN = "acond", "runc exec", "podman exec"
CAPTURE_BYTES = 65_536
TIMEOUT_S = 30
# The number of the one container that everyone has.
_NUMBER = 1

Samples = dict[str, list[float]]
Call = Callable[[], Awaitable[None]]


def run(*, rounds: int = 100) -> Section:
    require_runc()
    with container_machine() as machine:
        samples, left_out = trio.run(_compare, machine, rounds)
    return Section(
        name="invoke",
        title="A command in a running container",
        method=(
            f"An entry point that runs busybox's `true`, from the request until its end is "
            f"known. `{ACOND}`: a request over its Unix socket; input and both outputs are "
            f"connected. `{RUNC}`: of the same command in the same container. `{PODMAN}`: of "
            "the same command in a container of Podman's, host's network, without a user "
            f"namespace. In turn, {rounds} of each, medians."
        ),
        figures=tuple(_figures(samples)),
        left_out=left_out,
    )


def _figures(samples: Samples) -> Iterator[Figure]:
    medians_ms = {name: median_ms(seconds) for name, seconds in samples.items()}
    for name, value in medians_ms.items():
        yield Figure(name=name, value=value, unit="ms")
    for name, goal in ((RUNC, RUNC_GOAL), (PODMAN, None)):
        if name in medians_ms:
            yield beside(
                medians_ms[ACOND], medians_ms[name], what=ACOND, other_name=name, at_most=goal
            )


async def _compare(machine: ContainerMachine, rounds: int) -> tuple[Samples, tuple[str, ...]]:
    left_out: list[str] = []
    folder = machine.machine.folder
    async with AsyncExitStack() as stack:
        client, acond = await stack.enter_async_context(machine.acond())
        await acond.start(_NUMBER)
        container_id = acond.id_of(_NUMBER)
        state = ("--root", str(machine.machine.runtime_files / "state"))
        runc_exec = (require_runc(), *state, "exec", str(container_id), ENTRY_POINT_PATH)
        calls: dict[str, Call] = {
            ACOND: lambda: _invoke(client, container_id),
            RUNC: lambda: run_program(runc_exec, folder / "exec-log"),
        }
        try:
            calls[PODMAN] = await _podman_call(stack, machine.layer, folder)
        except CannotMeasure as error:
            left_out.append(str(error))
        samples: Samples = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                with stopwatch() as watch:
                    await call()
                samples[name].append(watch.seconds)
    return samples, tuple(left_out)


async def _invoke(client: Client, container_id: int) -> None:
    invocation = Invocation(
        entry_point=ENTRY_POINT, capture_bytes=CAPTURE_BYTES, timeout_s=TIMEOUT_S
    )
    invoked = await client.invoke(container_id, invocation)
    if invoked.exit_code != 0:
        raise CannotMeasure(f"the entry point failed: {invoked}")


async def _podman_call(stack: AsyncExitStack, layer: Path, folder: Path) -> Call:
    """Its container ends with `stack`. Raises `CannotMeasure`."""
    storage = await stack.enter_async_context(podman_storage(require_runc(), layer, folder))
    podman = Podman(storage, name="podman")
    await podman.start(_NUMBER)
    stack.push_async_callback(podman.end, _NUMBER)
    command = (*storage.command, "exec", podman.container(_NUMBER), ENTRY_POINT_PATH)
    return lambda: run_program(command, folder / "exec-log")
