"""The JSON documents of images: OCI image-spec v1.1, Docker image manifest version 2, schema 2.

Decoding checks types and bounds and ignores fields that are not known, as the specification
asks. Whoever reads a document has compared its bytes with the digest that leads to it.
"""

from __future__ import annotations

import hashlib
import platform
from typing import Annotated, TypeAlias, TypeVar

import msgspec

from acon.errors import UsageError
from supervisor.formats.errors import DigestMismatch, FormatError
from supervisor.seams import Size

# As registries and the Go tools bound them.
MAX_DOCUMENT_BYTES = 4 * 1024 * 1024

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
TAR_MEDIA_TYPE = "application/vnd.oci.image.layer.v1.tar"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
INDEX_TYPES = frozenset({OCI_INDEX, DOCKER_LIST})
MANIFEST_TYPES = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
CONFIG_TYPES = frozenset({OCI_CONFIG, DOCKER_CONFIG})

REF_NAME = "org.opencontainers.image.ref.name"
# BuildKit keeps provenance beside the images of an index, and marks it so.
_ATTESTATION = "vnd.docker.reference.type"
_SCHEMA_1 = "application/vnd.docker.distribution.manifest.v1"

# Go's names, which OCI uses, for what the kernel calls the machine.
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm/v7", "armv6l": "arm/v6"}
# The variants that a bare architecture means.
_USUAL_VARIANTS = {"amd64": "v1", "arm64": "v8", "arm": "v7"}

DigestText: TypeAlias = Annotated[
    str,
    msgspec.Meta(pattern=r"\A(sha256:[0-9a-f]{64}|sha384:[0-9a-f]{96}|sha512:[0-9a-f]{128})\Z"),
]


class Platform(msgspec.Struct, frozen=True):
    """`OS/ARCHITECTURE[/VARIANT]` in Go's names."""

    architecture: str = ""
    os: str = ""
    variant: str | None = None

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)

    @property
    def is_known(self) -> bool:
        return self.os not in ("", "unknown") and self.architecture not in ("", "unknown")

    def runs_on(self, wanted: Platform) -> bool:
        """Whether this is what `wanted` names; a bare architecture means its usual variant."""
        usual = _USUAL_VARIANTS.get(self.architecture)
        return (self.os, self.architecture, self.variant or usual) == (
            wanted.os,
            wanted.architecture,
            wanted.variant or usual,
        )


