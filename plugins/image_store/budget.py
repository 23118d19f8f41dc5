"""An account of the bytes that layers may take, kept before they are taken."""

from __future__ import annotations

import threading

from supervisor import Busy


class Budget:
    """Hands out reservations that together never exceed `total_bytes`. Thread-safe."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self._used_bytes = 0
        # Worker threads grow their reservations while the trio thread makes new ones.
        self._lock = threading.Lock()

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    def reserve(self, size_bytes: int, *, item: str) -> Reservation:
        """Take `size_bytes` for `item`. Raises `Busy` when they are not free."""
        self._take(size_bytes, item)
        return Reservation(self, size_bytes, item)

    def _take(self, size_bytes: int, item: str) -> None:
        with self._lock:
            free_bytes = self.total_bytes - self._used_bytes
            if size_bytes > free_bytes:
                raise Busy(
                    item,
                    "does not fit into the image store's memory (budget_bytes)",
                    expected=f"at most {free_bytes} bytes free of {self.total_bytes}",
                    actual=f"{size_bytes} bytes more",
                )
            self._used_bytes += size_bytes

    def _give_back(self, size_bytes: int) -> None:
        with self._lock:
            self._used_bytes -= size_bytes


class Reservation:
    """Bytes of a `Budget`. Whoever holds it calls `release`, once or more often."""

    def __init__(self, budget: Budget, size_bytes: int, item: str) -> None:
        self._budget = budget
        self._size_bytes = size_bytes
        self._item = item
        self._released = False

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def cover(self, total_bytes: int) -> None:
        """Grow until it covers `total_bytes`. Raises `Busy` and stays as it was."""
        if self._released:
            raise RuntimeError("a released reservation cannot grow")
        missing_bytes = total_bytes - self._size_bytes
        if missing_bytes > 0:
            self._budget._take(missing_bytes, self._item)
            self._size_bytes = total_bytes

    def release(self) -> None:
        """Give the bytes back. Idempotent."""
        if not self._released:
            self._released = True
            self._budget._give_back(self._size_bytes)
            self._size_bytes = 0
