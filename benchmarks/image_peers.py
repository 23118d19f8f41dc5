"""From an image to something that can be run, by others: podman, umoci, skopeo. And parts of it.

Each side's `work` is timed; `prepare` and `tidy` are not. Nothing is kept between rounds.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import zlib
from pathlib import Path
from typing import Protocol

import trio
from isal import isal_zlib

from benchmarks.figures import CannotMeasure
from benchmarks.layer_inputs import TAG, Layer
from benchmarks.programs import run_program

_READ_BYTES = 1 << 20


class Side(Protocol):
    name: str

    async def prepare(self) -> None: ...

    async def work(self) -> None: ...

    async def tidy(self) -> None:
        """Idempotent, and shielded by its caller."""


class _Folder:
    """A folder of each round's own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._log = folder.with_name(f"{folder.name}.log")

    async def prepare(self) -> None:
        self._folder.mkdir()
        await trio.lowlevel.checkpoint()

    async def tidy(self) -> None:
        await trio.to_thread.run_sync(lambda: shutil.rmtree(self._folder, ignore_errors=True))


class PodmanPull(_Folder):
    """`podman pull` into a storage that is new but set up.

    `source`: `oci:DIR:TAG` or `docker://...` of a registry without TLS. Storage on overlay.
    """

    name = "podman pull"

    def __init__(self, source: str, folder: Path, *, name: str = name) -> None:
        super().__init__(folder)
        self.name = name
        self._podman = _need("podman")
        self._source = source
        access = ["--tls-verify=false"] if source.startswith("docker://") else []
        self._pull = ["pull", "--quiet", *access, source]

    @property
    def _command(self) -> list[str]:
        own_state = self._folder / "var-lib"
        return [
            # Whatever its options say, it takes notes of registries below /var/lib.
            *("unshare", "--mount", "--propagation", "private"),
            *("sh", "-c", 'mount --bind "$0" /var/lib && exec "$@"', str(own_state)),
            *(self._podman, "--root", str(self._folder / "storage")),
            *("--runroot", str(self._folder / "run"), "--tmpdir", str(self._folder / "tmp")),
            *("--storage-driver", "overlay", "--events-backend", "none"),
        ]

    @property
    def _environment(self) -> dict[str, str]:
        return {**os.environ, "CONTAINERS_CONF": str(self._folder / "containers.conf")}

    async def prepare(self) -> None:
        await super().prepare()
        (self._folder / "var-lib").mkdir()
        # Otherwise it takes locks of the whole machine in /dev/shm.
        (self._folder / "containers.conf").write_text('[engine]\nlock_type = "file"\n')
        await self._run("images", "--quiet")

    async def work(self) -> None:
        await self._run(*self._pull)

    async def _run(self, *arguments: str) -> None:
        command = [*self._command, *arguments]
        await run_program(command, self._log, environment=self._environment)


class UmociUnpack(_Folder):
    """`umoci unpack` of an OCI layout, as root, owners kept."""

    name = "umoci unpack"

    def __init__(self, layout: Path, folder: Path) -> None:
        super().__init__(folder)
        self._umoci = _need("umoci")
        self._layout = layout

    async def work(self) -> None:
        bundle = str(self._folder / "bundle")
        image = f"{self._layout}:{TAG}"
        await run_program([self._umoci, "unpack", "--image", image, bundle], self._log)


class SkopeoThenUmoci(_Folder):
    """`skopeo copy` from a registry without TLS into an OCI layout, then `umoci unpack`."""

    name = "skopeo copy + umoci unpack"

    def __init__(self, source: str, folder: Path) -> None:
        super().__init__(folder)
        self._skopeo = _need("skopeo")
        self._umoci = _need("umoci")
        self._source = source

    async def work(self) -> None:
        layout = self._folder / "layout"
        await run_program(
            copy_command(self._skopeo, self._source, f"oci:{layout}:{TAG}"),
            self._log,
            environment=copy_environment(self._folder),
        )
        bundle = str(self._folder / "bundle")
        image = f"{layout}:{TAG}"
        await run_program([self._umoci, "unpack", "--image", image, bundle], self._log)


def copy_command(skopeo: str, source: str, target: str) -> list[str]:
    """As it is, byte for byte; either end may be a registry without TLS."""
    options = ["--preserve-digests", "--src-tls-verify=false", "--dest-tls-verify=false"]
    return [skopeo, "--insecure-policy", "copy", "--quiet", *options, source, target]


def copy_environment(folder: Path) -> dict[str, str]:
    """As another user than root it keeps its notes of registries in a home, here `folder`."""
    return {**os.environ, "XDG_DATA_HOME": str(folder), "_CONTAINERS_ROOTLESS_UID": "1"}


async def push(layout: Path, target: str, folder: Path) -> None:
    """Put a layout's image into a registry without TLS, byte for byte."""
    command = copy_command(_need("skopeo"), f"oci:{layout}:{TAG}", target)
    environment = copy_environment(folder)
    await run_program(command, folder / "push.log", environment=environment)


# --- what nobody can leave out --------------------------------------------------------------


class _Alone:
    async def prepare(self) -> None:
        await trio.lowlevel.checkpoint()

    async def tidy(self) -> None:
        await trio.lowlevel.checkpoint()


class Gunzip(_Alone):
    """`gunzip -c >/dev/null`, a process of its own."""

    name = "gunzip"

    def __init__(self, layer: Layer, log: Path) -> None:
        self._layer = layer
        self._log = log

    async def work(self) -> None:
        command = ["sh", "-c", 'gunzip -c "$0" >/dev/null', self._layer.blob]
        await run_program(command, self._log)


class IsalAlone(_Alone):
    """Decompressing with isal, a megabyte of the file at a time; the bytes are dropped."""

    name = "isal alone"

    def __init__(self, layer: Layer) -> None:
        self._layer = layer

    async def work(self) -> None:
        await trio.to_thread.run_sync(self._decompress)

    def _decompress(self) -> None:
        stream = isal_zlib.decompressobj(16 + zlib.MAX_WBITS)
        size = 0
        with open(self._layer.blob, "rb") as blob:
            while chunk := blob.read(_READ_BYTES):
                size += len(stream.decompress(chunk))
        if size != self._layer.tar_bytes or not stream.eof:
            raise CannotMeasure(f"isal found {size} bytes of {self._layer.tar_bytes}")


class Sha384Alone(_Alone):
    """SHA-384 of the uncompressed tar, read from the page cache."""

    name = "SHA-384 alone"

    def __init__(self, layer: Layer) -> None:
        self._layer = layer

    async def work(self) -> None:
        await trio.to_thread.run_sync(self._hash)

    def _hash(self) -> None:
        with open(self._layer.tar, "rb") as tar:
            computed = hashlib.file_digest(tar, "sha384").hexdigest()
        if computed != self._layer.sha384:
            raise CannotMeasure(f"{self._layer.tar} changed")


def _need(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        raise CannotMeasure(f"{program} is not installed")
    return found
