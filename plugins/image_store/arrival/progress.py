"""Tells observers how far a layer has come, a few times a second."""

from __future__ import annotations

import time
from collections.abc import Callable

from supervisor import Event, LayerProgress

INTERVAL_S = 0.1


class Progress:
    """Paces the events of one transfer. May be asked from any thread, one at a time."""

    def __init__(
        self,
        digest: str,
        total_bytes: int | None,
        report: Callable[[Event], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._digest = digest
        self._total_bytes = total_bytes
        self._report = report
        self._clock = clock
        self._next_s = clock() + INTERVAL_S

    def is_due(self) -> bool:
        """True at most once in `INTERVAL_S`."""
        now_s = self._clock()
        if now_s < self._next_s:
            return False
        self._next_s = now_s + INTERVAL_S
        return True

    def tell(self, received_bytes: int) -> None:
        """Report now. In the trio thread."""
        self._report(
            LayerProgress(
                digest=self._digest,
                received_bytes=received_bytes,
                total_bytes=self._total_bytes,
            )
        )
