"""Registries and image tools of others. Where one is not installed, its tests say so and skip."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_registry import LocalRegistry, local_registry, why_no_registry
from peers import OciLayout, Podman, Skopeo, Umoci, write_layout


def _need(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"needs {program} (Debian: {program})")


def _need_registry() -> None:
    reason = why_no_registry()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[LocalRegistry]:
    """Empty, without TLS or authentication."""
    _need_registry()
    with local_registry(tmp_path / "registry") as running:
        yield running


@pytest.fixture
def private_registry(tmp_path: Path) -> Iterator[LocalRegistry]:
    """Empty, with TLS under an authority of its own and basic authentication."""
    _need_registry()
    with local_registry(tmp_path / "private-registry", tls_and_auth=True) as running:
        yield running


@pytest.fixture(scope="module")
def shared_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalRegistry]:
    """Plain, and one for all tests of a module: use repository names of your own, delete nothing.

    No longer than that: other modules' tests look for children that somebody left.
    """
    _need_registry()
    with local_registry(tmp_path_factory.mktemp("shared-registry") / "registry") as running:
        yield running


@pytest.fixture
def skopeo(tmp_path: Path) -> Skopeo:
    _need("skopeo")
    return Skopeo(tmp_path / "skopeo")


@pytest.fixture
def umoci() -> Umoci:
    _need("umoci")
    if os.geteuid() != 0:
        pytest.skip("umoci unpacks with owners only as root")
    return Umoci()


@pytest.fixture
def podman(tmp_path: Path) -> Iterator[Podman]:
    """Runs in a mount namespace: tests that use it are marked `root`."""
    _need("podman")
    if os.geteuid() != 0:
        pytest.skip("podman would use the user's own storage and id ranges")
    tool = Podman(tmp_path / "podman")
    try:
        yield tool
    finally:
        tool.close()


@pytest.fixture
def mixed_layout(tmp_path: Path) -> OciLayout:
    """Three layers: gzip, zstd and plain; the second replaces one file of the first."""
    lowest = _tar({"etc/name": b"lowest\n", "etc/kept": b"kept\n", "bin/tool": b"\x7fELF" * 5000})
    middle = _tar({"etc/name": b"middle\n"})
    top = _tar({"app/data": bytes(range(256)) * 64})
    return write_layout(
        tmp_path / "mixed-layout",
        [(lowest, "gzip"), (middle, "zstd"), (top, "none")],
        config={"Entrypoint": ["/bin/tool"], "Env": ["PATH=/bin"]},
    )


@pytest.fixture
def gzip_layout(tmp_path: Path) -> OciLayout:
    """Two gzip layers, which every tool reads."""
    layers = [_tar({"etc/name": b"lowest\n"}), _tar({"etc/name": b"top\n", "app/run": b"#!\n"})]
    return write_layout(
        tmp_path / "gzip-layout",
        [(tar, "gzip") for tar in layers],
        config={"Entrypoint": ["/app/run"]},
    )


def _tar(files: dict[str, bytes]) -> bytes:
    """With an entry for each folder, as image builders write it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for folder in sorted({name.split("/")[0] for name in files}):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(entry)
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o755
            archive.addfile(entry, io.BytesIO(content))
    return out.getvalue()
