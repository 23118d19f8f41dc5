"""OCI image layouts (image-spec v1.1, "image-layout"): blobs by digest, and an index.

A layout is the owner's own input, yet every document is checked against the digest that
leads to it, so that a damaged download is found here and not in the TD.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import msgspec
import trio

from acon.errors import UsageError
from acon.files import read_bounded
from acon.images.documents import (
    INDEX_TYPES,
    MANIFEST_TYPES,
    MAX_DOCUMENT_BYTES,
    Descriptor,
    ImageIndex,
    decode_document,
    decode_index,
    decode_manifest,
    require_bytes,
)
from supervisor.formats.errors import FormatError, Refusal
from supervisor.seams import FileBlob

INDEX_FILE = "index.json"
MARKER_FILE = "oci-layout"
# Whoever looks for referrers reads every manifest of the layout.
_MAX_MANIFESTS = 1024
_MAX_MARKER_BYTES = 4096
_VERSION = "1.0.0"
# Under which referrers are listed where no API does it (distribution-spec 1.1).
_FALLBACK_TAG = re.compile(r"(sha256-[0-9a-f]{64}|sha384-[0-9a-f]{64}|sha512-[0-9a-f]{64})")


class _Marker(msgspec.Struct, frozen=True, rename="camel"):
    image_layout_version: str


class LayoutFiles(Protocol):
    """The files of a layout: a folder's, or an archive's members. Blocking."""

    @property
    def name(self) -> str: ...

    def read(self, path: str, *, max_bytes: int) -> bytes:
        """Raises `UsageError` for what is too large or no file."""

    def locate(self, path: str) -> tuple[str, int, int]:
        """Absolute file, offset and size in bytes. Raises as `read` does."""


class FolderFiles:
    """A layout as a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()

    @property
    def name(self) -> str:
        return str(self._folder)

    def read(self, path: str, *, max_bytes: int) -> bytes:
        file = self._folder / path
        # Not a pipe: opening one would wait for its writer.
        if not file.is_file():
            raise UsageError(self.name, f"there must be a file {path}")
        return read_bounded(file, max_bytes=max_bytes)

    def locate(self, path: str) -> tuple[str, int, int]:
        file = (self._folder / path).resolve()
        if not file.is_file():
            raise UsageError(self.name, f"there must be a file {path}")
        return str(file), 0, file.stat().st_size


