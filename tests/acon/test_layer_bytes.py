"""A layer's bytes from a file or a part of one, whatever they are compressed with."""

from __future__ import annotations

import gzip
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import zstandard

from acon.errors import UsageError
from acon.layer_bytes import hash_layer, layer_pieces, require_digest
from supervisor.formats.digest import Digest
from supervisor.formats.errors import DigestMismatch, FormatError, Untrusted
from supervisor.seams import FileBlob

TAR = bytes(range(256)) * 20_000
OCI = "application/vnd.oci.image.layer.v1.tar"
DOCKER = "application/vnd.docker.image.rootfs.diff.tar"


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def plain(data: bytes) -> bytes:
    return data


def blob(folder: Path, data: bytes, media_type: str = OCI, *, before: bytes = b"") -> FileBlob:
    """A file with `data` at some offset."""
    file = folder / "blob"
    file.write_bytes(before + data + b"behind" * bool(before))
    return FileBlob(
        file=str(file),
        size_bytes=len(data),
        media_type=media_type,
        offset_bytes=len(before),
        blob_digest=f"sha256:{hashlib.sha256(data).hexdigest()}",
        tar_size_bytes=len(TAR),
    )


@pytest.mark.parametrize(
    ("media_type", "packed"),
    [
        (OCI, plain),
        (DOCKER, plain),
        (f"{OCI}+gzip", gzip.compress),
        (f"{DOCKER}.gzip", gzip.compress),
        (f"{OCI}+zstd", zstd),
    ],
)
def test_every_known_compression_gives_the_tar_from_any_offset(
    media_type: str, packed: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    for before in (b"", b"some other member" * 100):
        source = blob(tmp_path, packed(TAR), media_type, before=before)
        read: list[int] = []
        assert b"".join(layer_pieces(source, advance=read.append)) == TAR
        assert sum(read) == source.size_bytes
        digests = hash_layer(source, algorithms=("sha384", "sha256"))
        assert digests.size_bytes == len(TAR)
        assert digests.digest("sha384").hex == hashlib.sha384(TAR).hexdigest()
        assert digests.digest("sha256").hex == hashlib.sha256(TAR).hexdigest()


def test_concatenated_gzip_members_are_one_layer(tmp_path: Path) -> None:
    packed = gzip.compress(TAR[:1000]) + gzip.compress(TAR[1000:])
    source = blob(tmp_path, packed, f"{OCI}+gzip")
    assert b"".join(layer_pieces(source)) == TAR


@pytest.mark.parametrize(
    ("data", "media_type"),
    [
        (gzip.compress(TAR)[:-1], f"{OCI}+gzip"),
        (gzip.compress(TAR) + b"x", f"{OCI}+gzip"),
        (TAR, f"{OCI}+gzip"),
        (b"", f"{OCI}+gzip"),
        (zstd(TAR)[:-1], f"{OCI}+zstd"),
        (zstd(TAR) + b"x", f"{OCI}+zstd"),
        (gzip.compress(TAR), f"{OCI}+zstd"),
    ],
    ids=["cut", "more", "plain", "empty", "zstd cut", "zstd more", "gzip as zstd"],
)
def test_damaged_compression_is_refused_with_the_file(
    data: bytes, media_type: str, tmp_path: Path
) -> None:
    source = blob(tmp_path, data, media_type)
    with pytest.raises(FormatError) as caught:
        hash_layer(source)
    assert caught.value.item == source.file


@pytest.mark.parametrize("media_type", [OCI, f"{OCI}+gzip"])
def test_a_blob_of_another_digest_is_refused(media_type: str, tmp_path: Path) -> None:
    data = TAR if media_type == OCI else gzip.compress(TAR)
    wrong = f"sha256:{'0' * 64}"
    source = msgspec.structs.replace(blob(tmp_path, data, media_type), blob_digest=wrong)
    with pytest.raises(DigestMismatch) as caught:
        hash_layer(source)
    assert caught.value.expected == wrong


def test_the_bytes_of_a_blob_without_a_digest_are_taken_as_they_are(tmp_path: Path) -> None:
    source = msgspec.structs.replace(blob(tmp_path, TAR), blob_digest=None)
    assert hash_layer(source).size_bytes == len(TAR)


@pytest.mark.parametrize("difference", [-1, 1])
def test_a_tar_of_another_size_than_is_said_is_refused(difference: int, tmp_path: Path) -> None:
    source = blob(tmp_path, gzip.compress(TAR), f"{OCI}+gzip")
    source = msgspec.structs.replace(source, tar_size_bytes=len(TAR) + difference)
    with pytest.raises(FormatError, match="must have the size"):
        hash_layer(source)


def test_a_bomb_ends_where_the_size_that_is_said_ends(tmp_path: Path) -> None:
    source = blob(tmp_path, gzip.compress(bytes(200 << 20)), f"{OCI}+gzip")
    source = msgspec.structs.replace(source, tar_size_bytes=1 << 20)
    read: list[int] = []
    with pytest.raises(FormatError):
        for piece in layer_pieces(source):
            read.append(len(piece))
    assert sum(read) <= 1 << 20


def test_a_file_that_is_shorter_than_its_blob_is_refused(tmp_path: Path) -> None:
    source = blob(tmp_path, TAR)
    Path(source.file).write_bytes(TAR[:-1])
    with pytest.raises(FormatError, match="must hold the whole blob"):
        hash_layer(source)


def test_pipes_and_folders_make_nobody_wait(tmp_path: Path) -> None:
    source = blob(tmp_path, TAR)
    os.mkfifo(tmp_path / "pipe")
    for file in (tmp_path / "pipe", tmp_path):
        with pytest.raises(UsageError, match="plain file"):
            hash_layer(msgspec.structs.replace(source, file=str(file)))


@pytest.mark.parametrize("blob_digest", ["md5:00", "shake_128:00", "", "sha256"])
def test_a_digest_of_an_unknown_algorithm_is_refused(blob_digest: str, tmp_path: Path) -> None:
    source = msgspec.structs.replace(blob(tmp_path, TAR), blob_digest=blob_digest)
    with pytest.raises((FormatError, DigestMismatch)):
        hash_layer(source)


@pytest.mark.parametrize("media_type", ["", "text/plain", f"{OCI}+bzip2", f"{OCI}+gzip+encrypted"])
def test_other_media_types_are_refused(media_type: str, tmp_path: Path) -> None:
    with pytest.raises(Untrusted) as caught:
        hash_layer(blob(tmp_path, TAR, media_type))
    assert caught.value.actual == media_type


def test_reading_can_be_stopped_between_any_two_reads(tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop() -> None:
        raise Stopped

    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Stopped):
        hash_layer(blob(tmp_path, TAR), between=stop)
    pieces = layer_pieces(blob(tmp_path, TAR))
    next(pieces)
    pieces.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_layer_must_have_the_digest_that_the_manifest_names(tmp_path: Path) -> None:
    digests = hash_layer(blob(tmp_path, TAR))
    require_digest(digests, Digest("sha384", hashlib.sha384(TAR).hexdigest()), item="x")
    with pytest.raises(DigestMismatch, match="x: a layer's uncompressed tar"):
        require_digest(digests, Digest("sha384", "0" * 96), item="x")
