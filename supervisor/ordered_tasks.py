"""Tasks that end in order: each lives beside the code that needs it, and has a deadline."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import structlog
import trio

from supervisor.containers import Containers
from supervisor.errors import RuntimeFailed
from supervisor.plugin_host import PluginHost

# What is still buffered for observers when the supervisor stops.
DRAIN_TIMEOUT_S = 5

log = structlog.stdlib.get_logger("supervisor.service")


@asynccontextmanager
async def ordered_task(
    name: str,
    function: Callable[..., Awaitable[object]],
    start_timeout_s: float,
    stop_timeout_s: float,
) -> AsyncIterator[None]:
    """A task beside the body; at exit it is cancelled and given time to clean up.

    `name` is the plugin's whose task it is, or says what the supervisor's own does.
    """
    scope = trio.CancelScope()
    ended = trio.Event()

    async def run(task_status: trio.TaskStatus[None]) -> None:
        try:
            with scope:
                await function(task_status)
            if not scope.cancel_called:
                raise RuntimeFailed(name, "its task ended by itself")
        finally:
            ended.set()

    async with trio.open_nursery() as nursery:
        try:
            with trio.fail_after(start_timeout_s):
                await nursery.start(run)
        except trio.TooSlowError as error:
            raise RuntimeFailed(
                name, "must be ready in time", expected=f"{start_timeout_s:g} s"
            ) from error
        # From here on it ends when its turn comes, not with the whole daemon's cancellation.
        scope.shield = True
        try:
            yield
        finally:
            scope.cancel()
            with trio.CancelScope(shield=True) as waiting:
                waiting.deadline = trio.current_time() + stop_timeout_s
                await ended.wait()
            if waiting.cancelled_caught:
                log.error("a task did not stop in time", task=name)


@asynccontextmanager
async def observers(host: PluginHost) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope(shield=True)

        async def run() -> None:
            with scope:
                await host.observe_forever()

        nursery.start_soon(run)
        try:
            yield
        finally:
            host.close_observers()
            scope.deadline = trio.current_time() + DRAIN_TIMEOUT_S


@asynccontextmanager
async def container_tasks(containers: Containers) -> AsyncIterator[None]:
    scope = trio.CancelScope()

    async def run(task_status: trio.TaskStatus[None]) -> None:
        with scope:
            await containers.run(task_status)

    async with trio.open_nursery() as nursery:
        await nursery.start(run)
        # Not before: a shielded task cannot be taken back while it starts.
        scope.shield = True
        try:
            yield
        finally:
            try:
                with trio.CancelScope(shield=True):
                    await containers.stop_all()
            finally:  # else its shield would keep them, and us, for ever
                scope.cancel()
