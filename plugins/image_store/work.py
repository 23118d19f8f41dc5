"""Blocking work in threads: how it is cancelled, and how cleaning up is bounded."""

from __future__ import annotations

from collections.abc import Callable

import structlog
import trio

# One piece of cleaning up; the kernel may need a while to take gigabytes back.
CLEANUP_TIMEOUT_S = 20


def check_cancelled() -> None:
    """In a worker thread: raises `trio.Cancelled` once the task that waits for it is cancelled."""
    trio.from_thread.check_cancelled()


async def clean_up(
    item: str, work: Callable[[], None], *, log: structlog.stdlib.BoundLogger
) -> bool:
    """Run `work` in a thread, shielded, for `CLEANUP_TIMEOUT_S` at most; never raises.

    Whether it was done. A failure is logged; a thread that hangs is abandoned.
    """
    with trio.move_on_after(CLEANUP_TIMEOUT_S, shield=True):
        try:
            await trio.to_thread.run_sync(work, abandon_on_cancel=True)
        except Exception as error:  # a clean-up that raises would stop those after it
            log.error("cleanup_failed", item=item, reason=repr(error))
            return False
        return True
    log.error("cleanup_failed", item=item, reason=f"not done in {CLEANUP_TIMEOUT_S} s")
    return False
