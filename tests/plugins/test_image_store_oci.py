"""Layers from OCI layout folders: where they may lie, what they may be, what is checked."""

from __future__ import annotations

import gzip
import hashlib
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
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

from plugins.image_store.gunzip import STEP_BYTES, gunzip
from supervisor import (
    Busy,
    Denied,
    DigestMismatch,
    FormatError,
    LayerProgress,
    OciBlob,
    Refusal,
    UnknownItem,
    Untrusted,
)

TAR = make_tar(entry("f", os.urandom(3_000_000)))
EXPECTED = expected_for(TAR)
OCI_TAR = "application/vnd.oci.image.layer.v1.tar"
DOCKER_TAR = "application/vnd.docker.image.rootfs.diff.tar"


async def refused(rig: Rig, source: OciBlob) -> Refusal:
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
        (
            f"{OCI_TAR}+gzip",
            gzip.compress(TAR[:1000]) + gzip.compress(b"") + gzip.compress(TAR[1000:]),
        ),
    ],
    ids=["oci", "docker", "oci-gzip", "docker-gzip", "several-members"],
)
async def test_tar_and_gzip_under_oci_s_and_docker_s_names_are_fetched(
    tmp_path: Path, media_type: str, blob: bytes
) -> None:
    layout = Layout(tmp_path / "images" / "one")
    async with running(tmp_path, oci_roots=[str(tmp_path / "images")]) as rig:
        source = layout.add(blob, media_type=media_type)
        stored = await rig.store.fetch(EXPECTED, source)
        assert stored.expected == EXPECTED
        assert stored.computed == {"sha384": EXPECTED.hex}
        assert stored.size_bytes == len(TAR)
        assert source.blob_digest in stored.source
        await rig.store.prepare(verified(stored))
        root = await rig.mount(verified(stored))
        assert (root.path / "f").stat().st_size == 3_000_000
        await root.close()


@pytest.mark.root
async def test_the_digest_of_the_bytes_is_told_not_judged_by_the_store(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "one")
    async with running(tmp_path, oci_roots=[str(tmp_path)]) as rig:
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
        (f"{OCI_TAR}+zstd", "zstd layers are not supported"),
        (f"{OCI_TAR}+gzip+encrypted", "encrypted layers"),
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
    async with running(tmp_path, oci_roots=[str(tmp_path)]) as rig:
        error = await refused(rig, layout.add(TAR, media_type=media_type))
        assert isinstance(error, Untrusted)
        assert rule in error.rule
        assert error.actual == media_type


@pytest.mark.root
@pytest.mark.parametrize(
    ("blob_digest", "kind"),
    [
        ("sha256:" + "00" * 32, UnknownItem),
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
    async with running(tmp_path, oci_roots=[str(tmp_path)]) as rig:
        error = await refused(rig, layout.add(TAR, media_type=OCI_TAR, blob_digest=blob_digest))
        assert type(error) is kind


@pytest.mark.root
async def test_only_configured_folders_are_read(tmp_path: Path) -> None:
    inside = Layout(tmp_path / "allowed" / "one").add_gzip(TAR)
    outside = Layout(tmp_path / "other" / "one").add_gzip(TAR)
    cases: list[tuple[OciBlob, type[Refusal]]] = [
        (outside, Denied),
        (replaced(inside, directory=f"{tmp_path}/allowed/../other/one"), FormatError),
        (replaced(inside, directory="allowed/one"), FormatError),
        (replaced(inside, directory=f"{tmp_path}/allowed/one\0"), FormatError),
        (replaced(inside, directory=f"{tmp_path}/allowed-not/one"), Denied),
        (replaced(inside, directory=f"{tmp_path}/allowed/missing"), UnknownItem),
    ]
    async with running(tmp_path, oci_roots=[f"{tmp_path}/allowed"]) as rig:
        for source, kind in cases:
            assert type(await refused(rig, source)) is kind
        await rig.store.fetch(EXPECTED, inside)
    async with running(tmp_path / "default") as rig:
        error = await refused(rig, inside)
        assert error.expected == "none configured: layers come by upload"


def replaced(source: OciBlob, **fields: Any) -> OciBlob:
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
    blob = layout.directory / "blobs" / "sha256" / source.blob_digest.partition(":")[2]
    plant(blob, what, Path("/etc/passwd"))
    async with running(tmp_path, oci_roots=[str(tmp_path / "allowed")]) as rig:
        with trio.fail_after(5):
            await refused(rig, source)


@pytest.mark.root
@pytest.mark.parametrize("level", ["one", "one/blobs", "one/blobs/sha256"])
async def test_no_link_is_followed_on_the_way_to_a_blob(tmp_path: Path, level: str) -> None:
    source = Layout(tmp_path / "allowed" / "one").add_gzip(TAR)
    plant(tmp_path / "allowed" / level, "link", Path("/"))
    async with running(tmp_path, oci_roots=[str(tmp_path / "allowed")]) as rig:
        assert isinstance(await refused(rig, source), UnknownItem)


@pytest.mark.root
async def test_blobs_of_the_wrong_digest_or_size_are_refused(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "one")
    blob = gzip.compress(TAR)
    source = layout.add(blob)
    path = layout.directory / "blobs" / "sha256" / source.blob_digest.partition(":")[2]
    async with running(tmp_path, oci_roots=[str(tmp_path)]) as rig:
        for size_bytes in (len(blob) - 1, len(blob) + 1, 0, -1):
            error = await refused(rig, replaced(source, size_bytes=size_bytes))
            assert "size" in error.rule
            assert (error.expected, error.actual) == (f"{size_bytes} bytes", f"{len(blob)} bytes")
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
        (gzip.compress(TAR)[:-8] + bytes(8), "valid gzip"),
        (TAR, "valid gzip"),
    ],
    ids=["one-short", "truncated", "empty", "garbage", "half-member", "bad-crc", "not-gzip"],
)
async def test_broken_gzip_is_refused(tmp_path: Path, blob: bytes, rule: str) -> None:
    layout = Layout(tmp_path / "one")
    async with running(tmp_path, oci_roots=[str(tmp_path)]) as rig:
        error = await refused(rig, layout.add(blob))
        assert isinstance(error, Untrusted)
        assert rule in error.rule


