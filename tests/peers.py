"""skopeo, umoci and podman, with all that they keep below a folder of the test's."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import zstandard
from local_registry import LocalRegistry

TIMEOUT_S = 120
Compression = Literal["gzip", "zstd", "none"]
_IMAGE = "application/vnd.oci.image"
_SUFFIX: Mapping[Compression, str] = {"gzip": "+gzip", "zstd": "+zstd", "none": ""}


@dataclass(frozen=True)
class OciLayout:
    """An OCI image layout that lies in `directory`.

    `tars` are its layers uncompressed, lowest first; `layers` and `manifest` the descriptors.
    """

    directory: Path
    tag: str
    tars: tuple[bytes, ...]
    layers: tuple[dict[str, object], ...]
    manifest: dict[str, object]

    @property
    def reference(self) -> str:
        return f"oci:{self.directory}:{self.tag}"

    def diff_ids(self, algorithm: str = "sha384") -> tuple[str, ...]:
        """`sha384/HEX` of each tar, as a signed manifest names its layers."""
        return tuple(f"{algorithm}/{hashlib.new(algorithm, tar).hexdigest()}" for tar in self.tars)


def write_layout(
    directory: Path,
    layers: Sequence[tuple[bytes, Compression]],
    *,
    tag: str = "1",
    config: Mapping[str, object] | None = None,
) -> OciLayout:
    """An image for this machine of these tars, each stored as said; lowest layer first."""
    blobs = directory / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def put(raw: bytes, media_type: str) -> dict[str, object]:
        digest = hashlib.sha256(raw).hexdigest()
        (blobs / digest).write_bytes(raw)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(raw)}

    tars = tuple(tar for tar, _ in layers)
    diff_ids = [f"sha256:{hashlib.sha256(tar).hexdigest()}" for tar in tars]
    described = {
        "architecture": _architecture(),
        "os": "linux",
        "config": dict(config or {}),
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    }
    descriptors = tuple(
        put(_compressed(tar, how), f"{_IMAGE}.layer.v1.tar{_SUFFIX[how]}") for tar, how in layers
    )
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{_IMAGE}.manifest.v1+json",
        "config": put(json.dumps(described).encode(), f"{_IMAGE}.config.v1+json"),
        "layers": list(descriptors),
    }
    descriptor = put(json.dumps(manifest).encode(), f"{_IMAGE}.manifest.v1+json")
    named = {**descriptor, "annotations": {"org.opencontainers.image.ref.name": tag}}
    index = {"schemaVersion": 2, "manifests": [named]}
    (directory / "index.json").write_text(json.dumps(index))
    (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return OciLayout(directory, tag, tars, descriptors, descriptor)


def _compressed(tar: bytes, how: Compression) -> bytes:
    if how == "gzip":
        return gzip.compress(tar, mtime=0)
    if how == "zstd":
        return zstandard.ZstdCompressor().compress(tar)
    return tar


def _architecture() -> str:
    """Go's word for this machine, which image configurations use."""
    machine = os.uname().machine
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)


