"""Blobs of registries in temporary files, and nothing of them left, whatever happens."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio
from acon_helpers import tar_of
from hostile_registry import Change, HostileRegistry, flipped, hostile_registry, shorter, stalled

from acon.arguments import RegistryAccess
from acon.images.documents import OCI_CONFIG, OCI_MANIFEST
from acon.images.image import local_blob
from supervisor.errors import UnknownItem
from supervisor.formats.errors import DigestMismatch, Refusal, Untrusted
from supervisor.seams import FileBlob, RegistryBlob

TAR = tar_of({"data": bytes(range(256)) * 4000})
LAYER = "application/vnd.oci.image.layer.v1.tar"
ACCESS = RegistryAccess()
DEADLINE_S = 30


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, empty."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@asynccontextmanager
async def stored() -> AsyncIterator[tuple[HostileRegistry, RegistryBlob]]:
    """A registry that has TAR, and where that is."""
    async with hostile_registry() as registry:
        source = RegistryBlob(
            registry=registry.name,
            repository="team/app",
            blob_digest=registry.contents.add_blob(TAR),
            media_type=LAYER,
            size_bytes=len(TAR),
            tar_size_bytes=len(TAR),
        )
        yield registry, source


async def test_a_registrys_blob_is_a_file_for_as_long_as_it_is_needed(temporary: Path) -> None:
    told: list[int] = []
    async with stored() as (_registry, source):
        async with local_blob(source, ACCESS, advance=told.append) as blob:
            file = Path(blob.file)
            assert file.is_relative_to(temporary)
            assert file.read_bytes() == TAR
            assert file.stat().st_mode & 0o077 == 0
            assert (blob.size_bytes, blob.blob_digest) == (len(TAR), source.blob_digest)
            assert (blob.media_type, blob.tar_size_bytes) == (LAYER, len(TAR))
        assert sum(told) == len(TAR)
        assert not any(temporary.iterdir())


async def test_a_file_is_taken_where_it_lies(temporary: Path) -> None:
    source = FileBlob(file="/somewhere", size_bytes=1, media_type=LAYER)
    async with local_blob(source, ACCESS) as blob:
        assert blob is source
        assert not any(temporary.iterdir())


@pytest.mark.parametrize(("change", "kind"), [(flipped(), DigestMismatch), (shorter(1), Untrusted)])
async def test_other_bytes_than_the_digest_names_are_refused_and_removed(
    change: Change, kind: type[Refusal], temporary: Path
) -> None:
    async with stored() as (registry, source):
        registry.misbehave(change)
        with pytest.raises(kind):
            async with local_blob(source, ACCESS):
                raise AssertionError("it was given out")
        assert not any(temporary.iterdir())


async def test_a_blob_that_is_not_there_is_refused(temporary: Path) -> None:
    async with stored() as (_registry, source):
        absent = msgspec.structs.replace(source, blob_digest=f"sha256:{'0' * 64}")
        with pytest.raises(UnknownItem):
            async with local_blob(absent, ACCESS):
                raise AssertionError("it was given out")
        assert not any(temporary.iterdir())


@pytest.mark.parametrize("where", ["while it arrives", "while it is used"])
async def test_a_cancelled_download_leaves_nothing(where: str, temporary: Path) -> None:
    async with stored() as (registry, source):
        if where == "while it arrives":
            registry.misbehave(stalled(100_000))
        with trio.fail_after(DEADLINE_S), trio.CancelScope() as scope:

            def arrived(_count_bytes: int) -> None:
                assert any(temporary.iterdir())
                if where == "while it arrives":
                    scope.cancel()

            async with local_blob(source, ACCESS, advance=arrived):
                scope.cancel()
                await trio.lowlevel.checkpoint()
        assert scope.cancelled_caught
        assert not any(temporary.iterdir())


def add_image(registry: HostileRegistry) -> str:
    """An image whose only layer is TAR; returns its reference."""

    def described(raw: bytes, media_type: str) -> dict[str, object]:
        digest = registry.contents.add_blob(raw)
        return {"mediaType": media_type, "digest": digest, "size": len(raw)}

    diff_ids = [f"sha256:{hashlib.sha256(TAR).hexdigest()}"]
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"diff_ids": diff_ids}}
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": described(json.dumps(config).encode(), OCI_CONFIG),
        "layers": [described(TAR, LAYER)],
    }
    registry.contents.add_manifest("team/app", json.dumps(manifest).encode(), tag="1")
    return f"docker://{registry.name}/team/app:1"


@pytest.mark.parametrize("size_bytes", [0, 300_000])
async def test_ctrl_c_in_the_midst_of_a_layer_leaves_nothing_behind(
    size_bytes: int, tmp_path: Path
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    async with hostile_registry() as registry:
        reference = add_image(registry)
        layer = hashlib.sha256(TAR).hexdigest()
        registry.misbehave(stalled(size_bytes), on=f"/blobs/sha256:{layer}")
        convert = ["image", "convert", reference, "-o", str(tmp_path / "bundle"), "--json"]
        command = [sys.executable, "-m", "acon.cli", *convert]
        environment = {**os.environ, "TMPDIR": str(temporary)}
        process = await trio.lowlevel.open_process(
            command, env=environment, stdout=subprocess.DEVNULL
        )
        try:
            with trio.fail_after(DEADLINE_S):
                while not any(temporary.iterdir()):  # noqa: ASYNC110 - another process makes it
                    await trio.sleep(0.01)
                process.send_signal(signal.SIGINT)
                await process.wait()
        finally:
            with trio.CancelScope(shield=True):
                process.kill()
                await process.wait()
        assert process.returncode == 130
        assert not any(temporary.iterdir())
        assert not (tmp_path / "bundle").exists()
