"""Whole transfers: what they leave behind, what they may take, and several at one time."""

from __future__ import annotations

import gzip
import hashlib
import os
import signal
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio
import zstandard
from cancel_sweep import Operation, sweep
from hostile_registry import cut, flipped, hostile_registry
from image_store_rig import expected_for, memory_files
from inflate_rig import children, pipes

from plugins.image_store.arrival.arrivals import Arrivals, name_of
from plugins.image_store.arrival.sealed import SealedTar
from plugins.image_store.budget import Budget
from plugins.image_store.config import StoreConfig
from plugins.image_store.inflate import process
from supervisor import (
    Busy,
    ConfigError,
    Denied,
    DigestMismatch,
    Event,
    FileBlob,
    FormatError,
    LayerSource,
    Refusal,
    RegistryBlob,
    RuntimeFailed,
    Untrusted,
)

MIB = 1 << 20
PLAIN = os.urandom(3 * MIB) + bytes(MIB)
EXPECTED = expected_for(PLAIN)
OCI_TAR = "application/vnd.oci.image.layer.v1.tar"
COMPRESSED = {
    OCI_TAR: PLAIN,
    f"{OCI_TAR}+gzip": gzip.compress(PLAIN, compresslevel=1),
    f"{OCI_TAR}+zstd": zstandard.compress(PLAIN, 1),
}
GZIP = f"{OCI_TAR}+gzip"


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    before = children(), pipes(), memory_files()
    yield
    assert (children(), pipes(), memory_files()) == before


class Machine:
    """Arrivals with a budget, over a folder of blobs."""

    def __init__(self, directory: Path, **settings: object) -> None:
        self.directory = directory
        self.events: list[Event] = []
        config = msgspec.convert(
            {
                "file_roots": [str(directory)],
                "budget_bytes": 64 * MIB,
                "max_layer_bytes": 32 * MIB,
                **settings,
            },
            StoreConfig,
        )
        self.budget = Budget(config.budget_bytes)
        self.arrivals = Arrivals(config, self.budget, self.events.append)

    def blob(self, data: bytes, media_type: str = GZIP, **fields: object) -> FileBlob:
        path = self.directory / hashlib.sha256(data).hexdigest()
        path.write_bytes(data)
        known = {
            "file": str(path),
            "size_bytes": len(data),
            "media_type": media_type,
            "blob_digest": f"sha256:{path.name}",
        }
        return msgspec.convert({"type": "file", **known, **fields}, FileBlob)

    async def refusal(self, source: LayerSource) -> Refusal:
        with pytest.raises(Refusal) as caught:
            await self.arrivals.fetch(EXPECTED, source)
        assert self.budget.used_bytes == 0
        return caught.value


@asynccontextmanager
async def machine(directory: Path, **settings: object) -> AsyncIterator[Machine]:
    made = Machine(directory, **settings)
    await made.arrivals.open()
    try:
        yield made
    finally:
        await made.arrivals.close()
    assert made.budget.used_bytes == 0


@pytest.mark.parametrize("media_type", list(COMPRESSED))
async def test_a_range_inside_an_archive_is_a_blob_like_any_other(
    tmp_path: Path, media_type: str
) -> None:
    data = COMPRESSED[media_type]
    archive = tmp_path / "archive.tar"
    archive.write_bytes(b"h" * 512 + data + b"t" * 700)
    for blob_digest in (None, f"sha512:{hashlib.sha512(data).hexdigest()}"):
        source = FileBlob(
            file=str(archive),
            size_bytes=len(data),
            media_type=media_type,
            offset_bytes=512,
            blob_digest=blob_digest,
        )
        async with machine(tmp_path) as here:
            tar = await here.arrivals.fetch(EXPECTED, source)
            assert tar.computed == {"sha384": EXPECTED.hex}
            assert os.pread(tar.fd, len(PLAIN) + 1, 0) == PLAIN
            assert here.budget.used_bytes == len(PLAIN)
            tar.close()
            beyond = msgspec.structs.replace(source, offset_bytes=512 + 701)
            error = await here.refusal(beyond)
            assert (type(error), error.item) == (Untrusted, str(archive))
            assert (await here.refusal(msgspec.structs.replace(source, offset_bytes=10**12))).rule


