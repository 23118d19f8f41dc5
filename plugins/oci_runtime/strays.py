"""Processes that a runtime began in a container and gave over to nobody, since it failed.

The container may end while a runtime is on its way in: what was half inside dies with it, as
a child of ours whose pid nobody has told us. As long as it is not reaped, the kernel does not
let the container's first process end either. So we look for it: a child of ours, in the
container's pid namespace, that is none of those whom we wait for. What has been handed over a
moment ago looks just like that, so nobody looks while another command is being started.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import trio

from plugins.oci_runtime.processes import adopted_children

ENDED_S = 3
POLL_S = 0.01


class Strays:
    """Of one container. `owned` are the pids of its processes that somebody waits for."""

    def __init__(self, first_pid: int) -> None:
        self.owned = {first_pid}
        self._first_pid = first_pid
        self._starting = 0
        self._suspected = False
        # Held while one looks, and for the moment in which a start is counted.
        self._looking = trio.Lock()

    @asynccontextmanager
    async def start(self) -> AsyncIterator[None]:
        """Around a command's start, up to when its pid is among `owned`.

        If the block raises, strays are ended afterwards, in bounded time: by the last one that
        is under way.
        """
        async with self._looking:
            self._starting += 1
        try:
            yield
        except BaseException:
            self._suspected = True
            raise
        finally:
            self._starting -= 1
            if self._suspected:
                with trio.move_on_after(ENDED_S, shield=True):
                    await self._end_all()

    async def _end_all(self) -> None:
        async with self._looking:
            while not self._starting and self._suspected:
                self._suspected = await trio.to_thread.run_sync(
                    _end_once, self._first_pid, frozenset(self.owned)
                )
                await trio.sleep(POLL_S)


def _end_once(first_pid: int, owned: frozenset[int]) -> bool:
    """Kill and reap; whether any is still there. Blocks."""
    left = False
    # No first process, no namespace: then nobody is in it.
    with suppress(OSError):
        namespace = os.readlink(f"/proc/{first_pid}/ns/pid")
        for pid in adopted_children() - owned:
            with suppress(OSError):
                # True of the dead too, until they are reaped; none but us can reap them.
                if os.readlink(f"/proc/{pid}/ns/pid") == namespace:
                    os.kill(pid, signal.SIGKILL)
                    left = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG) is None or left
    return left
