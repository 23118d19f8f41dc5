"""A bundle: the folder that `acon image convert` makes and `acon load` reads.

`manifest.json` holds exactly the bytes that are signed, `signature` and `cert.der`
vouch for them, `sources.json` says where the layers' bytes can be found and is
trusted for nothing: whoever reads a layer checks its digest.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

import msgspec

from acon.errors import UsageError
from acon.files import read_bounded, write_whole
from supervisor.seams import FileBlob, LayerSource

if TYPE_CHECKING:
    from supervisor.formats.signature import SignedManifest

_MAX_MANIFEST_BYTES = 4 * 1024 * 1024
_MAX_SIGNATURE_BYTES = 64 * 1024
_MAX_SOURCES_BYTES = 16 * 1024 * 1024

JsonObject: TypeAlias = dict[str, object]


class _Sources(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    layers: dict[str, LayerSource]


class Bundle:
    """A bundle folder and what may be done with it. Reads lazily, writes files whole."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.manifest_file = directory / "manifest.json"
        self.signature_file = directory / "signature"
        self.certificate_file = directory / "cert.der"
        self.sources_file = directory / "sources.json"

    @property
    def is_signed(self) -> bool:
        return self.signature_file.exists() and self.certificate_file.exists()

    def manifest_bytes(self) -> bytes:
        if not self.manifest_file.is_file():
            raise UsageError(
                str(self.directory),
                "must be a folder with a manifest.json, as `acon image convert` makes it",
            )
        return read_bounded(self.manifest_file, max_bytes=_MAX_MANIFEST_BYTES)

    def manifest_object(self) -> JsonObject:
        """The manifest as decoded JSON, to be edited. Raises `FormatError` if it is not strict."""
        from supervisor.formats import canonical_json

        decoded = canonical_json.decode(
            self.manifest_bytes(), item=str(self.manifest_file), max_bytes=_MAX_MANIFEST_BYTES
        )
        if not isinstance(decoded, dict):
            raise UsageError(str(self.manifest_file), "a manifest is a JSON object")
        return cast(JsonObject, decoded)

    def sources(self) -> dict[str, LayerSource]:
        """`HASH/DIGEST` of layers and where their bytes are; files by their absolute paths."""
        if not self.sources_file.exists():
            return {}
        raw = read_bounded(self.sources_file, max_bytes=_MAX_SOURCES_BYTES)
        try:
            found = msgspec.json.decode(raw, type=_Sources).layers
            return {name: self._located(source) for name, source in found.items()}
        except (ValueError, RecursionError) as error:  # msgspec's faults are ValueErrors
            raise UsageError(
                str(self.sources_file), "must say where layers are", actual=error
            ) from None

    def _located(self, source: LayerSource) -> LayerSource:
        if not isinstance(source, FileBlob):
            return source
        where = self.directory.resolve() / source.file
        return msgspec.structs.replace(source, file=str(where.resolve()))

    def signed(self, *, unsafe_allow_sha256: bool = False) -> SignedManifest:
        """The verified image. Raises `SignatureInvalid`, `FormatError`, unsigned `UsageError`."""
        from supervisor.formats.signature import verify_signed_manifest

        manifest = self.manifest_bytes()
        if not self.is_signed:
            raise UsageError(
                str(self.directory), "the image must be signed", actual="no signature and cert.der"
            )
        return verify_signed_manifest(
            manifest,
            read_bounded(self.signature_file, max_bytes=_MAX_SIGNATURE_BYTES),
            read_bounded(self.certificate_file, max_bytes=_MAX_SIGNATURE_BYTES),
            unsafe_allow_sha256=unsafe_allow_sha256,
        )

    def write_manifest(self, manifest: JsonObject) -> bytes:
        """Write the form that is signed (Go's), after checking that it is a manifest.

        Returns the bytes. A signature of other bytes must be dropped by the caller first.
        """
        from supervisor.formats import canonical_json
        from supervisor.formats.manifest import parse_manifest

        raw = canonical_json.encode_go(manifest)
        parse_manifest(raw)
        self.directory.mkdir(parents=True, exist_ok=True)
        write_whole(self.manifest_file, raw)
        return raw

    def write_sources(self, sources: Mapping[str, LayerSource]) -> None:
        """Files are written relative to the bundle, so that both can be moved together."""
        base = self.directory.resolve()
        relative = {
            name: msgspec.structs.replace(source, file=os.path.relpath(source.file, base))
            if isinstance(source, FileBlob)
            else source
            for name, source in sources.items()
        }
        raw = msgspec.json.encode(_Sources(relative), order="sorted")
        write_whole(self.sources_file, msgspec.json.format(raw, indent=2) + b"\n")

    def write_signature(self, signature: bytes, certificate_der: bytes) -> None:
        write_whole(self.certificate_file, certificate_der)
        write_whole(self.signature_file, signature)

    def write_signed(self, signed: SignedManifest) -> None:
        """Write an image that was signed elsewhere, byte for byte."""
        self.directory.mkdir(parents=True, exist_ok=True)
        write_whole(self.manifest_file, signed.manifest_bytes)
        self.write_signature(signed.signature, signed.certificate_der)

    def drop_signature(self) -> bool:
        """Remove a signature that no longer fits; says whether there was one."""
        had_one = self.signature_file.exists() or self.certificate_file.exists()
        self.signature_file.unlink(missing_ok=True)
        self.certificate_file.unlink(missing_ok=True)
        return had_one