async def test_the_blob_s_own_digest_is_compared_before_all_else(tmp_path: Path) -> None:
    async with machine(tmp_path) as here:
        for media_type, data in COMPRESSED.items():
            cut_short = data[:-1]
            # Cut short, or no such stream from the first byte on.
            for bad in (cut_short, b"?" + data):
                wrong = here.blob(bad, media_type, blob_digest="sha256:" + "00" * 32)
                error = await here.refusal(wrong)
                assert isinstance(error, DigestMismatch)
                assert (error.item, error.expected) == (wrong.file, "00" * 32)
                assert error.actual == hashlib.sha256(bad).hexdigest()


async def test_a_wrong_size_of_the_tar_is_refused_either_way(tmp_path: Path) -> None:
    async with machine(tmp_path) as here:
        for size_bytes in (len(PLAIN) - 1, len(PLAIN) + 1, 0):
            source = here.blob(COMPRESSED[GZIP], tar_size_bytes=size_bytes)
            error = await here.refusal(source)
            assert type(error) is Untrusted
            assert error.rule == "the layer must have the size that was announced"
        exact = here.blob(COMPRESSED[GZIP], tar_size_bytes=len(PLAIN))
        (await here.arrivals.fetch(EXPECTED, exact)).close()


async def test_what_cannot_fit_is_refused_before_a_byte_is_read(tmp_path: Path) -> None:
    async with machine(tmp_path, budget_bytes=8 * MIB, max_layer_bytes=16 * MIB) as here:
        missing = msgspec.structs.replace(here.blob(b"x"), file=str(tmp_path / "missing"))
        too_large = msgspec.structs.replace(missing, tar_size_bytes=16 * MIB + 1)
        assert type(await here.refusal(too_large)) is Untrusted
        too_much = msgspec.structs.replace(missing, tar_size_bytes=8 * MIB + 1)
        assert type(await here.refusal(too_much)) is Busy


@pytest.mark.parametrize("is_announced", [True, False])
async def test_transfers_at_one_time_never_over_commit(tmp_path: Path, is_announced: bool) -> None:
    """Room for two of four: the others are refused, and the bytes are there again."""
    kept: list[SealedTar] = []
    refused: list[Refusal] = []
    highest_bytes = 0
    async with machine(tmp_path, budget_bytes=2 * len(PLAIN) + MIB, parallel_layers=4) as here:
        source = here.blob(COMPRESSED[GZIP], tar_size_bytes=len(PLAIN) if is_announced else None)

        async def load() -> None:
            nonlocal highest_bytes
            try:
                kept.append(await here.arrivals.fetch(EXPECTED, source))
            except Busy as error:
                refused.append(error)
            highest_bytes = max(highest_bytes, here.budget.used_bytes)

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(load)
        assert len(kept) + len(refused) == 4
        if is_announced:
            assert len(kept) == 2
        assert here.budget.used_bytes == len(kept) * len(PLAIN)
        assert highest_bytes <= here.budget.total_bytes
        for tar in kept:
            assert tar.computed["sha384"] == EXPECTED.hex
            tar.close()


async def test_no_more_transfers_than_configured_run_at_one_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "START", "import time; time.sleep(600)")
    async with machine(tmp_path, parallel_layers=2) as here:
        source = here.blob(COMPRESSED[GZIP])
        before = children()
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(here.arrivals.fetch, EXPECTED, source)
                seen = []
                for _ in range(50):
                    seen.append(len(children() - before))
                    await trio.sleep(0.01)
                assert max(seen) == 2
                nursery.cancel_scope.cancel()


