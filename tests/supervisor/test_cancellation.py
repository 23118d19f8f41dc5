"""A load or a start cancelled at every checkpoint leaves everything agreeing."""

from __future__ import annotations

import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
import trio
from cancel_sweep import Operation, sweep

from supervisor import Allow, FileBlob, PluginContext, hookimpl
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
    Owner,
    in_memory_plugin,
    manifest,
    plugin,
    running,
)

TAR = b"a layer's bytes"
LAYER = digest_of("sha384", TAR)
OWNER = Owner("owner")
IMAGE = OWNER.sign(manifest(name="app:1", layers=[str(LAYER)], maxInstances=0))
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
    assert set(machine.runtime.running) == live
    assert set(machine.layers.mounted) == live
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
