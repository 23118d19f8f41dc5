"""What lies behind a seam raises refusals only: anything else becomes `RuntimeFailed` here."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import structlog
import trio

from supervisor.errors import DeadlineExceeded, PluginContractError, Refusal, RuntimeFailed

# What undoing something may take, so that no cancelled caller is held for ever.
CLEANUP_TIMEOUT_S = 30

T = TypeVar("T")
log = structlog.stdlib.get_logger("supervisor.seams")


@contextmanager
def seam(item: str, action: str) -> Iterator[None]:
    """Around one call of a plugin's object: its bugs are the plugin's, and are said so."""
    try:
        yield
    except Refusal:
        raise
    except Exception as error:
        log.warning("a plugin's object failed", item=item, action=action, error=repr(error))
        raise RuntimeFailed(item, f"{action} failed", actual=repr(error)) from error


def require_type(answer: object, wanted: type, *, item: str) -> None:
    """Raises `RuntimeFailed` for an object behind a seam that answers something else."""
    if not isinstance(answer, wanted):
        raise RuntimeFailed(
            item, "a seam's answer has one type", expected=wanted.__name__, actual=repr(answer)[:80]
        )


def require_seam(provided: object, seam_type: type[T]) -> T:
    """The object, if it has the seam's methods; else `PluginContractError`."""
    if not isinstance(provided, seam_type):
        raise PluginContractError(
            seam_type.__name__,
            "must have the seam's methods",
            expected=seam_type.__name__,
            actual=type(provided).__name__,
        )
    return provided


@contextmanager
def deadline(item: str, rule: str, timeout_s: float) -> Iterator[None]:
    """`trio.fail_after` with a refusal that names what was too slow."""
    try:
        with trio.move_on_after(timeout_s) as scope:
            yield
    except ExceptionGroup as error:
        # It was too slow, and failed besides while it was cancelled.
        if not scope.cancelled_caught:
            raise
        log.warning("failed past its deadline", item=item, rule=rule, error=repr(error))
    if scope.cancelled_caught:
        raise DeadlineExceeded(item, rule, expected=f"within {timeout_s:g} s")


async def undo(item: str, action: str, call: Callable[[], Awaitable[None]]) -> None:
    """Clean up behind a seam: shielded, for at most `CLEANUP_TIMEOUT_S`; never raises.

    Why it is cleaned up, a refusal or a cancellation, must reach the caller even if the
    clean-up fails.
    """
    try:
        with trio.CancelScope(shield=True) as scope:
            scope.deadline = trio.current_time() + CLEANUP_TIMEOUT_S
            await call()
    except Exception as error:
        log.error("clean-up failed", item=item, action=action, error=repr(error))
    if scope.cancelled_caught:
        log.error("clean-up took too long", item=item, action=action)
