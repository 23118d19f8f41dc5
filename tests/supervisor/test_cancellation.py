"""A load or a start cancelled at every checkpoint leaves everything agreeing."""

from __future__ import annotations

import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
import trio
from cancel_sweep import Operation, sweep
from trio.testing import wait_all_tasks_blocked

from supervisor import (
    Allow,
    ContainerSpec,
    ExitStatus,
    FileBlob,
    Invocation,
    LogSink,
    PluginContext,
    RunningContainer,
    StartReceipt,
    hookimpl,
)
from supervisor.formats.delegation import AliasStatement, statements_of
from supervisor.formats.digest import digest_of
from supervisor.formats.event_log import replay
from supervisor.formats.log_events import AdmitImagesEvent, StartContainerEvent, decode_event
from supervisor.formats.signature import SignedManifest
from supervisor.journal import Journal
from supervisor.plugin_host import LoadedPlugin
from supervisor.service import Supervisor
from supervisor.testing import (
    InMemory,
    InMemoryConfig,
    MemoryRuntime,
    Owner,
    in_memory_plugin,
    manifest,
    plugin,
    running,
)

TAR = b"a layer's bytes"
LAYER = digest_of("sha384", TAR)
OWNER = Owner("owner")
IMAGE = OWNER.sign(manifest(name="app:1", layers=[str(LAYER)], maxInstances=0, signals=[15]))
BLOB = FileBlob(file="/", blob_digest="sha256:x", media_type="tar", size_bytes=len(TAR))
Cancelling = Callable[[Operation], Awaitable[bool]]


class Pausing:
    """Gates and statements with checkpoints of their own, so that they are swept too."""

    Config = InMemoryConfig

    def __init__(self, config: InMemoryConfig, context: PluginContext) -> None:
        """Nothing to set up."""

    @hookimpl
    async def judge_image(self) -> Allow:
        await trio.lowlevel.checkpoint()
        return Allow()

    @hookimpl
    async def verify_layer(self) -> Allow:
        await trio.lowlevel.checkpoint()
        return Allow()

    @hookimpl
    async def judge_start(self) -> Allow:
        await trio.lowlevel.checkpoint()
        return Allow()

    @hookimpl
    async def delegation_statements(self, signed: SignedManifest) -> tuple[AliasStatement, ...]:
        await trio.lowlevel.checkpoint()
        return statements_of(signed)


async def load(supervisor: Supervisor) -> str:
    """By upload; whoever began one must end it, as a server does."""
    result = await supervisor.admit([IMAGE])
    if not supervisor.has_layer(LAYER):
        upload = await supervisor.upload_layer(LAYER, size_bytes=len(TAR))
        finishing = False
        try:
            await upload.write(TAR)
            finishing = True
            await supervisor.finish_layer(LAYER, upload)
        finally:
            if not finishing:
                await upload.abort()
    return result.image_ids[0]


async def load_by_fetching(supervisor: Supervisor) -> str:
    result = await supervisor.admit([IMAGE])
    await supervisor.fetch_layer(LAYER, BLOB)
    return result.image_ids[0]


def in_memory(folder: Path) -> tuple[list[LoadedPlugin], InMemory]:
    machine = in_memory_plugin(folder)
    assert isinstance(machine.plugin, InMemory)
    machine.plugin.layers.blobs[str(BLOB.blob_digest)] = TAR
    return [machine, plugin(Pausing, folder)], machine.plugin


def check(supervisor: Supervisor, machine: InMemory) -> None:
    """Register = log = memory; no bytes, mounts or processes that nothing accounts for."""
    measurement = supervisor._measurement
    digests = [record.digest_sha384 for record in measurement.records]
    assert measurement.halted is None
    assert machine.memory_registers.value == replay(digests)
    events = [decode_event(record.operation, record.content) for record in measurement.records]
    admitted = [
        image_id
        for event in events
        if isinstance(event, AdmitImagesEvent)
        for image_id in event.image_ids
    ]
    assert admitted == [view.image_id for view in supervisor.images()]
    started = [event.image_id for event in events if isinstance(event, StartContainerEvent)]
    live = {view.container_id for view in supervisor.containers() if view.state == "running"}
    assert {view.image_id for view in supervisor.containers()} <= set(started)
    kept = {view.container_id for view in supervisor.containers() if view.restartable} - live
    assert set(machine.runtime.running) == live
    assert set(machine.runtime.prepared) == live | kept
    assert set(machine.layers.mounted) == live | kept
    assert machine.layers.open_uploads == 0
    assert machine.layers.held_bytes == (len(TAR) if supervisor.has_layer(LAYER) else 0)


@pytest.mark.parametrize("load_once", [load, load_by_fetching])
def test_a_load_cancelled_at_every_checkpoint_leaves_everything_agreeing(
    load_once: Callable[[Supervisor], Awaitable[str]],
) -> None:
    finished_rounds = []

    async def one_round(cancelling: Cancelling) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            plugins, machine = in_memory(folder)
            async with running(plugins, folder) as supervisor:

                async def operation() -> None:
                    await load_once(supervisor)

                finished_rounds.append(await cancelling(operation))
                check(supervisor, machine)
                await load_once(supervisor)  # and the same works afterwards
                check(supervisor, machine)
                assert len(supervisor._measurement.records) == 2

    steps = sweep(one_round)
    assert steps >= 5
    assert finished_rounds[0] is False and finished_rounds[-1] is True