class Descriptor(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """What leads to a document or blob: its digest and size, checked by whoever reads it."""

    media_type: str
    digest: DigestText  # ALGORITHM:HEX
    size: Size  # bytes
    platform: Platform | None = None
    artifact_type: str | None = None
    annotations: dict[str, str] | None = None

    @property
    def ref_name(self) -> str | None:
        """The tag of an image in a layout."""
        return (self.annotations or {}).get(REF_NAME)

    @property
    def is_attestation(self) -> bool:
        known = self.platform is None or self.platform.is_known
        return not known or _ATTESTATION in (self.annotations or {})


class ImageIndex(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    media_type: str | None = None
    artifact_type: str | None = None
    manifests: tuple[Descriptor, ...] | None = None
    # Neither belongs here; a document that has them is two things at once (CVE-2021-41190).
    config: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    layers: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class ImageManifest(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    config: Descriptor
    layers: tuple[Descriptor, ...] | None = None
    media_type: str | None = None
    artifact_type: str | None = None
    subject: Descriptor | None = None
    annotations: dict[str, str] | None = None
    manifests: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET

    @property
    def kind(self) -> str:
        """What it is a manifest of: its artifact type, else its configuration's media type."""
        return self.artifact_type or self.config.media_type


class ProcessConfig(msgspec.Struct, frozen=True):
    """The part of an image's configuration that says how it runs (image-spec, "config")."""

    entrypoint: tuple[str, ...] | None = msgspec.field(name="Entrypoint", default=None)
    cmd: tuple[str, ...] | None = msgspec.field(name="Cmd", default=None)
    env: tuple[str, ...] | None = msgspec.field(name="Env", default=None)
    working_dir: str | None = msgspec.field(name="WorkingDir", default=None)
    user: str | None = msgspec.field(name="User", default=None)
    volumes: dict[str, object] | None = msgspec.field(name="Volumes", default=None)


class RootFs(msgspec.Struct, frozen=True):
    diff_ids: tuple[DigestText, ...] | None = None


class ImageConfig(msgspec.Struct, frozen=True, kw_only=True):
    rootfs: RootFs
    config: ProcessConfig | None = None
    architecture: str = ""
    os: str = ""
    variant: str | None = None

    @property
    def platform(self) -> Platform:
        return Platform(self.architecture, self.os, self.variant)


T = TypeVar("T")


def decode_document(raw: bytes, kind: type[T], *, item: str) -> T:
    """Raises `FormatError` naming `item` and the path of the field that is wrong."""
    if len(raw) > MAX_DOCUMENT_BYTES:
        raise FormatError(
            item,
            "must not be larger than its limit",
            expected=f"{MAX_DOCUMENT_BYTES} bytes",
            actual=len(raw),
        )
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(
            item, "must follow the OCI image specification", actual=str(error)[:320]
        ) from None


def decode_index(raw: bytes, descriptor: Descriptor) -> ImageIndex:
    """An index or Docker manifest list of the type that `descriptor` says."""
    index = decode_document(raw, ImageIndex, item=descriptor.digest)
    _require_type(index.media_type, descriptor)
    if index.config is not msgspec.UNSET or index.layers is not msgspec.UNSET:
        raise FormatError(descriptor.digest, "an index must not look like a manifest too")
    return index


def decode_manifest(raw: bytes, descriptor: Descriptor) -> ImageManifest:
    """An image manifest of the type that `descriptor` says."""
    manifest = decode_document(raw, ImageManifest, item=descriptor.digest)
    _require_type(manifest.media_type, descriptor)
    if manifest.manifests is not msgspec.UNSET:
        raise FormatError(descriptor.digest, "a manifest must not look like an index too")
    return manifest


def require_bytes(raw: bytes, descriptor: Descriptor, *, item: str) -> bytes:
    """`raw`, if size and digest are the descriptor's. Raises `DigestMismatch`, `FormatError`."""
    if len(raw) != descriptor.size:
        raise FormatError(
            item,
            "a document must have the size that its descriptor says",
            expected=f"{descriptor.size} bytes",
            actual=f"{len(raw)} bytes",
        )
    algorithm, _, expected = descriptor.digest.partition(":")
    actual = hashlib.new(algorithm, raw).hexdigest()
    if actual != expected:
        raise DigestMismatch(
            item,
            "a document must have the digest that names it",
            expected=descriptor.digest,
            actual=f"{algorithm}:{actual}",
        )
    return raw


def require_manifest_type(media_type: str, *, item: str) -> None:
    """Refuse what is neither an index nor a manifest that can be read here, and say why."""
    if media_type in INDEX_TYPES or media_type in MANIFEST_TYPES:
        return
    rule = "must be an image manifest or an index of some"
    if media_type.startswith(_SCHEMA_1):
        rule = (
            "images of Docker's schema 1 cannot be read: nothing names their layers' "
            "uncompressed bytes; push the image again with a tool of this decade"
        )
    raise FormatError(item, rule, expected=OCI_MANIFEST, actual=media_type[:160])


def parse_platform(text: str, *, item: str = "--platform") -> Platform:
    """Read `OS/ARCH[/VARIANT]`. Raises `UsageError`."""
    parts = text.split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise UsageError(
            item, "must be OS/ARCH or OS/ARCH/VARIANT", expected="linux/amd64", actual=text[:160]
        )
    return Platform(parts[1], parts[0], parts[2] if len(parts) == 3 else None)


def host_platform() -> str:
    """This machine as OCI writes it, such as `linux/amd64`."""
    machine = platform.machine()
    return f"linux/{_MACHINES.get(machine, machine)}"


def choose_platform(
    manifests: tuple[Descriptor, ...], wanted: Platform, *, item: str
) -> Descriptor:
    """The first image for `wanted` (image-spec, "image-index": several may match).

    What is attested about images is no image. A lone image without a platform is taken.
    Raises `UsageError` that lists what there is.
    """
    images = [one for one in manifests if not one.is_attestation]
    for one in images:
        if one.platform is not None and one.platform.runs_on(wanted):
            return one
    if len(images) == 1 and images[0].platform is None:
        return images[0]
    names = sorted({str(one.platform or "one that names no platform") for one in images})
    raise UsageError(
        item,
        "must hold an image for the platform (--platform chooses)",
        expected=wanted,
        actual=", ".join(names[:32]) or "none",
    )


def _require_type(stated: str | None, descriptor: Descriptor) -> None:
    if stated not in (None, descriptor.media_type):
        raise FormatError(
            descriptor.digest,
            "a document must be of the type that leads to it",
            expected=descriptor.media_type,
            actual=str(stated)[:160],
        )
