"""Archives as `docker save`, `podman save` and `skopeo copy … docker-archive:` write them.

`manifest.json` lists images: a configuration, names and the members that are layers, lowest
first. Nothing names the bytes of a layer as it lies there; what its tar must be is said by
the configuration's diff_ids, and the configuration by its own digest, which is its name.

So that everyone else meets one kind of image only, the archive is shown as a repository of
OCI images: the manifest of each is made here, and names a layer by its diff_id.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
from pathlib import Path

import msgspec
import trio

from acon.errors import UsageError
from acon.images.archive import ArchiveFiles, read_archive
from acon.images.documents import (
    MAX_DOCUMENT_BYTES,
    OCI_CONFIG,
    OCI_MANIFEST,
    TAR_MEDIA_TYPE,
    Descriptor,
    ImageConfig,
    decode_document,
    require_bytes,
)
from acon.images.reference import parse_name
from supervisor.errors import UnknownItem
from supervisor.formats.errors import DigestMismatch, FormatError
from supervisor.seams import FileBlob

MANIFEST_FILE = "manifest.json"
_COMPRESSIONS = {b"\x1f\x8b": "+gzip", b"\x28\xb5\x2f\xfd": "+zstd"}
# `HEX.json`, and `blobs/sha256/HEX` since Docker 25.
_CONFIG_NAME = re.compile(r"(?:blobs/sha256/)?([0-9a-f]{64})(?:\.json)?")


class _Entry(msgspec.Struct, frozen=True):
    config: str = msgspec.field(name="Config")
    layers: tuple[str, ...] | None = msgspec.field(name="Layers", default=None)
    repo_tags: tuple[str, ...] | None = msgspec.field(name="RepoTags", default=None)


class DockerArchive:
    """Implements `ImageRepository`. Made by `open_docker_archive`."""

    def __init__(self, files: ArchiveFiles, entries: tuple[_Entry, ...]) -> None:
        self._files = files
        self._entries = entries
        self._documents: dict[str, bytes] = {}
        self._layers: dict[str, FileBlob] = {}  # by diff_id

    @property
    def name(self) -> str:
        return self._files.name

    async def resolve(self, tag: str | None, digest: str | None) -> Descriptor:
        if digest is not None:
            raise UsageError(self.name, "images of a docker-archive are named NAME:TAG")
        return await trio.to_thread.run_sync(self._resolve, tag)

    async def document(self, descriptor: Descriptor, *, max_bytes: int) -> bytes:
        await trio.lowlevel.checkpoint()
        raw = self._documents.get(descriptor.digest)
        if raw is None:
            raise UnknownItem(f"{self.name}: {descriptor.digest}", "is no document of the image")
        if len(raw) > max_bytes:
            raise FormatError(
                self.name, "a document must not be larger than its limit", expected=max_bytes
            )
        return require_bytes(raw, descriptor, item=self.name)

    async def referrers(
        self, digest: str, artifact_type: str | None = None
    ) -> tuple[Descriptor, ...]:
        """None: the format has no place for them."""
        await trio.lowlevel.checkpoint()
        return ()

    def layer_source(self, descriptor: Descriptor) -> FileBlob:
        """Of a layer of the image that was resolved; its descriptor's digest is the diff_id."""
        source = self._layers.get(descriptor.digest)
        if source is None:
            raise UnknownItem(f"{self.name}: {descriptor.digest}", "is no layer of the image")
        return source

    def _resolve(self, tag: str | None) -> Descriptor:
        entry = self._chosen(tag)
        config_raw = self._config(entry)
        item = f"{self.name}: {entry.config}"
        config = decode_document(config_raw, ImageConfig, item=item)
        diff_ids, paths = config.rootfs.diff_ids or (), entry.layers or ()
        if len(diff_ids) != len(paths):
            raise FormatError(
                item,
                "manifest and configuration must tell of as many layers",
                expected=len(paths),
                actual=len(diff_ids),
            )
        manifest = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": self._keep(config_raw, OCI_CONFIG),
            "layers": tuple(map(self._layer, paths, diff_ids)),
        }
        return self._keep(msgspec.json.encode(manifest, order="sorted"), OCI_MANIFEST)

    def _chosen(self, tag: str | None) -> _Entry:
        wanted = None if tag is None else parse_name(tag, item="SOURCE")
        found = [
            entry
            for entry in self._entries
            if wanted is None
            or any(parse_name(name, item=self.name) == wanted for name in entry.repo_tags or ())
        ]
        if len(found) != 1:
            names = [name for entry in self._entries for name in entry.repo_tags or ("(no name)",)]
            raise UsageError(
                self.name,
                "must hold exactly one image (add :NAME:TAG to say which)"
                if tag is None
                else f"must hold one image {tag}",
                actual=f"images {', '.join(sorted(names)[:32]) or 'none'}",
            )
        return found[0]

    def _config(self, entry: _Entry) -> bytes:
        raw = self._files.read(posixpath.normpath(entry.config), max_bytes=MAX_DOCUMENT_BYTES)
        named = _CONFIG_NAME.fullmatch(entry.config)
        actual = hashlib.sha256(raw).hexdigest()
        if named is not None and named[1] != actual:
            raise DigestMismatch(
                f"{self.name}: {entry.config}",
                "a configuration must have the digest that names it",
                expected=f"sha256:{named[1]}",
                actual=f"sha256:{actual}",
            )
        return raw

    def _layer(self, path: str, diff_id: str) -> Descriptor:
        file, offset_bytes, size_bytes = self._files.locate(posixpath.normpath(path))
        start = self._files.head(posixpath.normpath(path), 4)
        suffix = next(
            (name for magic, name in _COMPRESSIONS.items() if start.startswith(magic)), ""
        )
        source = FileBlob(
            file=file,
            offset_bytes=offset_bytes,
            size_bytes=size_bytes,
            media_type=f"{TAR_MEDIA_TYPE}{suffix}",
        )
        self._layers[diff_id] = source
        return Descriptor(media_type=source.media_type, digest=diff_id, size=size_bytes)

    def _keep(self, raw: bytes, media_type: str) -> Descriptor:
        digest = f"sha256:{hashlib.sha256(raw).hexdigest()}"
        self._documents[digest] = raw
        return Descriptor(media_type=media_type, digest=digest, size=len(raw))


def open_docker_archive(path: Path) -> DockerArchive:
    """Blocking. Raises `UsageError` for what is no such archive, `FormatError` for a wrong one."""
    files = read_archive(path)
    if MANIFEST_FILE not in files:
        hint = "an oci-archive" if "index.json" in files else f"no {MANIFEST_FILE}"
        if "repositories" in files:
            hint = "an archive of Docker before 1.10, whose layers have no digests"
        raise UsageError(str(path), "must be an archive as `docker save` makes it", actual=hint)
    raw = files.read(MANIFEST_FILE, max_bytes=MAX_DOCUMENT_BYTES)
    entries = decode_document(raw, tuple[_Entry, ...], item=f"{path}: {MANIFEST_FILE}")
    return DockerArchive(files, entries)
