"""A layer's uncompressed tar, piece by piece, whatever it lies compressed with."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from acon.bundle import LayerSource, OciSource
from supervisor.formats.digest import Digest
from supervisor.formats.errors import DigestMismatch, FormatError

CHUNK_BYTES = 1024 * 1024
# zlib: "+16" reads a gzip header and trailer (zlib manual, inflateInit2).
_GZIP_WBITS = zlib.MAX_WBITS | 16


class LayerDigests(msgspec.Struct, frozen=True, kw_only=True):
    """Of one layer: `blob_*` as it lies there, the others of the uncompressed tar. Hex."""

    blob_sha256: str
    blob_size_bytes: int
    sha256: str
    sha384: str
    sha512: str
    size_bytes: int

    def digest(self, algorithm: str) -> Digest:
        return Digest(algorithm, {"sha384": self.sha384, "sha512": self.sha512}[algorithm])


class LayerReader:
    """Iterates over the uncompressed bytes in pieces of at most `CHUNK_BYTES`.

    Memory is bounded whatever the compression ratio. Raises `FormatError` for a damaged
    or unknown compression. `digests()` may be asked once the iteration has ended.
    """

    def __init__(
        self,
        path: Path,
        *,
        media_type: str = "application/vnd.oci.image.layer.v1.tar",
        advance: Callable[[int], None] = lambda _count: None,
    ) -> None:
        self._path = path
        self._compression = _compression(media_type, item=str(path))
        self._advance = advance
        self._blob = hashlib.sha256()
        self._blob_bytes = 0
        self._hashes = {name: hashlib.new(name) for name in ("sha256", "sha384", "sha512")}
        self._bytes = 0
        self._ended = False

    def __iter__(self) -> Iterator[bytes]:
        pieces = self._raw() if self._compression is None else self._gunzip()
        for piece in pieces:
            for one in self._hashes.values():
                one.update(piece)
            self._bytes += len(piece)
            yield piece
        self._ended = True

    def digests(self) -> LayerDigests:
        if not self._ended:
            raise RuntimeError("digests() before the layer was read to its end")
        return LayerDigests(
            blob_sha256=self._blob.hexdigest(),
            blob_size_bytes=self._blob_bytes,
            size_bytes=self._bytes,
            **{name: one.hexdigest() for name, one in self._hashes.items()},
        )

    def _raw(self) -> Iterator[bytes]:
        with self._path.open("rb") as file:
            while piece := file.read(CHUNK_BYTES):
                self._blob.update(piece)
                self._blob_bytes += len(piece)
                self._advance(len(piece))
                yield piece

    def _gunzip(self) -> Iterator[bytes]:
        inflate = zlib.decompressobj(_GZIP_WBITS)
        # Several gzip members one after the other are one stream (RFC 1952, 2.2).
        between_members = True
        try:
            for compressed in self._raw():
                waiting = compressed
                while waiting:
                    between_members = False
                    piece = inflate.decompress(waiting, CHUNK_BYTES)
                    if piece:
                        yield piece
                    if inflate.eof:
                        waiting = inflate.unused_data
                        inflate = zlib.decompressobj(_GZIP_WBITS)
                        between_members = True
                    else:
                        waiting = inflate.unconsumed_tail
        except zlib.error as error:
            raise FormatError(str(self._path), "must be gzip", actual=error) from None
        if not between_members:
            raise FormatError(str(self._path), "must be whole gzip", actual="it ends too early")


def hash_layer(reader: LayerReader) -> LayerDigests:
    """Read a layer to its end for its digests alone."""
    for _piece in reader:
        pass
    return reader.digests()


def open_source(
    source: LayerSource, path: Path, *, advance: Callable[[int], None] = lambda _count: None
) -> LayerReader:
    """A reader of the layer that `source` tells of, which lies at `path`."""
    if isinstance(source, OciSource):
        return LayerReader(path, media_type=source.media_type, advance=advance)
    return LayerReader(path, advance=advance)


def require_digest(actual: LayerDigests, expected: Digest, *, item: str) -> None:
    """Refuse a layer whose uncompressed bytes have another digest than `expected`."""
    found = {"sha256": actual.sha256, "sha384": actual.sha384, "sha512": actual.sha512}
    if found[expected.algorithm] != expected.hex:
        raise DigestMismatch(
            item,
            "a layer's uncompressed tar must have the digest in the manifest",
            expected=expected,
            actual=f"{expected.algorithm}/{found[expected.algorithm]}",
        )


def _compression(media_type: str, *, item: str) -> str | None:
    base, plus, suffix = media_type.partition("+")
    if not plus and base.endswith((".tar.gzip", ".tar.gz")):
        return "gzip"
    if not plus and base.endswith((".tar", "/x-tar")):
        return None
    if plus and base.endswith(".tar") and suffix == "gzip":
        return "gzip"
    raise FormatError(
        item,
        "a layer must be a tar, plain or gzip "
        "(`skopeo copy --dest-compress-format gzip` makes it so)",
        expected="application/vnd.oci.image.layer.v1.tar[+gzip]",
        actual=media_type,
    )
