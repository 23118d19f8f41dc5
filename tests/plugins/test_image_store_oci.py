"""Layers from files: where they may lie, what they may be, what is checked."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import zstandard
from image_store_rig import (
    NOTHING,
    Layout,
    Rig,
    entry,
    expected_for,
    make_tar,
    memory_files,
    running,
    verified,
)

from plugins.image_store.arrival import file_blob
from plugins.image_store.arrival.transfer import BUFFER_BYTES
from supervisor import (
    Busy,
    Denied,
    DigestMismatch,
    FileBlob,
    FormatError,
    LayerProgress,
    Refusal,
    UnknownItem,
    Untrusted,
)

TAR = make_tar(entry("f", os.urandom(3_000_000)))
EXPECTED = expected_for(TAR)
OCI_TAR = "application/vnd.oci.image.layer.v1.tar"
DOCKER_TAR = "application/vnd.docker.image.rootfs.diff.tar"


async def refused(rig: Rig, source: FileBlob) -> Refusal:
    """The refusal; nothing may be left of the attempt."""
    before = memory_files()
    with pytest.raises(Refusal) as caught:
        await rig.store.fetch(EXPECTED, source)
    assert rig.leftovers() == NOTHING
    assert memory_files() == before
    return caught.value


@pytest.mark.root
@pytest.mark.parametrize(
    ("media_type", "blob"),
    [
        (OCI_TAR, TAR),
        (DOCKER_TAR, TAR),
        (f"{OCI_TAR}+gzip", gzip.compress(TAR)),
        (f"{DOCKER_TAR}.gzip", gzip.compress(TAR)),
        (f"{OCI_TAR}+zstd", zstandard.compress(TAR)),
        (f"{DOCKER_TAR}.zstd", zstandard.compress(TAR)),
        (
            f"{OCI_TAR}+gzip",
            gzip.compress(TAR[:1000]) + gzip.compress(b"") + gzip.compress(TAR[1000:]),
        ),
    ],
    ids=["oci", "docker", "oci-gzip", "docker-gzip", "oci-zstd", "docker-zstd", "several-members"],
)
async def test_tar_gzip_and_zstd_under_oci_s_and_docker_s_names_are_fetched(
    tmp_path: Path, media_type: str, blob: bytes
) -> None:
    layout = Layout(tmp_path / "images" / "one")
    async with running(tmp_path, file_roots=[str(tmp_path / "images")]) as rig:
        source = layout.add(blob, media_type=media_type)
        stored = await rig.store.fetch(EXPECTED, source)
        assert stored.expected == EXPECTED
        assert stored.computed == {"sha384": EXPECTED.hex}
        assert stored.size_bytes == len(TAR)
        assert stored.source == source.file
        await rig.store.prepare(verified(stored))
        root = await rig.mount(verified(stored))
        assert (root.path / "f").stat().st_size == 3_000_000
        await root.close()


@pytest.mark.root
async def test_the_digest_of_the_bytes_is_told_not_judged_by_the_store(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "one")
    async with running(tmp_path, file_roots=[str(tmp_path)]) as rig:
        other = make_tar(entry("other"))
        wanted = expected_for(TAR, "sha512")
        stored = await rig.store.fetch(wanted, layout.add_gzip(other))
        assert stored.expected == wanted
        assert stored.computed == {
            name: hashlib.new(name, other).hexdigest() for name in ("sha384", "sha512")
        }
        await rig.store.discard(stored)
        await rig.store.discard(stored)
        assert rig.leftovers() == NOTHING


@pytest.mark.root
@pytest.mark.parametrize(
    ("media_type", "rule"),
    [
        (f"{OCI_TAR}+gzip+encrypted", "encrypted layers"),
        (f"{OCI_TAR}+zstd+encrypted", "encrypted layers"),
        (f"{OCI_TAR}+bzip2", "is not supported"),
        ("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", "foreign"),
        ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "foreign"),
        ("application/octet-stream", "is not supported"),
        ("", "is not supported"),
    ],
)
async def test_other_media_types_are_refused_with_a_sentence(
    tmp_path: Path, media_type: str, rule: str
) -> None:
    layout = Layout(tmp_path / "one")
    async with running(tmp_path, file_roots=[str(tmp_path)]) as rig:
        error = await refused(rig, layout.add(TAR, media_type=media_type))
        assert isinstance(error, Untrusted)
        assert rule in error.rule
        assert error.actual == media_type


@pytest.mark.root
@pytest.mark.parametrize(
    ("blob_digest", "kind"),
    [
        ("sha256:" + "00" * 32, DigestMismatch),
        ("sha256:../../../../etc/passwd", FormatError),
        ("sha256:" + "AB" * 32, FormatError),
        ("sha256:" + "00" * 31, FormatError),
        ("md5:" + "00" * 16, FormatError),
        ("../sha256:" + "00" * 32, FormatError),
        ("sha256", FormatError),
        ("", FormatError),
    ],
)
async def test_a_blob_is_named_by_a_digest_and_nothing_else(
    tmp_path: Path, blob_digest: str, kind: type[Refusal]
) -> None:
    layout = Layout(tmp_path / "one")
    async with running(tmp_path, file_roots=[str(tmp_path)]) as rig:
        error = await refused(rig, layout.add(TAR, media_type=OCI_TAR, blob_digest=blob_digest))
        assert type(error) is kind


@pytest.mark.root
async def test_only_configured_folders_are_read(tmp_path: Path) -> None:
    inside = Layout(tmp_path / "allowed" / "one").add_gzip(TAR)
    outside = Layout(tmp_path / "other" / "one").add_gzip(TAR)
    cases: list[tuple[FileBlob, type[Refusal]]] = [
        (outside, Denied),
        (replaced(inside, file=f"{tmp_path}/allowed/../other/one"), FormatError),
        (replaced(inside, file="allowed/one"), FormatError),
        (replaced(inside, file=f"{tmp_path}/allowed/one\0"), FormatError),
        (replaced(inside, file=f"{tmp_path}/allowed-not/one"), Denied),
        (replaced(inside, file=f"{tmp_path}/allowed/missing"), UnknownItem),
    ]
    async with running(tmp_path, file_roots=[f"{tmp_path}/allowed"]) as rig:
        for source, kind in cases:
            assert type(await refused(rig, source)) is kind
        await rig.store.fetch(EXPECTED, inside)
    async with running(tmp_path / "default") as rig:
        error = await refused(rig, inside)
        assert error.expected == "none configured"


def replaced(source: FileBlob, **fields: Any) -> FileBlob:
    return msgspec.structs.replace(source, **fields)


def plant(place: Path, what: str, real: Path) -> None:
    """Put something else where the blob, or a folder on the way to it, should be."""
    moved = place.with_name(place.name + ".moved")
    place.rename(moved)
    if what == "link":
        place.symlink_to(moved)
    elif what == "link outside":
        place.symlink_to(real)
    elif what == "pipe":
        os.mkfifo(place)
    elif what == "folder":
        place.mkdir()


@pytest.mark.root
@pytest.mark.parametrize("what", ["link", "link outside", "pipe", "folder"])
async def test_a_blob_that_is_no_plain_file_is_refused(tmp_path: Path, what: str) -> None:
    layout = Layout(tmp_path / "allowed" / "one")
    source = layout.add_gzip(TAR)
    blob = layout.directory / "blobs" / "sha256" / str(source.blob_digest).partition(":")[2]
    plant(blob, what, Path("/etc/passwd"))
    async with running(tmp_path, file_roots=[str(tmp_path / "allowed")]) as rig:
        with trio.fail_after(5):
            await refused(rig, source)


@pytest.mark.root
async def test_a_pipe_in_a_blobs_place_is_not_even_opened(tmp_path: Path) -> None:
    (tmp_path / "allowed").mkdir()
    pipe = tmp_path / "allowed" / "pipe"
    os.mkfifo(pipe)
    source = FileBlob(
        file=str(pipe), size_bytes=0, media_type="application/vnd.oci.image.layer.v1.tar"
    )
    # open(2) for writing waits for a reader, and ends for one that is gone again at once.
    writer = threading.Thread(target=lambda: os.close(os.open(pipe, os.O_WRONLY)), daemon=True)
    writer.start()
    try:
        async with running(tmp_path, file_roots=[str(tmp_path / "allowed")]) as rig:
            for _ in range(20):
                await refused(rig, source)
        assert writer.is_alive()
    finally:
        os.close(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK))
        writer.join(timeout=5)


@pytest.mark.root
@pytest.mark.parametrize("level", ["one", "one/blobs", "one/blobs/sha256"])
async def test_no_link_is_followed_on_the_way_to_a_blob(tmp_path: Path, level: str) -> None:
    source = Layout(tmp_path / "allowed" / "one").add_gzip(TAR)
    plant(tmp_path / "allowed" / level, "link", Path("/"))
    async with running(tmp_path, file_roots=[str(tmp_path / "allowed")]) as rig:
        assert isinstance(await refused(rig, source), UnknownItem)


@pytest.mark.root
async def test_blobs_of_the_wrong_digest_or_size_are_refused(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "one")
    blob = gzip.compress(TAR)
    source = layout.add(blob)
    path = layout.directory / "blobs" / "sha256" / str(source.blob_digest).partition(":")[2]
    async with running(tmp_path, file_roots=[str(tmp_path)]) as rig:
        for size_bytes in (len(blob) - 1, len(blob) + 1, 0):
            error = await refused(rig, replaced(source, size_bytes=size_bytes))
            assert error.rule == "the blob must have the size that was given"
            assert error.expected == f"{size_bytes} bytes"
            assert error.actual == f"{len(blob)} bytes from 0 on"
        # The same size and still gzip: only the time in its header differs.
        changed = bytearray(blob)
        changed[4] ^= 1
        path.write_bytes(changed)
        error = await refused(rig, source)
        assert isinstance(error, DigestMismatch)
        assert error.expected == hashlib.sha256(blob).hexdigest()
        assert error.actual == hashlib.sha256(changed).hexdigest()


@pytest.mark.root
@pytest.mark.parametrize(
    ("blob", "rule"),
    [
        (gzip.compress(TAR)[:-1], "complete"),
        (gzip.compress(TAR)[:1000], "complete"),
        (b"", "complete"),
        (gzip.compress(TAR) + b"garbage", "only another one may follow"),
        (gzip.compress(TAR) + b"\x1f", "complete"),
        (gzip.compress(TAR) + bytes(512), "only another one may follow"),
        (gzip.compress(TAR)[:-8] + bytes(8), "valid gzip"),
        (TAR, "valid gzip"),
    ],
    ids=["one-short", "truncated", "empty", "garbage", "half-member", "zeros", "bad-crc", "tar"],
)
async def test_broken_gzip_is_refused(tmp_path: Path, blob: bytes, rule: str) -> None:
    layout = Layout(tmp_path / "one")
    async with running(tmp_path, file_roots=[str(tmp_path)]) as rig:
        source = layout.add(blob)
        error = await refused(rig, source)
        assert type(error) is Untrusted
        assert error.item == source.file
        assert rule in error.rule
        assert error.actual


@pytest.mark.root
@pytest.mark.parametrize(
    ("blob", "rule"),
    [
        (zstandard.compress(TAR)[:-1], "complete"),
        (b"", "complete"),
        (zstandard.compress(TAR) + b"garbage", "only another one may follow"),
        (gzip.compress(TAR), "valid zstd"),
    ],
    ids=["one-short", "empty", "garbage", "gzip"],
)
async def test_broken_zstd_is_refused(tmp_path: Path, blob: bytes, rule: str) -> None:
    layout = Layout(tmp_path / "one")
    async with running(tmp_path, file_roots=[str(tmp_path)]) as rig:
        error = await refused(rig, layout.add(blob, media_type=f"{OCI_TAR}+zstd"))
        assert type(error) is Untrusted
        assert rule in error.rule


@pytest.mark.root
async def test_a_gzip_bomb_ends_at_the_layer_s_limit(tmp_path: Path) -> None:
    one_member = gzip.compress(bytes(128 << 20))
    bomb = one_member * 8  # a gigabyte of zeros in one megabyte
    assert len(bomb) < 1_100_000
    layout = Layout(tmp_path / "one")
    async with running(tmp_path, file_roots=[str(tmp_path)], max_layer_bytes=2 << 20) as rig:
        error = await refused(rig, layout.add(bomb))
        assert isinstance(error, Untrusted)
        assert "max_layer_bytes" in error.rule
        assert error.actual is not None
        # It was stopped one step beyond the limit.
        assert int(error.actual.split()[0]) <= (2 << 20) + BUFFER_BYTES


@pytest.mark.root
async def test_a_layer_beyond_the_budget_is_refused_and_the_budget_is_whole_again(
    tmp_path: Path,
) -> None:
    layout = Layout(tmp_path / "one")
    async with running(tmp_path, file_roots=[str(tmp_path)], budget_bytes=2 << 20) as rig:
        assert isinstance(await refused(rig, layout.add_gzip(TAR)), Busy)
        assert isinstance(await refused(rig, layout.add(TAR, media_type=OCI_TAR)), Busy)


@pytest.mark.root
async def test_a_plain_tar_beyond_the_limit_is_refused_before_a_byte_is_read(
    tmp_path: Path,
) -> None:
    layout = Layout(tmp_path / "one")
    async with running(tmp_path, file_roots=[str(tmp_path)], max_layer_bytes=1 << 20) as rig:
        error = await refused(rig, layout.add(TAR, media_type=OCI_TAR))
        assert (error.expected, error.actual) == (
            f"0 to {1 << 20} bytes",
            f"{len(TAR)} bytes",
        )


@pytest.mark.root
async def test_progress_is_told_with_the_blob_s_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plugins.image_store.arrival.progress.INTERVAL_S", 0)
    monkeypatch.setattr("plugins.image_store.arrival.file_blob.PIECE_BYTES", 100_000)
    layout = Layout(tmp_path / "one")
    async with running(tmp_path, file_roots=[str(tmp_path)]) as rig:
        source = layout.add_gzip(TAR)
        await rig.store.fetch(EXPECTED, source)
        told = [event for event in rig.events if isinstance(event, LayerProgress)]
        assert {event.digest for event in told} == {str(EXPECTED)}
        assert {event.total_bytes for event in told} == {source.size_bytes}
        received = [event.received_bytes for event in told]
        assert received == sorted(received)
        assert len(told) >= source.size_bytes // 100_000
        assert received[-1] <= source.size_bytes


@pytest.mark.root
async def test_a_layer_on_the_operator_s_storage_is_mounted_like_any_other(tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    storage.mkdir(mode=0o700)
    async with running(tmp_path, file_roots=[str(tmp_path)], storage_dir=str(storage)) as rig:
        layer = verified(await rig.store.fetch(EXPECTED, Layout(tmp_path / "one").add_gzip(TAR)))
        await rig.store.prepare(layer)
        uploaded = await rig.add(make_tar(entry("g", b"uploaded")))
        root = await rig.mount(layer, uploaded)
        assert (root.path / "f").stat().st_size == 3_000_000
        assert (root.path / "g").read_bytes() == b"uploaded"
        await root.close()
        for stored in (layer.stored, uploaded.stored):
            await rig.store.discard(stored)
        assert rig.leftovers() == NOTHING
        assert os.listdir(storage) == []


@pytest.mark.root
@pytest.mark.parametrize("hanging", ["open", "pread"])
async def test_a_disk_that_hangs_holds_no_fetch_beyond_its_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hanging: str
) -> None:
    source = Layout(tmp_path / "oci").add_gzip(make_tar(entry("file", b"x")))
    path = source.file
    goes_on, has_gone_on = threading.Event(), threading.Event()
    real_pread, real_opened = os.pread, file_blob._opened

    def pread(fd: int, size_bytes: int, offset: int) -> bytes:
        goes_on.wait()
        has_gone_on.set()
        return b""

    def opened(roots: Sequence[str], blob: FileBlob) -> int:
        goes_on.wait()
        fd = real_opened(roots, blob)
        opened_fds.append(os.readlink(f"/proc/self/fd/{fd}"))
        has_gone_on.set()
        return fd

    opened_fds: list[str] = []
    async with running(tmp_path, file_roots=[str(tmp_path)]) as rig:
        if hanging == "pread":
            monkeypatch.setattr(os, "pread", pread)
        else:
            monkeypatch.setattr(file_blob, "_opened", opened)
        try:
            with trio.move_on_after(0.5) as deadline:
                await rig.store.fetch(expected_for(b"x"), source)
            assert deadline.cancelled_caught
            assert rig.leftovers() == NOTHING
        finally:
            goes_on.set()
        assert await trio.to_thread.run_sync(has_gone_on.wait, 30)
        monkeypatch.setattr(os, "pread", real_pread)
        await trio.to_thread.run_sync(_wait_until_closed, path)
    assert opened_fds == ([path] if hanging == "open" else [])


def _wait_until_closed(path: str) -> None:
    deadline_s = time.monotonic() + 30
    while path in _open_files():
        assert time.monotonic() < deadline_s, f"{path} stays open"
        time.sleep(0.01)


def _open_files() -> list[str]:
    """What this process has open, by name."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return found
