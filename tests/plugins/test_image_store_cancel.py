"""Cancelled anywhere, the store leaves nothing: no mount, folder, memory file or byte."""

from __future__ import annotations

import functools
import gzip
import itertools
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
import zstandard
from cancel_sweep import Operation, Round, sweep
from image_store_rig import (
    NOTHING,
    Layout,
    Rig,
    ShownRoot,
    descriptors,
    entry,
    expected_for,
    folder,
    make_tar,
    memory_files,
    running,
    verified,
)
from inflate_rig import children, pipes

from plugins.image_store.arrival.upload import FLUSH_BYTES

pytestmark = pytest.mark.root

TAR = make_tar(folder("d"), *(entry(f"d/{i}", bytes(70_000)) for i in range(20)))
EXPECTED = expected_for(TAR)
Cancelling = Callable[[Operation], Awaitable[bool]]


async def upload_round(cancelling: Cancelling) -> None:
    before = memory_files()
    with tempfile.TemporaryDirectory() as directory:
        async with running(Path(directory)) as rig:

            async def operation() -> None:
                upload = await rig.store.upload(EXPECTED, size_bytes=None)
                try:
                    for start in range(0, len(TAR), FLUSH_BYTES):
                        await upload.write(TAR[start : start + FLUSH_BYTES])
                    await rig.store.discard(await upload.finish())
                finally:
                    await upload.abort()

            await cancelling(operation)
            assert rig.leftovers() == NOTHING
            assert memory_files() == before


async def finish_round(cancelling: Cancelling) -> None:
    """`finish` alone cleans up after itself, even if nobody calls `abort`."""
    before = memory_files()
    with tempfile.TemporaryDirectory() as directory:
        async with running(Path(directory)) as rig:
            upload = await rig.store.upload(EXPECTED, size_bytes=None)
            await upload.write(TAR)
            finished = False

            async def operation() -> None:
                nonlocal finished
                await rig.store.discard(await upload.finish())
                finished = True

            if not await cancelling(operation) and not finished:
                await upload.abort()
            assert rig.leftovers() == NOTHING
            assert memory_files() == before


async def fetch_round(kind: str, cancelling: Cancelling) -> None:
    """Also no process is left, and no pipe to one."""
    before = memory_files(), children(), pipes()
    blob = {"+gzip": gzip.compress(TAR), "+zstd": zstandard.compress(TAR), "": TAR}[kind]
    with tempfile.TemporaryDirectory() as directory:
        layout = Layout(Path(directory) / "layout")
        source = layout.add(blob, media_type=f"application/vnd.oci.image.layer.v1.tar{kind}")
        async with running(Path(directory), file_roots=[directory]) as rig:

            async def operation() -> None:
                await rig.store.discard(await rig.store.fetch(EXPECTED, source))

            await cancelling(operation)
            assert rig.leftovers() == NOTHING
            assert (memory_files(), children(), pipes()) == before


async def prepare_round(cancelling: Cancelling) -> None:
    before = memory_files()
    with tempfile.TemporaryDirectory() as directory:
        async with running(Path(directory)) as rig:
            layer = verified(await rig.send(TAR))
            finished = await cancelling(functools.partial(rig.store.prepare, layer))
            if not finished and memory_files() > before:
                # Not prepared: the sealed bytes are as they were, and it can be tried again.
                assert rig.leftovers() == ([], [], [], len(TAR))
            await rig.store.prepare(layer)
            await rig.store.discard(layer.stored)
            assert rig.leftovers() == NOTHING
            assert memory_files() == before


async def mount_round(id_shift: str, cancelling: Cancelling) -> None:
    with tempfile.TemporaryDirectory() as directory:
        async with running(Path(directory), id_shift=id_shift) as rig:
            layer = await rig.add(TAR)
            before = rig.leftovers(), descriptors()
            mounted: list[ShownRoot] = []

            async def operation() -> None:
                mounted.append(await rig.mount(layer, writable=True))

            finished = await cancelling(operation)
            assert finished == bool(mounted)
            if finished:
                await mounted[0].close()
            assert (rig.leftovers(), descriptors()) == before
            again = await rig.mount(layer, writable=True)
            await again.close()
            await rig.store.discard(layer.stored)
            assert rig.leftovers() == NOTHING