class Skopeo:
    """Copies images; what it remembers of registries stays below `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def copy(
        self,
        source: str,
        target: str,
        *,
        source_registry: LocalRegistry | None = None,
        target_registry: LocalRegistry | None = None,
        options: Sequence[str] = (),
    ) -> None:
        """`skopeo copy`; where an end is a registry, say which. Raises `RuntimeError`."""
        ends = [*_access("src", source_registry), *_access("dest", target_registry)]
        self.run("copy", *ends, *options, source, target)

    def push(self, layout: OciLayout, registry: LocalRegistry, repository: str) -> str:
        """Copy a layout, byte for byte, under its own tag; returns the `docker://` reference."""
        reference = registry.reference(repository, layout.tag)
        # Without the option plain layers would arrive compressed, under another manifest.
        exactly = ["--preserve-digests"]
        self.copy(layout.reference, reference, target_registry=registry, options=exactly)
        return reference

    def run(self, *arguments: str) -> str:
        """Any command; returns its standard output. Raises `RuntimeError` with its words."""
        command = ["skopeo", "--insecure-policy", "--tmpdir", str(self._folder), *arguments]
        # As another user than root it keeps its notes in a home, which is ours to choose.
        home = {"XDG_DATA_HOME": str(self._folder), "_CONTAINERS_ROOTLESS_UID": "1"}
        return run_tool(command, {**os.environ, **home})


def _access(end: str, registry: LocalRegistry | None) -> list[str]:
    if registry is None:
        return []
    if registry.ca_file is None:
        return [f"--{end}-tls-verify=false"]
    options = [f"--{end}-cert-dir={certificates_folder(registry.ca_file)}"]
    if registry.auth_file is not None:
        options.append(f"--{end}-authfile={registry.auth_file}")
    return options


def certificates_folder(ca_file: Path) -> Path:
    """A folder that holds the authority and nothing else, as the containers tools want it."""
    folder = ca_file.parent / "certificates"
    folder.mkdir(exist_ok=True)
    (folder / "ca.crt").write_bytes(ca_file.read_bytes())
    return folder


class Umoci:
    """Unpacks images. It knows gzip and plain layers, no zstd."""

    def unpack(self, layout: Path, tag: str, bundle: Path) -> Path:
        """As root, owners kept; returns the new root file system. Raises `RuntimeError`."""
        run_tool(["umoci", "unpack", "--image", f"{layout}:{tag}", str(bundle)])
        return bundle / "rootfs"


class Podman:
    """A podman whose storage and locks lie below `folder`; whoever makes it calls `close`."""

    def __init__(self, folder: Path, *, driver: Literal["vfs", "overlay"] = "vfs") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # It takes no path of more than 50 characters for what it keeps while running.
        self._run_folder = Path(tempfile.mkdtemp(prefix="podman-"))
        config = folder / "containers.conf"
        # Otherwise it takes locks of the whole machine in /dev/shm.
        config.write_text('[engine]\nlock_type = "file"\nevents_logger = "none"\n')
        policy = folder / "policy.json"
        policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        self._environment = {**os.environ, "CONTAINERS_CONF": str(config)}
        own_state = folder / "var-lib"
        own_state.mkdir(exist_ok=True)
        self._command = (
            # Whatever its options say, it takes notes of registries below /var/lib.
            *("unshare", "--mount", "--propagation", "private"),
            *("sh", "-c", 'mount --bind "$0" /var/lib && exec "$@"', str(own_state)),
            *("podman", "--root", str(folder / "storage"), "--runroot", str(self._run_folder)),
            *("--tmpdir", str(self._run_folder / "tmp"), "--storage-driver", driver),
            *("--cgroup-manager", "cgroupfs"),
        )
        self._policy = f"--signature-policy={policy}"

    def pull(self, source: str, *, registry: LocalRegistry | None = None) -> str:
        """From `oci:`, `docker-archive:` or `docker://`; returns the image's id."""
        access = self._access(registry)
        return self.run("pull", "--quiet", self._policy, *access, source).split()[-1]

    def push(self, image: str, target: str, *, registry: LocalRegistry | None = None) -> None:
        self.run("push", "--quiet", self._policy, *self._access(registry), image, target)

    def save(self, image: str, archive: Path, *, archive_format: str = "docker-archive") -> Path:
        """`podman save`, as `docker save` writes it (or "oci-archive"); returns the archive."""
        self.run("save", "--quiet", "--format", archive_format, "--output", str(archive), image)
        return archive

    def run(self, *arguments: str) -> str:
        """Any command; returns its standard output. Raises `RuntimeError` with its words."""
        return run_tool([*self._command, *arguments], self._environment)

    @staticmethod
    def _access(registry: LocalRegistry | None) -> list[str]:
        if registry is None:
            return []
        if registry.ca_file is None:
            return ["--tls-verify=false"]
        options = [f"--cert-dir={certificates_folder(registry.ca_file)}"]
        if registry.auth_file is not None:
            options.append(f"--authfile={registry.auth_file}")
        return options

    def close(self) -> None:
        """Its mounts went with each command's namespace, its storage goes with the folder."""
        shutil.rmtree(self._run_folder)


def run_tool(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Run to the end; returns standard output. Raises `RuntimeError` with the tool's words."""
    done = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed: {done.stderr[-2000:]}")
    return done.stdout
