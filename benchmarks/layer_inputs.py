"""Layers to measure with, made once and kept: from this machine's own files, and synthetic."""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import random
import shutil
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import msgspec

from benchmarks.figures import CannotMeasure
from supervisor import FileBlob
from supervisor.formats.digest import Digest

CACHE = Path(__file__).resolve().parent.parent / ".bench-cache"
# Where programs, libraries and their data lie on every Linux: what images are made of.
PLACES = ("/usr/lib", "/usr/share", "/usr/bin", "/usr/include")
# What an interpreter with its libraries is; the tar's headers come on top.
USUAL_BYTES = 200_000_000
USUAL_ENTRIES = 9_000
LARGEST_BYTES = 8_000_000
TAG = "1"
_TYPE = "application/vnd.oci.image"
_READ_BYTES = 1 << 20
_SMALL_FILE_BYTES = 200
_FILES_A_FOLDER = 100
_BLOCK_BYTES = 1 << 20


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """A tar and the same compressed with `gzip -6`, as files that stay.

    Digests are of the tar, but for `blob_sha256`. `entries` counts folders too.
    """

    tar: str
    blob: str
    entries: int
    tar_bytes: int
    blob_bytes: int
    sha256: str
    sha384: str
    blob_sha256: str

    @property
    def digest(self) -> Digest:
        return Digest("sha384", self.sha384)

    @property
    def source(self) -> FileBlob:
        return FileBlob(
            file=self.blob,
            media_type=f"{_TYPE}.layer.v1.tar+gzip",
            size_bytes=self.blob_bytes,
            blob_digest=f"sha256:{self.blob_sha256}",
            tar_size_bytes=self.tar_bytes,
        )

    def __str__(self) -> str:
        sizes = f"{self.tar_bytes / 1e6:.0f} MB, {self.blob_bytes / 1e6:.0f} MB as gzip"
        return f"{sizes}, {self.entries:,} entries"


def machine_layers(
    cache: Path, *, size_bytes: int, entries: int, count: int = 1
) -> tuple[Layer, ...]:
    """`count` layers of this machine's files, different ones, each of about that size.

    A machine with too few files gives smaller ones. Raises `CannotMeasure` if it has none.
    """

    name = f"machine-{size_bytes}-{entries}-{count}"
    write = partial(_write_machine_tar, size_bytes=size_bytes, entries=entries, parts=count)
    return tuple(
        _kept(cache / f"{name}-{part}", partial(write, part=part)) for part in range(count)
    )


def small_files_layer(cache: Path, *, files: int) -> Layer:
    """That many files of 200 bytes, a hundred to a folder."""
    return _kept(cache / f"small-{files}", partial(_write_small_tar, files=files))


def synthetic_layer(cache: Path, *, size_bytes: int) -> Layer:
    """Files of one megabyte, half of it zeros and half of it random but the same each time."""
    return _kept(
        cache / f"synthetic-{size_bytes}", partial(_write_large_tar, size_bytes=size_bytes)
    )


def make_layout(folder: Path, layers: Sequence[Layer]) -> Path:
    """An OCI image layout of these layers, tagged TAG; the blobs are links. Returns `folder`."""
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def put(raw: bytes, kind: str) -> dict[str, object]:
        digest = hashlib.sha256(raw).hexdigest()
        (blobs / digest).write_bytes(raw)
        return {"mediaType": f"{_TYPE}.{kind}+json", "digest": f"sha256:{digest}", "size": len(raw)}

    for layer in layers:
        (blobs / layer.blob_sha256).symlink_to(layer.blob)
    machine = platform.machine()
    config = {
        "architecture": {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine),
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer.sha256}" for layer in layers]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{_TYPE}.manifest.v1+json",
        "config": put(json.dumps(config).encode(), "config.v1"),
        "layers": [
            {
                "mediaType": layer.source.media_type,
                "digest": f"sha256:{layer.blob_sha256}",
                "size": layer.blob_bytes,
            }
            for layer in layers
        ],
    }
    descriptor = put(json.dumps(manifest).encode(), "manifest.v1")
    descriptor["annotations"] = {"org.opencontainers.image.ref.name": TAG}
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [descriptor]}))
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return folder


def warm(*paths: str) -> None:
    """Read files, so that nobody is measured with a cold page cache."""
    for path in paths:
        with open(path, "rb") as file:
            while file.read(_READ_BYTES):
                pass


# --- making ---------------------------------------------------------------------------------


