"""The plugin as the supervisor sees it: hooks, uploads, and its life."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import msgspec
import pytest
import trio
from image_store_rig import (
    NOTHING,
    entry,
    expected_for,
    make_plugin,
    make_tar,
    memory_files,
    running,
    verified,
)

from plugins.image_store import ImageStore
from plugins.image_store.arrival.upload import FLUSH_BYTES
from plugins.image_store.config import StoreConfig
from plugins.image_store.mount.kernel import idmapped_clone, mounts_under
from supervisor import (
    Allow,
    Busy,
    ConfigError,
    Conflict,
    Deny,
    FileBlob,
    LayerFetched,
    LayerFreed,
    LayerProgress,
    RuntimeFailed,
    StoredLayer,
    UnknownItem,
    Untrusted,
)
from supervisor.testing import plugin as load_plugin

TAR = make_tar(entry("f", os.urandom(3 * FLUSH_BYTES)))
EXPECTED = expected_for(TAR)


def fetched(expected: str, computed: dict[str, str]) -> LayerFetched:
    return LayerFetched(
        expected=expected, computed=tuple(computed.items()), size_bytes=1, source="test"
    )


async def test_the_gate_allows_only_the_digest_that_was_asked_for(tmp_path: Path) -> None:
    plugin = make_plugin(tmp_path / "store", [])
    right, wrong = "ab" * 48, "cd" * 48
    sha384 = f"sha384/{right}"
    assert await plugin.verify_layer(fetched(sha384, {"sha384": right})) == Allow()
    sha512 = f"sha512/{'ab' * 64}"
    assert await plugin.verify_layer(fetched(sha512, {"sha512": "ab" * 64})) == Allow()
    for expected, computed in (
        (sha384, {"sha384": wrong}),
        (sha384, {"sha384": right.upper()}),
        (sha384, {"sha384": ""}),
        (sha384, {"sha512": right}),
        (sha384, {}),
        (sha512, {"sha384": right, "sha512": "ab" * 63}),
        ("sha384/", {"sha384": ""}),
        ("md5/" + "ab" * 16, {"md5": "ab" * 16}),
        ("", {"": ""}),
    ):
        assert isinstance(await plugin.verify_layer(fetched(expected, computed)), Deny)


async def test_a_refusal_of_the_gate_names_both_digests(tmp_path: Path) -> None:
    plugin = make_plugin(tmp_path / "store", [])
    event = fetched(f"sha384/{'ab' * 48}", {"sha384": "cd" * 48})
    verdict = await plugin.verify_layer(event)
    assert isinstance(verdict, Deny)
    assert "ab" * 48 in verdict.reason
    assert "cd" * 48 in verdict.reason


def test_the_plugin_follows_the_supervisor_s_contract(tmp_path: Path) -> None:
    loaded = load_plugin(ImageStore, tmp_path, name="image_store")
    assert isinstance(loaded.plugin, ImageStore)
    with pytest.raises(ConfigError):
        load_plugin(ImageStore, tmp_path, table={"no_such_setting": 1})
    for table in ({"budget_bytes": 0}, {"id_shift": "guess"}, {"max_entries": 0}):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(table, StoreConfig)


@pytest.mark.root
async def test_lifespan_holds_the_store_and_cleans_up_when_cancelled(tmp_path: Path) -> None:
    plugin = make_plugin(tmp_path / "store", [], budget_bytes=8 << 20)
    store = await plugin.layer_store()
    with pytest.raises(RuntimeFailed):
        await store.upload(EXPECTED, size_bytes=None)
    async with trio.open_nursery() as nursery:
        await nursery.start(plugin.lifespan)
        upload = await store.upload(EXPECTED, size_bytes=None)
        await upload.write(TAR)
        nursery.cancel_scope.cancel()
    assert mounts_under(os.fsencode(tmp_path)) == []
    assert list((tmp_path / "store").iterdir()) == []
    with pytest.raises(RuntimeFailed):
        await store.upload(EXPECTED, size_bytes=None)


@pytest.mark.root
async def test_an_upload_in_pieces_is_stored_with_its_digests(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        wanted = expected_for(TAR, "sha512")
        upload = await rig.store.upload(wanted, size_bytes=len(TAR))
        assert rig.store.budget.used_bytes == len(TAR)
        for start in range(0, len(TAR), 100_003):
            assert upload.received_bytes == start
            await upload.write(TAR[start : start + 100_003])
        stored = await upload.finish()
        assert stored.expected == wanted
        assert stored.size_bytes == upload.received_bytes == len(TAR)
        assert stored.computed == {
            name: hashlib.new(name, TAR).hexdigest() for name in ("sha384", "sha512")
        }
        # What the supervisor does after every finish.
        await upload.abort()
        await rig.store.prepare(verified(stored))
        await rig.store.discard(stored)
        assert rig.leftovers() == NOTHING
        freed = [event for event in rig.events if isinstance(event, LayerFreed)]
        assert freed == [LayerFreed(digest=str(wanted), size_bytes=len(TAR))]


@pytest.mark.root
async def test_an_upload_of_unknown_size_takes_memory_as_it_grows(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        upload = await rig.store.upload(EXPECTED, size_bytes=None)
        assert rig.store.budget.used_bytes == 0
        await upload.write(TAR)
        assert rig.store.budget.used_bytes == len(TAR)
        await upload.abort()
        await upload.abort()
        assert rig.leftovers() == NOTHING


@pytest.mark.root
@pytest.mark.parametrize("size_bytes", [None, 2 * FLUSH_BYTES])
async def test_a_byte_beyond_the_limit_ends_an_upload_at_once(
    tmp_path: Path, size_bytes: int | None
) -> None:
    async with running(tmp_path, max_layer_bytes=2 * FLUSH_BYTES) as rig:
        upload = await rig.store.upload(EXPECTED, size_bytes=size_bytes)
        await upload.write(bytes(2 * FLUSH_BYTES))
        with pytest.raises(Untrusted) as refused:
            await upload.write(b"x")
        assert refused.value.item == str(EXPECTED)
        await upload.abort()
        assert rig.leftovers() == NOTHING


@pytest.mark.root
async def test_an_upload_that_is_short_is_refused_and_freed(tmp_path: Path) -> None:
    before = memory_files()
    async with running(tmp_path) as rig:
        upload = await rig.store.upload(EXPECTED, size_bytes=len(TAR))
        await upload.write(TAR[:-1])
        with pytest.raises(Untrusted) as refused:
            await upload.finish()
        assert refused.value.expected == f"{len(TAR)} bytes"
        assert refused.value.actual == f"{len(TAR) - 1} bytes"
        assert rig.leftovers() == NOTHING
        assert memory_files() == before
        with pytest.raises(RuntimeError):
            await upload.finish()
        with pytest.raises(RuntimeError):
            await upload.write(b"x")


@pytest.mark.root
async def test_what_cannot_fit_is_refused_before_a_byte_moves(tmp_path: Path) -> None:
    async with running(tmp_path, budget_bytes=4 << 20, max_layer_bytes=8 << 20) as rig:
        for size_bytes in (-1, (8 << 20) + 1):
            with pytest.raises(Untrusted):
                await rig.store.upload(EXPECTED, size_bytes=size_bytes)
        with pytest.raises(Busy):
            await rig.store.upload(EXPECTED, size_bytes=(4 << 20) + 1)
        first = await rig.store.upload(EXPECTED, size_bytes=3 << 20)
        with pytest.raises(Busy):
            await rig.store.upload(EXPECTED, size_bytes=2 << 20)
        growing = await rig.store.upload(EXPECTED, size_bytes=None)
        with pytest.raises(Busy):
            await growing.write(bytes(2 << 20))
        for upload in (first, growing):
            await upload.abort()
        assert rig.leftovers() == NOTHING


@pytest.mark.root
async def test_uploads_at_once_are_bounded(tmp_path: Path) -> None:
    async with running(tmp_path, max_uploads=2) as rig:
        uploads = [await rig.store.upload(EXPECTED, size_bytes=None) for _ in range(2)]
        with pytest.raises(Busy):
            await rig.store.upload(EXPECTED, size_bytes=None)
        await uploads[0].abort()
        uploads.append(await rig.store.upload(EXPECTED, size_bytes=None))
        for upload in uploads:
            await upload.abort()


@pytest.mark.root
async def test_a_tree_that_does_not_fit_is_refused_and_the_sealed_bytes_stay(
    tmp_path: Path,
) -> None:
    tar = make_tar(*(entry(f"{i}", b"x") for i in range(200)))
    # The tar fits, its files (a page each) do not fit beside it.
    async with running(tmp_path, mount="unpack", budget_bytes=len(tar) + (512 << 10)) as rig:
        layer = verified(await rig.send(tar))
        with pytest.raises(Busy):
            await rig.store.prepare(layer)
        assert rig.store.budget.used_bytes == len(tar)
        assert os.listdir(rig.runtime_dir / "store" / "layers") == []
        await rig.store.discard(layer.stored)
        assert rig.leftovers() == NOTHING


@pytest.mark.root
async def test_an_index_that_does_not_fit_is_refused_and_the_sealed_bytes_stay(
    tmp_path: Path,
) -> None:
    tar = make_tar(*(entry(f"{i}", b"x") for i in range(200)))
    async with running(tmp_path, mount="erofs", budget_bytes=len(tar) + 4096) as rig:
        layer = verified(await rig.send(tar))
        with pytest.raises(Busy):
            await rig.store.prepare(layer)
        assert rig.store.budget.used_bytes == len(tar)
        assert os.listdir(rig.runtime_dir / "store" / "layers") == []
        await rig.store.discard(layer.stored)
        assert rig.leftovers() == NOTHING


@pytest.mark.root
async def test_a_prepared_layer_gives_its_tar_s_memory_back(tmp_path: Path) -> None:
    before = memory_files()
    async with running(tmp_path) as rig:
        layer = await rig.add(TAR)
        assert memory_files() == before
        assert rig.store.budget.used_bytes < len(TAR) + 10_000
        await rig.store.prepare(layer)


@pytest.mark.root
async def test_two_deliveries_of_one_layer_do_not_share_their_fate(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        first = await rig.add(TAR)
        second = await rig.send(TAR)
        await rig.store.discard(second)
        root = await rig.mount(first)
        assert (root.path / "f").stat().st_size == 3 * FLUSH_BYTES
        await root.close()


@pytest.mark.root
async def test_a_layer_must_be_known_and_prepared_to_be_mounted(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        layer = verified(await rig.send(TAR))
        with pytest.raises(Conflict):
            await rig.mount(layer)
        stranger = verified(
            StoredLayer(expected=EXPECTED, computed={}, size_bytes=1, source="another store")
        )
        with pytest.raises(UnknownItem):
            await rig.store.prepare(stranger)
        await rig.store.discard(stranger.stored)
        assert rig.store.budget.used_bytes == len(TAR)


@pytest.mark.root
async def test_preparing_at_the_same_time_unpacks_once(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        layer = verified(await rig.send(TAR))
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(rig.store.prepare, layer)
        assert len(os.listdir(rig.runtime_dir / "store" / "layers")) == 1


@pytest.mark.root
async def test_a_layer_discarded_while_it_is_prepared_is_gone_afterwards(tmp_path: Path) -> None:
    refused: list[UnknownItem] = []

    async def prepare() -> None:
        try:
            await rig.store.prepare(layer)
        except UnknownItem as error:
            refused.append(error)

    async with running(tmp_path) as rig:
        layer = verified(await rig.send(TAR))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(prepare)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(rig.store.discard, layer.stored)
        assert len(refused) == 1
        assert rig.leftovers() == NOTHING


@pytest.mark.root
async def test_fifty_layers_and_fifty_roots_at_once(tmp_path: Path) -> None:
    tars = [make_tar(entry(f"f{i}", os.urandom(50_000))) for i in range(50)]
    async with running(tmp_path) as rig:

        async def one(number: int) -> None:
            layer = await rig.add(tars[number])
            root = await rig.mount(layer, container_id=number, writable=number % 5 == 0)
            assert (root.path / f"f{number}").stat().st_size == 50_000
            await root.close()
            await rig.store.discard(layer.stored)

        async with trio.open_nursery() as nursery:
            for number in range(50):
                nursery.start_soon(one, number)
        assert rig.leftovers() == NOTHING


@pytest.mark.root
async def test_upload_progress_carries_the_announced_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plugins.image_store.arrival.progress.INTERVAL_S", 0)
    async with running(tmp_path) as rig:
        upload = await rig.store.upload(EXPECTED, size_bytes=len(TAR))
        await upload.write(TAR[:1000])
        await upload.write(TAR[1000:])
        await upload.finish()
        assert [event for event in rig.events if isinstance(event, LayerProgress)] == [
            LayerProgress(digest=str(EXPECTED), received_bytes=count, total_bytes=len(TAR))
            for count in (1000, len(TAR))
        ]


def no_idmap(source: bytes, target: bytes, user_namespace_fd: int) -> None:
    raise OSError(22, "Invalid argument")


@pytest.mark.root
async def test_without_idmapped_mounts_auto_copies_and_idmap_refuses_to_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plugins.image_store.mount.rootfs.idmapped_clone", no_idmap)
    async with running(tmp_path / "auto") as rig:
        root = await rig.mount(await rig.add(TAR))
        assert (root.path / "f").stat().st_uid == 100_000
        await root.close()
    with pytest.raises(RuntimeFailed):
        async with running(tmp_path / "idmap", id_shift="idmap"):
            raise AssertionError("it must not have started")
    assert mounts_under(os.fsencode(tmp_path)) == []


@pytest.mark.root
def test_what_the_kernel_refuses_is_raised_with_the_path(tmp_path: Path) -> None:
    with open("/proc/self/ns/user", "rb") as own, pytest.raises(OSError, match="/proc"):
        # The initial user namespace maps nothing: the kernel refuses it, by name.
        idmapped_clone(b"/proc", os.fsencode(tmp_path), own.fileno())
    assert mounts_under(os.fsencode(tmp_path)) == []


@pytest.mark.root
async def test_no_child_process_outlives_a_mount(tmp_path: Path) -> None:
    def children() -> str:
        return subprocess.run(
            ["ps", "--no-headers", "--ppid", str(os.getpid()), "-o", "comm"],
            capture_output=True,
            text=True,
        ).stdout

    before = await trio.to_thread.run_sync(children)
    async with running(tmp_path) as rig:
        root = await rig.mount(await rig.add(TAR))
        assert await trio.to_thread.run_sync(children) == before
        await root.close()


@pytest.mark.root
async def test_a_fetch_needs_an_open_store(tmp_path: Path) -> None:
    plugin = make_plugin(tmp_path / "store", [])
    store = await plugin.layer_store()
    source = FileBlob(file="/", blob_digest="sha256:00", media_type="", size_bytes=0)
    with pytest.raises(RuntimeFailed):
        await store.fetch(EXPECTED, source)
