"""A layer's uncompressed tar, piece by piece, whatever it lies compressed with.

What runs here is the owner's or the operator's own machine: decompression happens in this
process, with the same loops that the daemon runs in a worker without privilege.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Generator, Iterator, Sequence

import msgspec

from acon.errors import UsageError
from plugins.image_store.arrival.media_types import compression_of
from plugins.image_store.inflate.streams import StreamDamaged, gunzip, unzstd
from supervisor.formats.digest import DIGEST_SIZES_BYTES, Digest
from supervisor.formats.errors import DigestMismatch, FormatError
from supervisor.seams import FileBlob

CHUNK_BYTES = 256 << 10

Advance = Callable[[int], None]


class LayerDigests(msgspec.Struct, frozen=True, kw_only=True):
    """Of one uncompressed tar; `hex_digests` by algorithm."""

    size_bytes: int
    hex_digests: dict[str, str]

    def digest(self, algorithm: str) -> Digest:
        return Digest(algorithm, self.hex_digests[algorithm])


def _no_report(_count_bytes: int) -> None:
    pass


def _no_check() -> None:
    pass


def layer_pieces(
    source: FileBlob, *, advance: Advance = _no_report, between: Callable[[], None] = _no_check
) -> Generator[bytes, None, None]:
    """The uncompressed bytes of the blob that lies where `source` says. Blocking.

    The file is opened at the first step and closed with the generator; memory is bounded
    whatever the compression. `advance` is told how many bytes of the blob each read gave,
    `between` is called before each and may raise. The end is reached only if the blob has
    the sizes and the digest that `source` says: raises `DigestMismatch` or `FormatError`
    otherwise, for damaged or unknown compression too, `UsageError` for what is no file and
    `OSError`.
    """
    compression = compression_of(source.media_type, item=source.file)
    raw = _raw(source, advance, between)
    try:
        if compression is None:
            pieces: Iterator[bytes] = raw
        else:
            pieces = (gunzip if compression == "gzip" else unzstd)(raw)
        size_bytes = 0
        for piece in pieces:
            size_bytes += len(piece)
            if source.tar_size_bytes is not None and size_bytes > source.tar_size_bytes:
                raise _wrong_tar_size(source, "more")
            yield piece
        if source.tar_size_bytes not in (None, size_bytes):
            raise _wrong_tar_size(source, size_bytes)
        # Whoever decompresses may stop at its format's end; the blob's own end is checked by
        # reading on.
        if next(raw, None) is not None:
            raise FormatError(source.file, "nothing may follow the compressed layer")
    except StreamDamaged as error:
        raise FormatError(source.file, error.rule, actual=error.detail) from None
    finally:
        raw.close()


def hash_layer(
    source: FileBlob,
    *,
    algorithms: Sequence[str] = ("sha384",),
    advance: Advance = _no_report,
    between: Callable[[], None] = _no_check,
) -> LayerDigests:
    """Read a layer to its end for the digests of its tar. Blocking; raises as `layer_pieces`."""
    hashes = {name: hashlib.new(name) for name in algorithms}
    size_bytes = 0
    for piece in layer_pieces(source, advance=advance, between=between):
        for one in hashes.values():
            one.update(piece)
        size_bytes += len(piece)
    return LayerDigests(
        size_bytes=size_bytes,
        hex_digests={name: one.hexdigest() for name, one in hashes.items()},
    )


def require_digest(actual: LayerDigests, expected: Digest, *, item: str) -> None:
    """Refuse a layer whose uncompressed bytes have another digest than `expected`."""
    found = actual.digest(expected.algorithm)
    if found != expected:
        raise DigestMismatch(
            item,
            "a layer's uncompressed tar must have the digest in the manifest",
            expected=expected,
            actual=found,
        )


def _raw(
    source: FileBlob, advance: Advance, between: Callable[[], None]
) -> Generator[bytes, None, None]:
    fd = _open(source.file)
    try:
        end = source.offset_bytes + source.size_bytes
        if os.fstat(fd).st_size < end:
            raise FormatError(
                source.file,
                "the file must hold the whole blob",
                expected=f"{end} bytes at least",
                actual=f"{os.fstat(fd).st_size} bytes",
            )
        algorithm, _, expected = (source.blob_digest or "").partition(":")
        hasher = None if source.blob_digest is None else _hasher(algorithm, source.file)
        at = source.offset_bytes
        while at < end:
            between()
            chunk = os.pread(fd, min(CHUNK_BYTES, end - at), at)
            if not chunk:
                raise FormatError(source.file, "a blob does not shrink while it is read")
            at += len(chunk)
            if hasher is not None:
                hasher.update(chunk)
            advance(len(chunk))
            yield chunk
        if hasher is not None and hasher.hexdigest() != expected:
            raise DigestMismatch(
                source.file,
                "a blob must have the digest that names it",
                expected=source.blob_digest,
                actual=f"{algorithm}:{hasher.hexdigest()}",
            )
    finally:
        os.close(fd)


def _hasher(algorithm: str, item: str) -> hashlib._Hash:
    if algorithm not in DIGEST_SIZES_BYTES:
        raise FormatError(
            item,
            "a blob is named ALGORITHM:HEX",
            expected=" or ".join(sorted(DIGEST_SIZES_BYTES)),
            actual=algorithm[:160],
        )
    return hashlib.new(algorithm)


def _open(file: str) -> int:
    """A plain file's descriptor: a pipe that somebody put there must not make anyone wait."""
    fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise UsageError(file, "must be a plain file")


def _wrong_tar_size(source: FileBlob, actual: object) -> FormatError:
    return FormatError(
        source.file,
        "the uncompressed layer must have the size that its source names",
        expected=source.tar_size_bytes,
        actual=actual,
    )
