"""What lies behind a seam raises refusals only: anything else becomes `RuntimeFailed` here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import structlog
import trio

from supervisor.errors import DeadlineExceeded, Refusal, RuntimeFailed

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


@contextmanager
def deadline(item: str, rule: str, timeout_s: float) -> Iterator[None]:
    """`trio.fail_after` with a refusal that names what was too slow."""
    with trio.move_on_after(timeout_s) as scope:
        yield
    if scope.cancelled_caught:
        raise DeadlineExceeded(item, rule, expected=f"within {timeout_s:g} s")
