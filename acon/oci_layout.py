"""Reads an OCI image layout (image-spec v1.1, "image-layout"): a folder with blobs by digest.

A layout is the owner's own input, yet every blob is checked against the digest that
leads to it, so that a damaged download is found here and not in the TD.
"""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path
from typing import TypeVar

import msgspec

from acon.errors import UsageError
from acon.files import read_bounded

_MAX_DOCUMENT_BYTES = 4 * 1024 * 1024
_REF_NAME = "org.opencontainers.image.ref.name"
_INDEX_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_MANIFEST_TYPES = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
# Go's names, which OCI uses, for what the kernel calls the machine.
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_BLOB_ALGORITHMS = frozenset({"sha256", "sha384", "sha512"})
_HEX = frozenset("0123456789abcdef")


class Platform(msgspec.Struct, frozen=True):
    architecture: str
    os: str


class Descriptor(msgspec.Struct, frozen=True, rename="camel"):
    media_type: str
    digest: str
    size: int
    platform: Platform | None = None
    annotations: dict[str, str] | None = None

    @property
    def tag(self) -> str | None:
        return (self.annotations or {}).get(_REF_NAME)


class _Index(msgspec.Struct, frozen=True):
    manifests: tuple[Descriptor, ...]


class _ImageManifest(msgspec.Struct, frozen=True):
    config: Descriptor
    layers: tuple[Descriptor, ...]


class ProcessConfig(msgspec.Struct, frozen=True):
    """The part of an image's configuration that says how it runs (image-spec, "config")."""

    entrypoint: tuple[str, ...] | None = msgspec.field(name="Entrypoint", default=None)
    cmd: tuple[str, ...] | None = msgspec.field(name="Cmd", default=None)
    env: tuple[str, ...] | None = msgspec.field(name="Env", default=None)
    working_dir: str | None = msgspec.field(name="WorkingDir", default=None)
    user: str | None = msgspec.field(name="User", default=None)
    volumes: dict[str, object] | None = msgspec.field(name="Volumes", default=None)


class _RootFs(msgspec.Struct, frozen=True):
    diff_ids: tuple[str, ...]


class _ImageConfig(msgspec.Struct, frozen=True):
    rootfs: _RootFs
    config: ProcessConfig | None = None


class OciImage(msgspec.Struct, frozen=True, kw_only=True):
    """One image of a layout; `layers` and `diff_ids` go together, lowest first."""

    layout: Path
    process: ProcessConfig
    layers: tuple[Descriptor, ...]
    diff_ids: tuple[str, ...]


T = TypeVar("T")


def host_platform() -> str:
    """This machine as OCI writes it, such as `linux/amd64`."""
    machine = platform.machine()
    return f"linux/{_ARCHITECTURES.get(machine, machine)}"


def blob_path(layout: Path, digest: str) -> Path:
    """Where a blob lies. Raises `UsageError` for a digest that is no safe file name."""
    algorithm, _, hex_digits = digest.partition(":")
    if algorithm not in _BLOB_ALGORITHMS or not hex_digits or not _HEX.issuperset(hex_digits):
        raise UsageError(
            str(layout), "a blob is named by its digest", expected="sha256:HEX", actual=digest[:160]
        )
    return layout / "blobs" / algorithm / hex_digits


def split_source(source: str) -> tuple[Path, str | None]:
    """`oci:LAYOUTDIR[:TAG]` -> folder and tag."""
    scheme, colon, rest = source.partition(":")
    if scheme != "oci" or not colon or not rest:
        raise UsageError(
            "SOURCE", "must name an OCI layout folder", expected="oci:FOLDER[:TAG]", actual=source
        )
    whole = Path(rest)
    if whole.is_dir():
        return whole, None
    folder, colon, tag = rest.rpartition(":")
    if not colon:
        raise UsageError("SOURCE", "there must be such a folder", actual=rest)
    return Path(folder), tag


def open_image(source: str, *, platform_name: str) -> OciImage:
    """Find the image that `source` names; an index of several platforms gives `platform_name`."""
    layout, tag = split_source(source)
    if not (layout / "oci-layout").is_file():
        raise UsageError(str(layout), "must be an OCI layout, with a file `oci-layout` in it")
    raw_index = read_bounded(layout / "index.json", max_bytes=_MAX_DOCUMENT_BYTES)
    index = _decode(raw_index, _Index, item=f"{layout}/index.json")
    chosen = _by_tag(index, tag, item=str(layout))
    if chosen.media_type in _INDEX_TYPES:
        inner = _decode(_document(layout, chosen), _Index, item=chosen.digest)
        chosen = _by_platform(inner, platform_name, item=str(layout))
    if chosen.media_type not in _MANIFEST_TYPES:
        raise UsageError(
            str(layout),
            "the descriptor must lead to an image manifest",
            expected=_MANIFEST_TYPES[0],
            actual=chosen.media_type,
        )
    manifest = _decode(_document(layout, chosen), _ImageManifest, item=chosen.digest)
    config = _decode(_document(layout, manifest.config), _ImageConfig, item=manifest.config.digest)
    if len(config.rootfs.diff_ids) != len(manifest.layers):
        raise UsageError(
            chosen.digest,
            "manifest and configuration must tell of as many layers",
            expected=len(manifest.layers),
            actual=len(config.rootfs.diff_ids),
        )
    return OciImage(
        layout=layout,
        process=config.config or ProcessConfig(),
        layers=manifest.layers,
        diff_ids=config.rootfs.diff_ids,
    )


def _by_tag(index: _Index, tag: str | None, *, item: str) -> Descriptor:
    found = [one for one in index.manifests if tag is None or one.tag == tag]
    if len(found) != 1:
        names = ", ".join(sorted(one.tag or one.digest for one in index.manifests)) or "none"
        raise UsageError(
            item,
            "must hold exactly one image" if tag is None else f"must hold one image tagged {tag}",
            expected="oci:FOLDER:TAG" if tag is None else tag,
            actual=f"images {names}",
        )
    return found[0]


def _by_platform(index: _Index, wanted: str, *, item: str) -> Descriptor:
    known = [(one, one.platform) for one in index.manifests if one.platform is not None]
    found = [one for one, is_for in known if f"{is_for.os}/{is_for.architecture}" == wanted]
    if len(found) != 1:
        raise UsageError(
            item,
            "must hold one image for the platform (--platform chooses)",
            expected=wanted,
            actual=", ".join(sorted(f"{on.os}/{on.architecture}" for _, on in known)) or "none",
        )
    return found[0]


def _document(layout: Path, descriptor: Descriptor) -> bytes:
    raw = read_bounded(blob_path(layout, descriptor.digest), max_bytes=_MAX_DOCUMENT_BYTES)
    algorithm, _, expected = descriptor.digest.partition(":")
    actual = hashlib.new(algorithm, raw).hexdigest()
    if actual != expected:
        raise UsageError(
            f"{layout}: blob {descriptor.digest}",
            "a blob must have the digest that names it",
            expected=expected,
            actual=actual,
        )
    return raw


def _decode(raw: bytes, kind: type[T], *, item: str) -> T:
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.DecodeError as error:
        raise UsageError(item, "must follow the OCI image specification", actual=error) from None
