"""A layer in a file of this machine, to be checked here and sent from here."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator

import msgspec
import trio

from acon.images.documents import TAR_MEDIA_TYPE
from acon.layer_bytes import hash_layer, layer_pieces, require_digest
from acon.output import Bar
from supervisor.formats.digest import Digest
from supervisor.seams import FileBlob


class LocalLayer(msgspec.Struct, frozen=True):
    """A layer whose bytes were right when they were looked at."""

    digest: Digest
    source: FileBlob
    size_bytes: int  # of the uncompressed tar

    def chunks(self, offset: int) -> Generator[bytes, None, None]:
        """The uncompressed bytes from `offset` on (`acon.tar_source.TarSource`).

        A compressed layer is decompressed again from its beginning: only a broken
        connection asks for an offset.
        """
        skip = offset
        for piece in layer_pieces(self.source):
            if skip >= len(piece):
                skip -= len(piece)
                continue
            yield piece[skip:]
            skip = 0


async def check_layer(source: FileBlob, digest: Digest, bar: Bar) -> LocalLayer:
    """Read the layer once and compare its digest. Raises as `hash_layer`, `DigestMismatch`."""

    def read() -> LocalLayer:
        digests = hash_layer(
            source,
            algorithms=(digest.algorithm,),
            advance=bar.advance,
            between=trio.from_thread.check_cancelled,
        )
        require_digest(digests, digest, item=source.file)
        return LocalLayer(digest, source, digests.size_bytes)

    return await trio.to_thread.run_sync(read)


async def check_blob(source: FileBlob, digest: Digest, bar: Bar) -> None:
    """Find damage before anything is asked of the daemon, as cheaply as the source allows.

    Compares the digest of the blob as it lies there where the source names one (that it is
    the right blob was found when the source was written, and is found again by the daemon),
    else that of the tar. Raises as `check_layer`.
    """
    if source.blob_digest is None:
        await check_layer(source, digest, bar)
        return

    def read() -> None:
        for _piece in layer_pieces(
            _as_it_lies(source), advance=bar.advance, between=trio.from_thread.check_cancelled
        ):
            pass

    await trio.to_thread.run_sync(read)


def blob_sha256(source: FileBlob, *, between: Callable[[], None]) -> str:
    """`sha256:HEX` of the blob as it lies there. Blocking; raises as `layer_pieces`."""
    hasher = hashlib.sha256()
    for piece in layer_pieces(_as_it_lies(source), between=between):
        hasher.update(piece)
    return f"sha256:{hasher.hexdigest()}"


def _as_it_lies(source: FileBlob) -> FileBlob:
    """To be read as if it were a tar: nothing is decompressed."""
    return msgspec.structs.replace(source, media_type=TAR_MEDIA_TYPE, tar_size_bytes=None)