async def test_the_layer_is_never_in_this_process_s_memory(tmp_path: Path) -> None:
    plain = os.urandom(MIB) * 24
    for media_type, data in ((OCI_TAR, plain), (GZIP, gzip.compress(plain, compresslevel=0))):
        async with machine(tmp_path) as here:
            source = here.blob(data, media_type)
            tracemalloc.start()
            try:
                tar = await here.arrivals.fetch(expected_for(plain), source)
                peak_bytes = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
            assert tar.size_bytes == len(plain)
            tar.close()
            assert peak_bytes < 8 * MIB


# --- what goes wrong on the way -------------------------------------------------------------


class Scripted:
    """A source that sends `chunks`, then does what `at_end` says."""

    def __init__(self, *chunks: bytes, at_end: str = "end") -> None:
        self._chunks = iter(chunks)
        self._at_end = at_end
        self.is_closed = False
        self.is_waiting = trio.Event()

    def __aiter__(self) -> Scripted:
        return self

    async def __anext__(self) -> bytes:
        await trio.lowlevel.checkpoint()
        for chunk in self._chunks:
            return chunk
        if self._at_end == "fail":
            raise RuntimeFailed("registry", "the connection broke")
        if self._at_end == "hang":
            self.is_waiting.set()
            await trio.sleep_forever()
        raise StopAsyncIteration

    @asynccontextmanager
    async def opened(self, config: object, source: object) -> AsyncIterator[Scripted]:
        # As an HTTP client does, with a nursery of its own around the transfer.
        async with trio.open_nursery():
            try:
                yield self
                await trio.lowlevel.checkpoint()
            finally:
                self.is_closed = True


def registry_blob(data: bytes, media_type: str = GZIP, *, more_bytes: int = 0) -> RegistryBlob:
    return RegistryBlob(
        registry="registry.example.org",
        repository="one/two",
        blob_digest=f"sha256:{hashlib.sha256(data).hexdigest()}",
        media_type=media_type,
        size_bytes=len(data) + more_bytes,
    )


def use(monkeypatch: pytest.MonkeyPatch, source: Scripted) -> Scripted:
    monkeypatch.setattr("plugins.image_store.arrival.arrivals.open_registry_blob", source.opened)
    return source


@pytest.mark.parametrize("media_type", list(COMPRESSED))
@pytest.mark.parametrize("chunk_bytes", [100, 70_000, 5 * MIB])
async def test_a_registry_s_blob_takes_the_same_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, media_type: str, chunk_bytes: int
) -> None:
    data = COMPRESSED[media_type]
    chunks = (data[start : start + chunk_bytes] for start in range(0, len(data), chunk_bytes))
    script = use(monkeypatch, Scripted(*chunks))
    async with machine(tmp_path) as here:
        tar = await here.arrivals.fetch(EXPECTED, registry_blob(data, media_type))
        assert tar.computed["sha384"] == EXPECTED.hex
        tar.close()
        assert script.is_closed


async def test_a_layer_is_fetched_from_a_registry_whose_connection_breaks(tmp_path: Path) -> None:
    data = COMPRESSED[GZIP]
    async with hostile_registry() as registry:
        registry.contents.add_blob(data)
        registry.misbehave(cut(2 * MIB), times=1)
        source = msgspec.structs.replace(registry_blob(data), registry=registry.name)
        registries = {registry.name: msgspec.to_builtins(registry.config)}
        async with machine(tmp_path, registries=registries) as here:
            tar = await here.arrivals.fetch(EXPECTED, source)
            assert tar.computed["sha384"] == EXPECTED.hex
            tar.close()
            assert len(registry.requests) == 2
            registry.misbehave(flipped())
            assert isinstance(await here.refusal(source), DigestMismatch)


