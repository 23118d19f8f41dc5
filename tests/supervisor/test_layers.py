"""Layers on their way in: shared while they come, cancelled with the last who waits."""

from __future__ import annotations

import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing
from cancel_sweep import Operation, sweep
from layer_machines import (
    LAYER,
    ONE,
    PYTHON,
    TAR,
    Delegation,
    SlowGate,
    admit,
    app,
    blob,
    deliver,
    machine_in,
    vendor_image,
)
from trio.testing import wait_all_tasks_blocked

from supervisor import (
    Conflict,
    DeadlineExceeded,
    DigestMismatch,
)
from supervisor.testing import (
    InMemory,
    MemoryLayers,
    plugin,
    running,
)


async def test_fetches_of_one_layer_share_a_transfer_that_outlives_the_first_caller(
    tmp_path: Path, autojump_clock: object
) -> None:
    store, plugins = machine_in(tmp_path, x=TAR)
    async with running(plugins, tmp_path) as supervisor:
        await admit(supervisor, app(LAYER))
        store.delay_s = 10
        before, first = trio.current_time(), trio.CancelScope()

        async def impatient() -> None:
            with first:
                await supervisor.fetch_layer(LAYER, blob("x"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(impatient)
            await trio.sleep(4)
            nursery.start_soon(supervisor.fetch_layer, LAYER, blob("x"))
            nursery.start_soon(supervisor.fetch_layer, LAYER, blob("x"))
            await trio.sleep(1)
            first.cancel()
        assert trio.current_time() - before == pytest.approx(10)
        assert (store.fetches, store.held_bytes) == (1, len(TAR))
        assert supervisor.has_layer(LAYER)


async def test_the_last_caller_that_goes_takes_the_transfer_along(
    tmp_path: Path, autojump_clock: object
) -> None:
    store, plugins = machine_in(tmp_path, x=TAR)
    async with running(plugins, tmp_path) as supervisor:
        await admit(supervisor, app(LAYER))
        store.delay_s = 10
        with trio.move_on_after(5):
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(supervisor.fetch_layer, LAYER, blob("x"))
        assert (store.fetches, store.fetching, store.held_bytes) == (1, 0, 0)
        assert not supervisor.has_layer(LAYER)
        await supervisor.fetch_layer(LAYER, blob("x"))
        assert store.fetches == 2


async def test_who_joins_a_transfer_does_not_prolong_it(
    tmp_path: Path, autojump_clock: object
) -> None:
    store, plugins = machine_in(tmp_path, x=TAR)
    refused_at_s: list[float] = []
    async with running(plugins, tmp_path, "[layers]\ntimeout_s = 9\n") as supervisor:
        await admit(supervisor, app(LAYER))
        store.delay_s = 100
        before = trio.current_time()

        async def fetch(after_s: float) -> None:
            await trio.sleep(after_s)
            with pytest.raises(DeadlineExceeded, match=r"layers\.timeout_s"):
                await supervisor.fetch_layer(LAYER, blob("x"))
            refused_at_s.append(trio.current_time() - before)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch, 0)
            nursery.start_soon(fetch, 8)
        assert refused_at_s == pytest.approx([9, 9])
        assert store.fetching == 0
    # Observers hear of one refusal: there was one transfer.
    ears = plugins[1].plugin
    assert isinstance(ears, Delegation) and len(ears.refused) == 1


async def test_wrong_bytes_are_told_to_every_caller_and_freed(
    tmp_path: Path, autojump_clock: object
) -> None:
    store, plugins = machine_in(tmp_path, x=b"other bytes")
    errors: list[DigestMismatch] = []
    async with running(plugins, tmp_path) as supervisor:
        await admit(supervisor, app(LAYER))
        store.delay_s = 1

        async def fetch() -> None:
            with pytest.raises(DigestMismatch) as caught:
                await supervisor.fetch_layer(LAYER, blob("x"))
            errors.append(caught.value)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(fetch)
        assert len({id(error) for error in errors}) == 3
        assert {error.expected for error in errors} == {LAYER.hex}
        assert (store.fetches, store.held_bytes) == (1, 0)


async def test_a_shutdown_ends_transfers_before_the_store_goes(
    tmp_path: Path, autojump_clock: object
) -> None:
    store, plugins = machine_in(tmp_path, x=TAR)
    told: list[Conflict] = []
    async with trio.open_nursery() as nursery:
        async with running(plugins, tmp_path) as supervisor:
            await admit(supervisor, app(LAYER))
            store.delay_s = 3600

            async def fetch() -> None:
                with pytest.raises(Conflict, match="shutting down") as caught:
                    await supervisor.fetch_layer(LAYER, blob("x"))
                told.append(caught.value)

            nursery.start_soon(fetch)
            await wait_all_tasks_blocked()
            assert store.fetching == 1
        assert store.fetching == 0
    assert len(told) == 1
    with pytest.raises(Conflict, match="shutting down"):
        await supervisor.fetch_layer(LAYER, blob("x"))


async def test_an_upload_of_what_is_being_fetched_is_refused_before_and_after_its_bytes(
    tmp_path: Path, autojump_clock: object
) -> None:
    store, plugins = machine_in(tmp_path, x=TAR)
    async with running(plugins, tmp_path) as supervisor:
        await admit(supervisor, app(LAYER))
        early = await supervisor.upload_layer(LAYER, size_bytes=len(TAR))
        await early.write(TAR)
        store.delay_s = 10
        async with trio.open_nursery() as nursery:
            nursery.start_soon(supervisor.fetch_layer, LAYER, blob("x"))
            await trio.sleep(1)
            with pytest.raises(Conflict, match="being fetched"):
                await supervisor.upload_layer(LAYER, size_bytes=len(TAR))
            with pytest.raises(Conflict, match="being delivered"):
                await supervisor.finish_layer(LAYER, early)
        assert (store.held_bytes, store.open_uploads) == (len(TAR), 0)


async def test_a_fetch_of_what_was_just_uploaded_waits_for_its_verification(
    tmp_path: Path, autojump_clock: object
) -> None:
    store, plugins = machine_in(tmp_path)
    async with running([plugins[0], plugin(SlowGate, tmp_path)], tmp_path) as supervisor:
        await admit(supervisor, app(LAYER))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(deliver, supervisor, TAR)
            await trio.sleep(1)
            await supervisor.fetch_layer(LAYER, blob("nowhere"))
            assert supervisor.has_layer(LAYER)
        assert (store.fetches, store.held_bytes) == (0, len(TAR))


def test_the_first_of_two_fetches_cancelled_at_every_step_takes_nothing_from_the_other() -> None:
    async def one_round(cancelling: Callable[[Operation], Awaitable[bool]]) -> None:
        with tempfile.TemporaryDirectory() as name:
            store, plugins = machine_in(Path(name), x=TAR)
            async with running(plugins, Path(name)) as supervisor:
                await admit(supervisor, app(LAYER))
                async with trio.open_nursery() as nursery:

                    async def operation() -> None:
                        nursery.start_soon(supervisor.fetch_layer, LAYER, blob("x"))
                        await supervisor.fetch_layer(LAYER, blob("x"))

                    await cancelling(operation)
                began = store.fetches
                assert supervisor.has_layer(LAYER) == (began > 0)
                await supervisor.fetch_layer(LAYER, blob("x"))
                assert store.held_bytes == len(TAR)

    assert sweep(one_round) >= 4


async def test_after_a_restart_a_layer_is_missing_and_is_fetched_without_a_second_admission(
    tmp_path: Path,
) -> None:
    """The register lives on, the store's memory does not."""
    store, plugins = machine_in(tmp_path, x=TAR)
    async with running(plugins, tmp_path) as supervisor:
        image_id = await admit(supervisor, app(LAYER, PYTHON), vendor_image(ONE, "python:1"))
        await supervisor.fetch_layer(LAYER, blob("x"))
        await deliver(supervisor, b"one")
        await supervisor.start(image_id, [])
        await supervisor.seal()
    machine = plugins[0].plugin
    assert isinstance(machine, InMemory)
    machine.layers = MemoryLayers()
    machine.layers.blobs = store.blobs
    async with running(plugins, tmp_path) as again:
        (view, _) = again.images()
        assert view.missing_layers == (str(LAYER), str(ONE))
        with pytest.raises(Conflict, match="before its layers are here"):
            await again.start(image_id, [])
        await again.fetch_layer(LAYER, blob("x"))
        await deliver(again, b"one")
        await again.start(image_id, [])
        assert again.images()[0].missing_layers == ()
        assert len(again._measurement.records) == 4
