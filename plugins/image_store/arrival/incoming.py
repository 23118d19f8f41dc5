"""A blob on its way in: counted, hashed, and compared with what was said of it."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator

from plugins.image_store.arrival.progress import Progress
from plugins.image_store.registry.names import parse_blob_digest
from supervisor import DigestMismatch, Untrusted

# A thread is worth its hand-over from this many bytes on.
PIECE_BYTES = 1 << 20


class IncomingBlob:
    """The bytes of `chunks`, which are whatever a source sends.

    `item` names the blob in refusals; `size_bytes` and `blob_digest` (ALGORITHM:HEX, or
    None where the source knows none) are what it must turn out to have.
    """

    def __init__(
        self,
        chunks: AsyncIterator[bytes],
        *,
        item: str,
        size_bytes: int,
        blob_digest: str | None,
        progress: Progress,
    ) -> None:
        self.item = item
        self._chunks = chunks
        self._size_bytes = size_bytes
        self._progress = progress
        self._received_bytes = 0
        self._expected_hex = ""
        self._hasher = None
        if blob_digest is not None:
            algorithm, self._expected_hex = parse_blob_digest(blob_digest)
            self._hasher = hashlib.new(algorithm)

    async def piece(self) -> bytes:
        """The next bytes, `PIECE_BYTES` or more but at the end; none when it has ended.

        Raises `Untrusted` as soon as there is a byte too many.
        """
        parts: list[bytes] = []
        gathered_bytes = 0
        while gathered_bytes < PIECE_BYTES:
            chunk = await anext(self._chunks, None)
            if chunk is None:
                break
            parts.append(chunk)
            gathered_bytes += len(chunk)
            self._received_bytes += len(chunk)
            if self._received_bytes > self._size_bytes:
                raise self._wrong_size(f"more than {self._size_bytes} bytes")
            if self._progress.is_due():
                self._progress.tell(self._received_bytes)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def hash(self, piece: bytes) -> None:
        """For each piece, in order. Blocking."""
        if self._hasher is not None:
            self._hasher.update(piece)

    def compare(self) -> None:
        """At the end. Raises `Untrusted` for a byte too few, `DigestMismatch`."""
        if self._received_bytes != self._size_bytes:
            raise self._wrong_size(f"{self._received_bytes} bytes")
        if self._hasher is not None and self._hasher.hexdigest() != self._expected_hex:
            raise DigestMismatch(
                self.item,
                "the blob's bytes must have the digest that names them",
                expected=self._expected_hex,
                actual=self._hasher.hexdigest(),
            )

    def _wrong_size(self, actual: str) -> Untrusted:
        return Untrusted(
            self.item,
            "the blob must have the size that was given",
            expected=f"{self._size_bytes} bytes",
            actual=actual,
        )