def test_a_fetch_from_a_registry_cancelled_at_every_step_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = COMPRESSED[GZIP]

    async def one_round(cancelling: Callable[[Operation], Awaitable[bool]]) -> None:
        use(monkeypatch, Scripted(data[:MIB], data[MIB:]))
        async with machine(tmp_path) as here:
            tars: list[SealedTar] = []

            async def operation() -> None:
                tars.append(await here.arrivals.fetch(EXPECTED, registry_blob(data)))

            assert await cancelling(operation) == bool(tars)
            for tar in tars:
                tar.close()
            assert here.budget.used_bytes == 0

    assert sweep(one_round, mock_clock=False) > 5


async def test_a_registry_that_is_not_configured_is_not_asked(tmp_path: Path) -> None:
    async with machine(tmp_path) as here:
        source = registry_blob(COMPRESSED[GZIP])
        assert type(await here.refusal(source)) is Denied
        digest = source.blob_digest
        assert name_of(source) == f"registry.example.org/one/two@{digest}"


@pytest.mark.parametrize("media_type", list(COMPRESSED))
async def test_a_byte_too_many_ends_a_transfer_at_once_and_one_too_few_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, media_type: str
) -> None:
    data = COMPRESSED[media_type]
    rule = "the blob must have the size that was given"
    async with machine(tmp_path) as here:
        use(monkeypatch, Scripted(data, b"x", at_end="hang"))
        with trio.fail_after(10):
            error = await here.refusal(registry_blob(data, media_type))
        assert (error.rule, error.actual) == (rule, f"more than {len(data)} bytes")
        use(monkeypatch, Scripted(data))
        error = await here.refusal(registry_blob(data, media_type, more_bytes=1))
        assert (error.rule, error.actual) == (rule, f"{len(data)} bytes")


@pytest.mark.parametrize("media_type", list(COMPRESSED))
async def test_a_source_that_fails_or_hangs_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, media_type: str
) -> None:
    data = COMPRESSED[media_type]
    async with machine(tmp_path) as here:
        for length in (0, 1000, 2 * MIB):
            use(monkeypatch, Scripted(data[:length], at_end="fail"))
            error = await here.refusal(registry_blob(data, media_type))
            assert (error.item, error.rule) == ("registry", "the connection broke")
            hanging = use(monkeypatch, Scripted(data[:length], at_end="hang"))
            with trio.fail_after(10):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(
                        here.arrivals.fetch, EXPECTED, registry_blob(data, media_type)
                    )
                    await hanging.is_waiting.wait()
                    nursery.cancel_scope.cancel()
            assert hanging.is_closed
            assert here.budget.used_bytes == 0


async def test_a_worker_that_is_killed_from_outside_fails_the_transfer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = use(monkeypatch, Scripted(COMPRESSED[GZIP][: 2 * MIB], at_end="hang"))
    async with machine(tmp_path) as here:
        before = children()
        caught: list[Refusal] = []

        async def load() -> None:
            caught.append(await here.refusal(registry_blob(COMPRESSED[GZIP])))

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(load)
                await script.is_waiting.wait()
                (worker,) = children() - before
                os.kill(worker, signal.SIGKILL)
        assert type(caught[0]) is RuntimeFailed
        assert caught[0].actual == "SIGKILL"


async def test_a_worker_that_ends_early_without_a_word_fails_the_transfer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "START", "import os; os.read(0, 1)")
    async with machine(tmp_path) as here:
        error = await here.refusal(here.blob(COMPRESSED[GZIP]))
        assert type(error) is RuntimeFailed
        assert error.rule == "the decompressor must read all that it is given"


async def test_a_worker_that_never_ends_is_ended_by_the_caller_s_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with machine(tmp_path) as here:
        source = here.blob(COMPRESSED[GZIP])
        for program in (
            "import time; time.sleep(600)",
            "import os, time; os.read(0, 9); os.close(1); time.sleep(600)",
            "while True: pass",
        ):
            monkeypatch.setattr(process, "START", program)
            with trio.fail_after(10):
                with trio.move_on_after(0.3) as scope:
                    await here.arrivals.fetch(EXPECTED, source)
                assert scope.cancelled_caught
            assert here.budget.used_bytes == 0


