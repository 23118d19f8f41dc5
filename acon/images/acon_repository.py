"""ACON's own repository, as its client `aconcli` keeps it: signed manifests and their layers.

    manifests/HASH/MANIFEST/{acon.json,signature,signer.cer}
    blobs/HASH/DIGEST.tar

The manifests are pretty-printed there, while the signature is over their canonical or Go's
form; which one it is, is found by trying. From there on only the signed bytes are used.
Names of folders and files are checked against what they hold, and trusted for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from acon.errors import UsageError
from acon.files import read_bounded
from acon.images.documents import TAR_MEDIA_TYPE
from supervisor.errors import UnknownItem
from supervisor.formats.digest import Digest
from supervisor.formats.errors import DigestMismatch
from supervisor.formats.manifest import MAX_MANIFEST_BYTES
from supervisor.formats.signature import (
    MAX_CERTIFICATE_BYTES,
    MAX_SIGNATURE_BYTES,
    SignedManifest,
    matching_form,
    verify_signed_manifest,
)
from supervisor.seams import FileBlob

_MANIFESTS = "manifests"
_MANIFEST_FILE = "acon.json"
_MAX_IMAGES = 4096


class AconImage(msgspec.Struct, frozen=True):
    """A verified image of a repository, and where those of its layers lie that are there."""

    signed: SignedManifest
    layer_files: dict[str, FileBlob]  # by `HASH/DIGEST`; absolute files


class AconRepository:
    """A repository's folder. Reads when asked; blocking.

    Raises `UsageError` for a folder that is none. Images raise `SignatureInvalid`,
    `FormatError`, and `DigestMismatch` where they lie under another manifest's digest.
    """

    def __init__(self, folder: Path, *, unsafe_allow_sha256: bool = False) -> None:
        self._folder = folder.resolve()
        self._unsafe_allow_sha256 = unsafe_allow_sha256
        if not (self._folder / _MANIFESTS).is_dir():
            raise UsageError(
                str(folder), "must be a repository of ACON", expected=f"a folder {_MANIFESTS}/"
            )

    def images(self, image_id: str | None = None) -> tuple[AconImage, ...]:
        """The image of that id, or all in the order of their ids. Raises `UnknownItem`."""
        found = sorted(self._all(), key=lambda one: one.signed.image_id)
        if image_id is None:
            return tuple(found)
        wanted = tuple(one for one in found if str(one.signed.image_id) == image_id)
        if not wanted:
            raise UnknownItem(
                str(self._folder), f"must hold the image {image_id}", actual=_listed(found)
            )
        return wanted

    def image(self, image_id: str | None = None) -> AconImage:
        """The image of that id; None: the only one. Raises `UnknownItem`, `UsageError`."""
        found = self.images(image_id)
        if len(found) != 1:
            raise UsageError(
                str(self._folder),
                "must hold exactly one image (add :HASH/SIGNER/MANIFEST to say which)",
                actual=_listed(found),
            )
        return found[0]

    def _all(self) -> Iterator[AconImage]:
        count = 0
        for folder in (self._folder / _MANIFESTS).glob("*/*"):
            if not (folder / _MANIFEST_FILE).is_file():
                continue
            count += 1
            if count > _MAX_IMAGES:
                raise UsageError(
                    str(self._folder),
                    "a repository has a bounded number of images",
                    expected=_MAX_IMAGES,
                )
            yield self._read(folder)

    def _read(self, folder: Path) -> AconImage:
        certificate = read_bounded(folder / "signer.cer", max_bytes=MAX_CERTIFICATE_BYTES)
        signature = read_bounded(folder / "signature", max_bytes=MAX_SIGNATURE_BYTES)
        _form, raw = matching_form(
            read_bounded(folder / _MANIFEST_FILE, max_bytes=MAX_MANIFEST_BYTES),
            signature,
            certificate,
            unsafe_allow_sha256=self._unsafe_allow_sha256,
        )
        signed = verify_signed_manifest(
            raw, signature, certificate, unsafe_allow_sha256=self._unsafe_allow_sha256
        )
        named = "/".join(folder.parts[-2:])
        actual = f"{signed.image_id.algorithm}/{signed.image_id.manifest}"
        if named != actual:
            raise DigestMismatch(
                str(folder),
                "an image must lie in the folder that its manifest's digest names",
                expected=named,
                actual=actual,
            )
        return AconImage(signed, dict(self._layer_files(signed)))

    def _layer_files(self, signed: SignedManifest) -> Iterator[tuple[str, FileBlob]]:
        for layer in signed.manifest.layers:
            if not isinstance(layer, Digest):
                continue
            file = (self._folder / "blobs" / layer.algorithm / f"{layer.hex}.tar").resolve()
            if file.is_file():
                size_bytes = file.stat().st_size
                yield (
                    str(layer),
                    FileBlob(
                        file=str(file),
                        size_bytes=size_bytes,
                        media_type=TAR_MEDIA_TYPE,
                        tar_size_bytes=size_bytes,
                    ),
                )


def _listed(images: Sequence[AconImage]) -> str:
    return "images " + (", ".join(str(one.signed.image_id) for one in images[:32]) or "none")
