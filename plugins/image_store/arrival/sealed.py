"""A layer's bytes that nothing can change any more.

The uncompressed tar goes into a file that only this process holds, and is hashed from the
same buffers as it is written. `seal` makes it unchangeable before anyone compares the
digest or reads it, so what is verified is what is parsed, whoever gets hold of the
descriptor later.
"""

from __future__ import annotations

import hashlib
import os

from plugins.image_store.arrival.storage import RAM, Storage
from plugins.image_store.budget import Reservation
from supervisor import RuntimeFailed, Untrusted
from supervisor.formats.digest import Digest

ALWAYS_HASHED = "sha384"


class SealedTar:
    """A sealed file of `size_bytes`, with the hex digests that were computed over it."""

    def __init__(
        self, fd: int, size_bytes: int, computed: dict[str, str], reservation: Reservation
    ) -> None:
        self.fd = fd
        self.size_bytes = size_bytes
        self.computed = computed
        self._reservation = reservation
        self._is_file_open = True

    def close_file(self) -> None:
        """The bytes stay, for a mount has them open, and on the account. Idempotent."""
        if self._is_file_open:
            self._is_file_open = False
            os.close(self.fd)

    def close(self) -> None:
        """Free the bytes and their share of the budget. Idempotent."""
        self.close_file()
        self._reservation.release()


class SealedWriter:
    """Takes one layer's bytes. Blocking; one thread stores at a time, and one hashes.

    `reservation` becomes the writer's: it grows with the bytes and is released by
    `close`, unless `seal` handed it on. `limit_rule` says whose limit `limit_bytes` is.
    """

    def __init__(
        self,
        expected: Digest,
        reservation: Reservation,
        *,
        limit_bytes: int,
        limit_rule: str,
        storage: Storage = RAM,
    ) -> None:
        self._item = str(expected)
        self._reservation = reservation
        self._limit_bytes = limit_bytes
        self._limit_rule = limit_rule
        self._storage = storage
        self._hashes = {
            algorithm: hashlib.new(algorithm)
            for algorithm in dict.fromkeys((ALWAYS_HASHED, expected.algorithm))
        }
        self._size_bytes = 0
        self._hashed_bytes = 0
        self._open = True
        try:
            self._fd = storage.new_file()
        except OSError as error:
            reservation.release()
            raise RuntimeFailed(self._item, "no file could be made", actual=error) from error

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def check_room(self, size_bytes: int) -> None:
        """Raises `Untrusted` unless a layer of `size_bytes` is within its limit."""
        if size_bytes > self._limit_bytes:
            raise Untrusted(
                self._item,
                self._limit_rule,
                expected=f"at most {self._limit_bytes} bytes",
                actual=f"{size_bytes} bytes or more",
            )

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append: `store` and `digest` in one."""
        with memoryview(data) as view:
            self.store(view)
            self.digest(view)

    def store(self, view: memoryview) -> None:
        """Append. Raises `Untrusted` beyond the limit, `Busy` beyond the budget.

        The same bytes must be given to `digest`, in the same order, before `seal`.
        """
        self._require_open()
        size_bytes = self._size_bytes + len(view)
        self.check_room(size_bytes)
        self._reservation.cover(size_bytes)
        try:
            written_bytes = 0
            while written_bytes < len(view):
                written_bytes += os.write(self._fd, view[written_bytes:])
        except OSError as error:
            # Part of it may be stored though it was not hashed: none of it is usable.
            self.close()
            raise RuntimeFailed(self._item, "could not be kept", actual=error) from error
        self._size_bytes = size_bytes

    def digest(self, view: memoryview) -> None:
        """Hash bytes that `store` takes."""
        for hasher in self._hashes.values():
            hasher.update(view)
        self._hashed_bytes += len(view)

    def seal(self) -> SealedTar:
        """No byte can change from here on; the descriptor is the caller's to close."""
        self._require_open()
        try:
            self._fd = self._storage.freeze(self._fd)
            stored_bytes = os.fstat(self._fd).st_size
        except OSError as error:
            raise RuntimeFailed(self._item, "could not be sealed", actual=error) from error
        if not stored_bytes == self._size_bytes == self._hashed_bytes:
            raise RuntimeFailed(
                self._item,
                "what is stored must be what was hashed",
                expected=f"{self._hashed_bytes} bytes",
                actual=f"{stored_bytes} bytes",
            )
        self._open = False
        computed = {algorithm: hasher.hexdigest() for algorithm, hasher in self._hashes.items()}
        return SealedTar(self._fd, self._size_bytes, computed, self._reservation)

    def close(self) -> None:
        """Free the bytes, unless they were sealed and handed on. Idempotent."""
        if self._open:
            self._open = False
            os.close(self._fd)
            self._reservation.release()

    def _require_open(self) -> None:
        if not self._open:
            raise RuntimeError("the bytes of this layer were sealed or freed already")