@pytest.mark.root
async def test_a_gzip_bomb_ends_at_the_layer_s_limit(tmp_path: Path) -> None:
    bomb = gzip.compress(bytes(256 << 20), compresslevel=1)
    layout = Layout(tmp_path / "one")
    async with running(tmp_path, oci_roots=[str(tmp_path)], max_layer_bytes=2 << 20) as rig:
        error = await refused(rig, layout.add(bomb))
        assert isinstance(error, Untrusted)
        assert "max_layer_bytes" in error.rule
        assert error.actual is not None
        # It was stopped one step beyond the limit.
        assert int(error.actual.split()[0]) <= (2 << 20) + STEP_BYTES


@pytest.mark.root
async def test_a_layer_beyond_the_budget_is_refused_and_the_budget_is_whole_again(
    tmp_path: Path,
) -> None:
    layout = Layout(tmp_path / "one")
    async with running(tmp_path, oci_roots=[str(tmp_path)], budget_bytes=2 << 20) as rig:
        assert isinstance(await refused(rig, layout.add_gzip(TAR)), Busy)
        assert isinstance(await refused(rig, layout.add(TAR, media_type=OCI_TAR)), Busy)


@pytest.mark.root
async def test_a_plain_tar_beyond_the_limit_is_refused_before_a_byte_is_read(
    tmp_path: Path,
) -> None:
    layout = Layout(tmp_path / "one")
    async with running(tmp_path, oci_roots=[str(tmp_path)], max_layer_bytes=1 << 20) as rig:
        error = await refused(rig, layout.add(TAR, media_type=OCI_TAR))
        assert (error.expected, error.actual) == (
            f"0 to {1 << 20} bytes",
            f"{len(TAR)} bytes",
        )


@pytest.mark.root
async def test_progress_is_told_with_the_blob_s_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plugins.image_store.progress.INTERVAL_S", 0)
    layout = Layout(tmp_path / "one")
    async with running(tmp_path, oci_roots=[str(tmp_path)]) as rig:
        source = layout.add_gzip(TAR)
        await rig.store.fetch(EXPECTED, source)
        told = [event for event in rig.events if isinstance(event, LayerProgress)]
        assert {event.digest for event in told} == {str(EXPECTED)}
        assert {event.total_bytes for event in told} == {source.size_bytes}
        received = [event.received_bytes for event in told]
        assert received == sorted(received)
        assert len(told) >= len(TAR) // STEP_BYTES


@given(
    st.lists(st.binary(max_size=300), min_size=1, max_size=4),
    st.integers(min_value=1, max_value=50),
)
def test_gunzip_gives_what_was_compressed_however_it_is_cut(members: list[bytes], cut: int) -> None:
    blob = b"".join(gzip.compress(member) for member in members)
    chunks = [blob[i : i + cut] for i in range(0, len(blob), cut)]
    assert b"".join(gunzip(chunks, item="blob")) == b"".join(members)


@given(st.binary(min_size=1, max_size=300), st.data())
def test_every_truncated_gzip_is_refused(plain: bytes, data: st.DataObject) -> None:
    blob = gzip.compress(plain)
    end = data.draw(st.integers(min_value=0, max_value=len(blob) - 1))
    with pytest.raises(Untrusted):
        list(gunzip([blob[:end]], item="blob"))


def test_gunzip_never_gives_more_than_a_step_at_once() -> None:
    sizes = [len(piece) for piece in gunzip([gzip.compress(bytes(5 << 20))], item="blob")]
    assert sum(sizes) == 5 << 20
    assert max(sizes) <= STEP_BYTES