def _kept(folder: Path, write: Callable[[Path], None]) -> Layer:
    """What lies in `folder` from an earlier run, or made now; half of it never stays there."""
    about = folder / "layer.json"
    if about.exists():
        return msgspec.json.decode(about.read_bytes(), type=Layer)
    folder.parent.mkdir(parents=True, exist_ok=True)
    growing = Path(tempfile.mkdtemp(prefix="new-", dir=folder.parent))
    try:
        tar, blob = growing / "layer.tar", growing / "layer.tar.gz"
        write(tar)
        with blob.open("wb") as packed:
            subprocess.run(["gzip", "-6", "-n", "-c", tar], stdout=packed, check=True)
        with tarfile.open(tar) as archive:
            entries = sum(1 for _ in archive)
        layer = Layer(
            tar=str(folder.resolve() / tar.name),
            blob=str(folder.resolve() / blob.name),
            entries=entries,
            tar_bytes=tar.stat().st_size,
            blob_bytes=blob.stat().st_size,
            sha256=_hex("sha256", tar),
            sha384=_hex("sha384", tar),
            blob_sha256=_hex("sha256", blob),
        )
        (growing / about.name).write_bytes(msgspec.json.encode(layer))
        growing.rename(folder)
    except BaseException:
        shutil.rmtree(growing, ignore_errors=True)
        raise
    return layer


def _hex(algorithm: str, path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def _write_machine_tar(path: Path, *, size_bytes: int, entries: int, part: int, parts: int) -> None:
    """Of every `parts`th file of the machine those that keep sizes at the wanted average."""
    written_bytes = count = 0
    average_bytes = size_bytes // entries
    slack_bytes = min(LARGEST_BYTES, size_bytes // 20)
    folders: set[str] = set()
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for number, file in enumerate(_files()):
            if count >= entries or written_bytes >= size_bytes:
                break
            if number % parts != part:
                continue
            size = os.lstat(file).st_size
            ahead_bytes = written_bytes + size - size_bytes * (count + 1) // entries
            # Few large files among many small ones, as everywhere, and the wanted average.
            is_large = size >= average_bytes
            if (is_large and ahead_bytes > slack_bytes) or (not is_large and ahead_bytes < 0):
                continue
            for folder in _new_parents(file, folders):
                archive.addfile(_entry(archive, folder))
                count += 1
            info = _entry(archive, file)
            if info.isreg():
                with open(file, "rb") as content:
                    archive.addfile(info, content)
            else:
                archive.addfile(info)
            written_bytes += info.size
            count += 1
    if count == 0:
        raise CannotMeasure(f"there are no files in {', '.join(PLACES)}")


def _files() -> Iterator[str]:
    """Regular files and symbolic links that can be read, in an order that stays."""
    for place in PLACES:
        for directory, names, files in os.walk(place):
            names.sort()
            for file in sorted(files):
                path = os.path.join(directory, file)
                kind = os.lstat(path).st_mode
                if stat.S_ISLNK(kind) or (stat.S_ISREG(kind) and os.access(path, os.R_OK)):
                    yield path


def _new_parents(file: str, known: set[str]) -> Iterator[str]:
    missing = []
    folder = os.path.dirname(file)
    while folder not in known and folder != "/":
        known.add(folder)
        missing.append(folder)
        folder = os.path.dirname(folder)
    return reversed(missing)


def _entry(archive: tarfile.TarFile, path: str) -> tarfile.TarInfo:
    info = archive.gettarinfo(path)
    if info.islnk():  # whatever it is a second name of may not be in this layer
        info.type, info.linkname, info.size = tarfile.REGTYPE, "", os.lstat(path).st_size
    info.uid = info.gid = 0
    info.uname = info.gname = "root"
    info.mtime = int(info.mtime)  # as image builders write it; else each gets a pax header
    return info


def _write_small_tar(path: Path, *, files: int) -> None:
    with tarfile.open(path, "w") as archive:
        for number in range(files):
            folder = f"d{number // _FILES_A_FOLDER:05}"
            if number % _FILES_A_FOLDER == 0:
                entry = tarfile.TarInfo(folder)
                entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(entry)
            _add_bytes(archive, f"{folder}/f{number:06}", b"%06d" % number * 34, _SMALL_FILE_BYTES)


def _write_large_tar(path: Path, *, size_bytes: int) -> None:
    source = random.Random(0)
    with tarfile.open(path, "w") as archive:
        for number in range(max(1, size_bytes // _BLOCK_BYTES)):
            data = source.randbytes(_BLOCK_BYTES // 2) + bytes(_BLOCK_BYTES // 2)
            _add_bytes(archive, f"f{number:05}", data, _BLOCK_BYTES)


def _add_bytes(archive: tarfile.TarFile, name: str, data: bytes, size: int) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = size, 0o644
    archive.addfile(entry, io.BytesIO(data[:size]))
