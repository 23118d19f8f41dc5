"""Writes OCI image layouts (image-spec v1.1): as much of it as one image needs."""

from __future__ import annotations

import gzip
import hashlib
import json
import platform
from dataclasses import dataclass, field
from pathlib import Path

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"


@dataclass(frozen=True)
class Process:
    """How an image runs."""

    entrypoint: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    working_dir: str = "/"


@dataclass(frozen=True)
class PackedLayer:
    """A layer's tar, packed once and used by several images."""

    blob: bytes
    diff_id: str
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", _digest(self.blob))


def pack(tar: bytes) -> PackedLayer:
    """gzip without a time or a name in it, so that equal tars are equal blobs."""
    # Level 1: the layouts live as long as a demo does, and whoever waits for it is a person.
    return PackedLayer(gzip.compress(tar, compresslevel=1, mtime=0), _digest(tar))


def write_layout(directory: Path, *, tag: str, layers: list[PackedLayer], process: Process) -> None:
    """A layout with one image; `layers` lowest first."""
    blobs = directory / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)
    machine = platform.machine()
    config = _put_json(
        blobs,
        {
            "architecture": _ARCHITECTURES.get(machine, machine),
            "os": "linux",
            "config": {
                "Entrypoint": list(process.entrypoint),
                "Env": list(process.env),
                "WorkingDir": process.working_dir,
            },
            "rootfs": {"type": "layers", "diff_ids": [one.diff_id for one in layers]},
        },
        "application/vnd.oci.image.config.v1+json",
    )
    for layer in layers:
        (blobs / layer.digest.removeprefix("sha256:")).write_bytes(layer.blob)
    manifest = _put_json(
        blobs,
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config,
            "layers": [
                {"mediaType": _LAYER_TYPE, "digest": one.digest, "size": len(one.blob)}
                for one in layers
            ],
        },
        "application/vnd.oci.image.manifest.v1+json",
    )
    manifest["annotations"] = {"org.opencontainers.image.ref.name": tag}
    index = {"schemaVersion": 2, "manifests": [manifest]}
    (directory / "index.json").write_text(json.dumps(index, sort_keys=True), encoding="utf-8")
    (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}', encoding="utf-8")


def _put_json(blobs: Path, value: object, media_type: str) -> dict[str, object]:
    raw = json.dumps(value, sort_keys=True).encode()
    digest = _digest(raw)
    (blobs / digest.removeprefix("sha256:")).write_bytes(raw)
    return {"mediaType": media_type, "digest": digest, "size": len(raw)}


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