class Layout:
    """Implements `ImageRepository` over the files of a layout."""

    def __init__(self, files: LayoutFiles, index: ImageIndex) -> None:
        self._files = files
        self._index = index

    @property
    def name(self) -> str:
        return self._files.name

    async def resolve(self, tag: str | None, digest: str | None) -> Descriptor:
        return await trio.to_thread.run_sync(self._resolve, tag, digest)

    async def document(self, descriptor: Descriptor, *, max_bytes: int) -> bytes:
        return await trio.to_thread.run_sync(self._document, descriptor, max_bytes)

    async def referrers(
        self, digest: str, artifact_type: str | None = None
    ) -> tuple[Descriptor, ...]:
        def found() -> tuple[Descriptor, ...]:
            return tuple(self._referrers(digest, artifact_type))

        return await trio.to_thread.run_sync(found)

    def layer_source(self, descriptor: Descriptor) -> FileBlob:
        """Raises `FormatError` for a blob of another size than the descriptor says."""
        path = _blob_path(descriptor)
        file, offset_bytes, size_bytes = self._files.locate(path)
        if size_bytes != descriptor.size:
            raise FormatError(
                f"{self.name}: {path}",
                "a blob must have the size that its descriptor says",
                expected=f"{descriptor.size} bytes",
                actual=f"{size_bytes} bytes",
            )
        return FileBlob(
            file=file,
            offset_bytes=offset_bytes,
            size_bytes=size_bytes,
            media_type=descriptor.media_type,
            blob_digest=descriptor.digest,
        )

    def _resolve(self, tag: str | None, digest: str | None) -> Descriptor:
        entries = self._index.manifests or ()
        if digest is not None:
            found = [one for one in self._manifests() if one.digest == digest]
        elif tag is not None:
            found = [one for one in entries if one.ref_name == tag]
        else:
            found = [one for one in entries if not self._is_about_another(one)]
        different = {one.digest: one for one in found}
        if len(different) != 1:
            names = sorted(one.ref_name or one.digest for one in entries)
            raise UsageError(
                self.name,
                f"must hold one image {tag or digest}"
                if tag or digest
                else "must hold exactly one image (add :TAG to say which)",
                actual=f"images {', '.join(names[:32]) or 'none'}",
            )
        return next(iter(different.values()))

    def _is_about_another(self, entry: Descriptor) -> bool:
        """Whether it is a signature or the like, which nobody means who gives no tag."""
        if entry.artifact_type is not None or entry.is_attestation:
            return True
        if _FALLBACK_TAG.fullmatch(entry.ref_name or ""):
            return True
        if len(self._index.manifests or ()) == 1 or entry.media_type not in MANIFEST_TYPES:
            return False
        manifest = decode_manifest(self._document(entry, MAX_DOCUMENT_BYTES), entry)
        return manifest.subject is not None or manifest.artifact_type is not None

    def _document(self, descriptor: Descriptor, max_bytes: int) -> bytes:
        path = _blob_path(descriptor)
        raw = self._files.read(path, max_bytes=max_bytes)
        return require_bytes(raw, descriptor, item=f"{self.name}: {path}")

    def _referrers(self, digest: str, artifact_type: str | None) -> Iterator[Descriptor]:
        seen = set()
        for one in self._manifests():
            if one.media_type not in MANIFEST_TYPES or one.digest in seen:
                continue
            seen.add(one.digest)
            try:
                manifest = decode_manifest(self._document(one, MAX_DOCUMENT_BYTES), one)
            except Refusal:
                # Whoever reads it learns what is wrong; the others are none the worse.
                yield msgspec.structs.replace(one, artifact_type=None, annotations=None)
                continue
            is_of_kind = artifact_type in (None, manifest.kind)
            if manifest.subject is not None and manifest.subject.digest == digest and is_of_kind:
                yield msgspec.structs.replace(
                    one, artifact_type=manifest.kind, annotations=manifest.annotations
                )

    def _manifests(self) -> Iterator[Descriptor]:
        """What the index lists, and what the indexes that it lists do.

        A copied fallback tag for referrers (distribution-spec 1.1) is such an index.
        """
        count = 0
        for entry in self._index.manifests or ():
            inner: tuple[Descriptor, ...] = ()
            if entry.media_type in INDEX_TYPES:
                raw = self._document(entry, MAX_DOCUMENT_BYTES)
                inner = decode_index(raw, entry).manifests or ()
            for one in (entry, *inner):
                count += 1
                if count > _MAX_MANIFESTS:
                    raise FormatError(
                        self.name, "a layout lists a bounded number of manifests", expected=count
                    )
                if one is entry or self._is_here(one):
                    yield one

    def _is_here(self, descriptor: Descriptor) -> bool:
        """Images of other platforms are often left behind when an index is copied."""
        try:
            self._files.locate(_blob_path(descriptor))
        except UsageError:
            return False
        return True


def read_layout(files: LayoutFiles) -> Layout:
    """Blocking. Raises `UsageError` for what is no layout, `FormatError` for a wrong index."""
    raw = files.read(MARKER_FILE, max_bytes=_MAX_MARKER_BYTES)
    version = decode_document(raw, _Marker, item=f"{files.name}: {MARKER_FILE}")
    if version.image_layout_version != _VERSION:
        raise FormatError(
            f"{files.name}: {MARKER_FILE}",
            "must be of a version that is known",
            expected=_VERSION,
            actual=version.image_layout_version[:160],
        )
    raw = files.read(INDEX_FILE, max_bytes=MAX_DOCUMENT_BYTES)
    return Layout(files, decode_document(raw, ImageIndex, item=f"{files.name}: {INDEX_FILE}"))


def _blob_path(descriptor: Descriptor) -> str:
    # The descriptor's type allows hex digits and a known algorithm only: a safe path.
    return f"blobs/{descriptor.digest.replace(':', '/', 1)}"