async def test_a_worker_s_endless_output_ends_at_the_layer_s_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = "import os\nwhile True: os.write(1, bytes(1 << 20))"
    monkeypatch.setattr(process, "START", endless)
    async with machine(tmp_path, max_layer_bytes=4 * MIB) as here:
        with trio.fail_after(10):
            error = await here.refusal(here.blob(COMPRESSED[GZIP]))
        assert type(error) is Untrusted
        assert error.rule == "a layer has a bounded size (max_layer_bytes)"


# --- storage_dir ----------------------------------------------------------------------------


@pytest.mark.root
async def test_layers_can_lie_in_a_directory_and_cannot_change_there(tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    storage.mkdir(mode=0o700)
    async with machine(tmp_path, storage_dir=str(storage)) as here:
        before = memory_files()
        for media_type, data in COMPRESSED.items():
            tar = await here.arrivals.fetch(EXPECTED, here.blob(data, media_type))
            assert tar.computed["sha384"] == EXPECTED.hex
            assert os.pread(tar.fd, len(PLAIN) + 1, 0) == PLAIN
            status = os.fstat(tar.fd)
            assert (status.st_dev, status.st_nlink) == (storage.stat().st_dev, 0)
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.pwrite(tar.fd, b"x", 0)
            writable = [
                fd
                for fd in os.listdir("/proc/self/fd")
                if Path(f"/proc/self/fd/{fd}").exists()
                and os.stat(f"/proc/self/fd/{fd}").st_ino == status.st_ino
                and int(fd) != tar.fd
            ]
            assert writable == []
            folder_fd = os.open(storage, os.O_RDONLY)
            with pytest.raises(FileNotFoundError):  # linkat(2): it can be given no name
                os.link(f"/proc/self/fd/{tar.fd}", "named", dst_dir_fd=folder_fd)
            os.close(folder_fd)
            assert here.budget.used_bytes == len(PLAIN)
            assert os.listdir(storage) == []
            assert memory_files() == before
            tar.close()


@pytest.mark.root
@pytest.mark.parametrize(
    ("mode", "owner", "rule"),
    [
        (0o770, 0, "must belong to root"),
        (0o702, 0, "must belong to root"),
        (0o1777, 0, "must belong to root"),
        (0o700, 1, "must belong to root"),
        (None, 0, "must be a directory"),
        (0o100600, 0, "must be a directory"),
        (0o120000, 0, "must be a directory"),
    ],
    ids=["group", "others", "sticky", "owner", "missing", "file", "link"],
)
async def test_a_storage_directory_that_others_could_change_is_refused(
    tmp_path: Path, mode: int | None, owner: int, rule: str
) -> None:
    storage = tmp_path / "storage"
    if mode == 0o100600:
        storage.write_bytes(b"")
    elif mode == 0o120000:
        storage.symlink_to("/")
    elif mode is not None:
        storage.mkdir()
        storage.chmod(mode)
        os.chown(storage, owner, 0)
    with pytest.raises(ConfigError) as caught:
        async with machine(tmp_path, storage_dir=str(storage)):
            raise AssertionError("it was opened")
    assert caught.value.item == "$.plugin.image_store.storage_dir"
    assert rule in caught.value.rule


@pytest.mark.root
async def test_a_relative_storage_directory_and_one_without_unnamed_files_are_refused(
    tmp_path: Path,
) -> None:
    for path, rule in (
        (".", "must be absolute"),
        ("/proc", "unnamed files"),
    ):
        with pytest.raises(ConfigError) as caught:
            async with machine(tmp_path, storage_dir=path):
                raise AssertionError("it was opened")
        assert rule in caught.value.rule


async def test_bad_names_are_refused_before_anything_is_started(tmp_path: Path) -> None:
    async with machine(tmp_path) as here:
        source = here.blob(COMPRESSED[GZIP], blob_digest="sha256:abc")
        assert type(await here.refusal(source)) is FormatError