async def close_round(cancelling: Cancelling) -> None:
    with tempfile.TemporaryDirectory() as directory:
        async with running(Path(directory)) as rig:
            layer = await rig.add(TAR)
            before = descriptors()
            root = await rig.mount(layer, writable=True)

            async def operation() -> None:
                await rig.store.discard(layer.stored)
                await root.close()

            await cancelling(operation)
            await root.close()
            assert descriptors() == before
            await rig.store.discard(layer.stored)
            assert rig.leftovers() == NOTHING


async def open_round(cancelling: Cancelling) -> None:
    with tempfile.TemporaryDirectory() as directory:

        async def operation() -> None:
            async with running(Path(directory)):
                await trio.lowlevel.checkpoint()

        await cancelling(operation)
        async with running(Path(directory)) as rig:
            assert rig.leftovers() == NOTHING


ARRIVAL_ROUNDS: dict[str, Round] = {
    "upload": upload_round,
    "finish": finish_round,
    "fetch-gzip": functools.partial(fetch_round, "+gzip"),
    "fetch-zstd": functools.partial(fetch_round, "+zstd"),
    "fetch-tar": functools.partial(fetch_round, ""),
}
MOUNT_ROUNDS: dict[str, Round] = {
    "prepare": prepare_round,
    "mount": functools.partial(mount_round, "idmap"),
    "mount-copy": functools.partial(mount_round, "copy"),
    "close": close_round,
    "open": open_round,
}


@pytest.mark.parametrize("which", list(ARRIVAL_ROUNDS))
def test_an_arrival_cancelled_at_every_step_leaves_nothing(which: str) -> None:
    # Threads and mounts work in real time, so the clock is real, too.
    assert sweep(ARRIVAL_ROUNDS[which], mock_clock=False) >= 2


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("which", list(MOUNT_ROUNDS))
def test_a_mount_cancelled_at_every_step_leaves_nothing(which: str) -> None:
    assert sweep(MOUNT_ROUNDS[which], mock_clock=False) >= 2


@contextmanager
def cancel_inside_thread(
    monkeypatch: pytest.MonkeyPatch, scope: trio.CancelScope, at: int
) -> Iterator[list[int]]:
    """Cancel `scope` from within the work, when a thread looks for the n-th time."""
    counter = itertools.count(1)
    seen: list[int] = []
    look = trio.from_thread.check_cancelled

    def looking() -> None:
        seen.append(next(counter))
        if seen[-1] == at:
            trio.from_thread.run_sync(scope.cancel)
        look()

    with monkeypatch.context() as patch:
        patch.setattr(trio.from_thread, "check_cancelled", looking)
        yield seen


Work = Callable[[Rig, Layout], Awaitable[None]]


async def prepare_work(rig: Rig, layout: Layout) -> None:
    stored = await rig.send(TAR)
    try:
        await rig.store.prepare(verified(stored))
    finally:
        await rig.store.discard(stored)


async def mount_work(rig: Rig, layout: Layout) -> None:
    layer = verified(await rig.send(TAR))
    with trio.CancelScope(shield=True):
        await rig.store.prepare(layer)
    try:
        root = await rig.mount(layer)
        await root.close()
    finally:
        await rig.store.discard(layer.stored)


@pytest.mark.parametrize("work", [prepare_work, mount_work])
@pytest.mark.parametrize("id_shift", ["idmap", "copy"])
@pytest.mark.usefixtures("both_ways")
async def test_cancelled_at_every_look_inside_a_thread_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: Work, id_shift: str
) -> None:
    before = memory_files()
    layout = Layout(tmp_path / "layout")
    async with running(tmp_path, file_roots=[str(tmp_path)], id_shift=id_shift) as rig:
        for at in itertools.count(1):
            with (
                trio.CancelScope() as scope,
                cancel_inside_thread(monkeypatch, scope, at) as looks,
            ):
                await work(rig, layout)
            assert rig.leftovers() == NOTHING
            assert memory_files() == before
            if len(looks) < at:
                break
        assert at > 3


async def test_a_cancelled_write_has_taken_all_or_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        upload = await rig.store.upload(EXPECTED, size_bytes=len(TAR))
        for start in itertools.count(step=100_000):
            if start >= len(TAR):
                break
            with trio.CancelScope() as scope:
                scope.cancel()
                await upload.write(TAR[start : start + 100_000])
            received_bytes = upload.received_bytes
            assert received_bytes in (start, min(start + 100_000, len(TAR)))
            if received_bytes == start:
                await upload.write(TAR[start : start + 100_000])
        stored = await upload.finish()
        assert stored.computed["sha384"] == EXPECTED.hex
        await rig.store.discard(stored)
