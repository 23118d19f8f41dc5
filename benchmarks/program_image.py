"""The image that all container benchmarks start: two programs, an entry point, empty folders."""

from __future__ import annotations

import io
import os
import shutil
import signal
import tarfile
from pathlib import Path

from acon.client import Client
from acon.tar_source import FileTar
from benchmarks.clock_program import clock_program
from benchmarks.figures import CannotMeasure
from supervisor.formats.digest import Digest, digest_of
from supervisor.testing import Owner, manifest

PROGRAM = "/bin/clock"
ENTRY_POINT = "True"
ENTRY_POINT_PATH = f"/lib/acon/entrypoint.d/{ENTRY_POINT}"
_FOLDERS = (
    *("bin", "dev", "proc", "run", "shared", "sys", "tmp"),
    *("lib", "lib/acon", "lib/acon/entrypoint.d"),
)
# busybox decides by the name that it is called by, and knows no name with a capital.
_TRUE = b"#!/bin/busybox true\n"


def make_layer(path: Path) -> None:
    """The layer as a tar file. Raises `CannotMeasure` without a static busybox."""
    busybox = shutil.which("busybox")
    if busybox is None:
        raise CannotMeasure("busybox (Debian: busybox-static) is not installed")
    with tarfile.open(path, "w") as tar:
        for name in _FOLDERS:
            folder = tarfile.TarInfo(name)
            folder.type, folder.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(folder)
        for name, content in (
            ("bin/busybox", Path(busybox).read_bytes()),
            (PROGRAM, clock_program()),
            (ENTRY_POINT_PATH, _TRUE),
        ):
            member = tarfile.TarInfo(name.removeprefix("/"))
            member.size, member.mode = len(content), 0o755
            tar.addfile(member, io.BytesIO(content))


def unpack_layer(layer: Path, root: Path, *, owner: int) -> None:
    """As a folder, all of it `owner`'s (both ids)."""
    with tarfile.open(layer) as tar:
        # Not extractall's own filter argument: Debian 12's Python does not have it yet.
        tar.extraction_filter = lambda member, _path: member
        tar.extractall(root)
    root.chmod(0o755)
    for path in (root, *root.rglob("*")):
        os.lchown(path, owner, owner)


async def load_image(client: Client, layer: Path) -> str:
    """Admit the image and bring its layer; returns its id."""
    digest = _digest(layer)
    image = manifest(
        name="program:1",
        layers=[str(digest)],
        entrypoint=[PROGRAM],
        env=["NUMBER"],  # each start differs, so that each is measured
        maxInstances=0,
        logFDs=[1],
        signals=[int(signal.SIGKILL)],
    )
    image_id = (await client.admit([Owner("somebody").sign(image)])).image_ids[0]
    await client.upload_layer(digest, FileTar(layer))
    return image_id


def _digest(layer: Path) -> Digest:
    return digest_of("sha384", layer.read_bytes())