def test_a_start_cancelled_at_every_checkpoint_leaves_everything_agreeing() -> None:
    async def one_round(cancelling: Cancelling) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            plugins, machine = in_memory(folder)
            async with running(plugins, folder) as supervisor:
                image_id = await load(supervisor)

                async def operation() -> None:
                    await supervisor.start(image_id, [])

                await cancelling(operation)
                check(supervisor, machine)
                await supervisor.start(image_id, [])
                check(supervisor, machine)
                # However often it was started: one entry for the one thing that may run.
                assert len(supervisor._measurement.records) == 3

    assert sweep(one_round) >= 5


class Unhurried(MemoryRuntime):
    """Starts in several steps, so that each of them is swept."""

    async def start(
        self, spec: ContainerSpec, receipt: StartReceipt, log: LogSink
    ) -> RunningContainer:
        for _ in range(3):
            await trio.lowlevel.checkpoint()
        return await super().start(spec, receipt, log)


@pytest.mark.parametrize("ended", [False, True])
def test_a_restart_cancelled_at_every_checkpoint_leaves_everything_agreeing(ended: bool) -> None:
    outcomes: set[tuple[str, int, bool]] = set()

    async def one_round(cancelling: Cancelling) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            plugins, machine = in_memory(folder)
            machine.runtime = Unhurried()
            async with running(plugins, folder) as supervisor:
                container_id = await supervisor.start(await load(supervisor), [])
                if ended:
                    machine.runtime.running[container_id].end(ExitStatus(exit_code=0))
                    await wait_all_tasks_blocked()

                async def operation() -> None:
                    await supervisor.restart(container_id, timeout_s=30)

                finished = await cancelling(operation)
                await wait_all_tasks_blocked()
                check(supervisor, machine)
                (view,) = supervisor.containers()
                outcomes.add((view.state, view.restarts, view.restartable))
                assert not finished or (view.state, view.restarts) == ("running", 1)
                # What can still be restarted is, however far the cancelled one had come.
                if view.restartable:
                    await supervisor.restart(container_id, timeout_s=30)
                    check(supervisor, machine)
                assert len(supervisor._measurement.records) == 3

    assert sweep(one_round) >= 5
    untouched = ("exited", 0, True) if ended else ("running", 0, True)
    assert untouched in outcomes and ("running", 1, True) in outcomes
    # Freed, once its old run was gone and its new one was not there.
    assert ("exited", 0, False) in outcomes
    assert "starting" not in {state for state, _, _ in outcomes}


def test_an_invocation_cancelled_at_every_checkpoint_leaves_the_container_as_it_is() -> None:
    async def one_round(cancelling: Cancelling) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            plugins, machine = in_memory(folder)
            async with running(plugins, folder) as supervisor:
                container_id = await supervisor.start(await load(supervisor), [])
                asked = Invocation(entry_point="Run", capture_bytes=10, timeout_s=5)

                async def operation() -> None:
                    await supervisor.invoke(container_id, asked)

                await cancelling(operation)
                check(supervisor, machine)
                (view,) = supervisor.containers()
                assert view.state == "running"
                await supervisor.invoke(container_id, asked)

    assert sweep(one_round) >= 1


def test_a_shutdown_at_every_step_of_a_restart_leaves_nothing() -> None:
    """With a container that is kept, one that runs and one that is being restarted."""

    async def one_round(cancelling: Cancelling) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            plugins, machine = in_memory(folder)
            seen: list[Supervisor] = []

            async def operation() -> None:
                async with running(plugins, folder) as supervisor:
                    seen.append(supervisor)
                    image_id = await load(supervisor)
                    kept, _, restarted = [await supervisor.start(image_id, []) for _ in range(3)]
                    machine.runtime.running[kept].end(ExitStatus(exit_code=0))
                    await supervisor.restart(restarted, timeout_s=30)
                    assert set(machine.runtime.prepared) == {1, 2, 3}

            await cancelling(operation)
            assert machine.runtime.running == {}
            assert machine.runtime.prepared == {}
            assert machine.layers.mounted == {}
            for supervisor in seen:
                assert {view.state for view in supervisor.containers()} <= {"exited"}
                assert not any(view.restartable for view in supervisor.containers())
                assert list((folder / "sockets").iterdir()) == []

    assert sweep(one_round) >= 40


def test_a_seal_cancelled_at_every_checkpoint_is_either_there_or_not() -> None:
    async def one_round(cancelling: Cancelling) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            plugins, machine = in_memory(folder)
            async with running(plugins, folder) as supervisor:
                finished = await cancelling(supervisor.seal)
                sealed = msgspec.json.decode(supervisor.status())["sealed"]
                operations = [record.operation for record in supervisor._measurement.records]
                assert sealed == ("Seal" in operations)
                assert sealed or not finished
                check(supervisor, machine)

    assert sweep(one_round) >= 2


def test_a_shutdown_at_every_step_of_a_start_leaves_no_process_and_no_mount() -> None:
    """Here the whole supervisor is cancelled, not the caller."""

    async def one_round(cancelling: Cancelling) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            plugins, machine = in_memory(folder)

            async def operation() -> None:
                async with running(plugins, folder) as supervisor:
                    await supervisor.start(await load(supervisor), [])

            await cancelling(operation)
            assert machine.runtime.running == {}
            assert machine.layers.mounted == {}
            journal = Journal.open(folder / "journal")
            digests = [entry.record[14:62] for entry in journal.entries]
            journal.close()
            assert machine.memory_registers.value == replay(digests)

    assert sweep(one_round) >= 20
