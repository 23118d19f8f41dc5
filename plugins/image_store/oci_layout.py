"""Blobs of OCI layout directories (OCI image spec 1.1, image-layout.md and layer.md).

The directory belongs to the operator, who is not trusted: no link in it is followed,
nothing outside the configured roots is opened, and what is read is only believed
once its digest was compared.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath

from plugins.image_store.gunzip import gunzip
from plugins.image_store.kernel import open_beneath
from supervisor import Denied, DigestMismatch, FormatError, OciBlob, UnknownItem, Untrusted
from supervisor.formats.digest import DIGEST_SIZES_BYTES, check_hex

READ_BYTES = 256 * 1024
PLAIN_TAR = frozenset(
    {
        "application/vnd.oci.image.layer.v1.tar",
        "application/vnd.docker.image.rootfs.diff.tar",
    }
)
GZIP_TAR = frozenset(
    {
        "application/vnd.oci.image.layer.v1.tar+gzip",
        "application/vnd.docker.image.rootfs.diff.tar.gzip",
    }
)


class BlobReader:
    """An open blob of a layout. Blocking; whoever opened it calls `close`."""

    def __init__(self, fd: int, source: OciBlob, algorithm: str, hex_digest: str) -> None:
        self._fd = fd
        self._source = source
        self._algorithm = algorithm
        self._hex = hex_digest
        self.is_gzip = source.media_type in GZIP_TAR
        self.read_bytes = 0

    def pieces(self, between: Callable[[], None]) -> Iterator[bytes]:
        """The uncompressed tar, piece by piece; `between` is called before each read.

        The end is reached only if size and digest of the blob are what `source` says:
        raises `DigestMismatch` or `Untrusted` otherwise.
        """
        raw = self._raw(between)
        if self.is_gzip:
            yield from gunzip(raw, item=self._source.blob_digest)
            # Whatever follows the last member was refused, so `raw` is exhausted here.
        else:
            yield from raw

    def _raw(self, between: Callable[[], None]) -> Iterator[bytes]:
        hasher = hashlib.new(self._algorithm)
        while True:
            between()
            chunk = os.read(self._fd, READ_BYTES)
            if not chunk:
                break
            self.read_bytes += len(chunk)
            if self.read_bytes > self._source.size_bytes:
                raise _wrong_size(self._source, f"more than {self._source.size_bytes} bytes")
            hasher.update(chunk)
            yield chunk
        if self.read_bytes != self._source.size_bytes:
            raise _wrong_size(self._source, f"{self.read_bytes} bytes")
        if hasher.hexdigest() != self._hex:
            raise DigestMismatch(
                self._source.blob_digest,
                "the blob's bytes must have the digest that names them",
                expected=self._hex,
                actual=hasher.hexdigest(),
            )

    def close(self) -> None:
        os.close(self._fd)


def open_blob(roots: Sequence[str], source: OciBlob) -> BlobReader:
    """Find and open a blob. Blocking. Raises `Refusal` with what is wrong with `source`."""
    algorithm, hex_digest = _blob_digest(source.blob_digest)
    _check_media_type(source)
    root, inside = _placed(roots, source.directory)
    path = "/".join((*inside.parts, "blobs", algorithm, hex_digest))
    try:
        root_fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # Nonblocking: opening a pipe that somebody put there must not hang.
            fd = open_beneath(
                root_fd, os.fsencode(path), os.O_RDONLY | os.O_NONBLOCK, cross_mounts=True
            )
        finally:
            os.close(root_fd)
    except OSError as error:
        raise UnknownItem(
            source.blob_digest,
            "the blob must be a plain file of the OCI layout, reached through no link",
            expected=f"{source.directory}/blobs/{algorithm}/{hex_digest}",
            actual=error.strerror,
        ) from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise Untrusted(source.blob_digest, "the blob must be a plain file")
        if status.st_size != source.size_bytes:
            raise _wrong_size(source, f"{status.st_size} bytes")
    except BaseException:
        os.close(fd)
        raise
    return BlobReader(fd, source, algorithm, hex_digest)


def _wrong_size(source: OciBlob, actual: str) -> Untrusted:
    return Untrusted(
        source.blob_digest,
        "the blob must have the size that was given",
        expected=f"{source.size_bytes} bytes",
        actual=actual,
    )


def _blob_digest(text: str) -> tuple[str, str]:
    algorithm, colon, hex_digest = text.partition(":")
    if not colon or algorithm not in DIGEST_SIZES_BYTES:
        raise FormatError(
            "blob_digest",
            "a blob is named ALGORITHM:HEX",
            expected=" or ".join(sorted(DIGEST_SIZES_BYTES)),
            actual=text[:160],
        )
    check_hex(algorithm, hex_digest, item="blob_digest")
    return algorithm, hex_digest


def _check_media_type(source: OciBlob) -> None:
    media_type = source.media_type
    if media_type in PLAIN_TAR or media_type in GZIP_TAR:
        return
    rule = "this media type of a layer is not supported"
    if "encrypted" in media_type:
        rule = "encrypted layers are not supported; decrypt the image before it is converted"
    elif "nondistributable" in media_type or "foreign" in media_type:
        rule = "foreign (non-distributable) layers are not supported; their bytes lie elsewhere"
    elif "zstd" in media_type:
        rule = "zstd layers are not supported yet; convert the image to gzip or plain tar"
    raise Untrusted(
        source.blob_digest,
        rule,
        expected="a layer as tar or tar+gzip (OCI or Docker media type)",
        actual=media_type[:160],
    )


def _placed(roots: Sequence[str], directory: str) -> tuple[str, PurePosixPath]:
    """The configured root that `directory` lies in, and the path from there."""
    path = PurePosixPath(directory)
    if not path.is_absolute() or ".." in path.parts or "\0" in directory:
        raise FormatError(
            "directory", "must be an absolute path without '..'", actual=directory[:160]
        )
    for root in roots:
        if path.is_relative_to(root):
            return root, path.relative_to(root)
    raise Denied(
        "directory",
        "an OCI layout is read only from the directories that the configuration names (oci_roots)",
        expected=", ".join(roots) or "none configured: layers come by upload",
        actual=directory[:160],
    )
