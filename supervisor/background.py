"""A task beside a block of code, without wrapping what the block raises."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def background(task: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Run `task` while the block runs; cancel it when the block ends.

    An exception of the block leaves as it is, not in a group, so that callers can tell
    refusals apart. `task` must handle its own exceptions; one that escapes cancels the
    block and leaves as an exception group.
    """
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(task)
        try:
            yield
        except Exception as error:
            failure = error
        finally:
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
