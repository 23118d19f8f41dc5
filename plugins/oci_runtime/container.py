"""One run of a container: its end is awaited, it can be signalled, and it can be ended."""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress

import trio

from plugins.oci_runtime.invocation import Invocations
from plugins.oci_runtime.output import Output
from plugins.oci_runtime.spawn import Child
from supervisor import Conflict, ExitStatus, Invocation, InvocationResult, RuntimeFailed

ENDING_S = 1


class Container:
    """Implements `supervisor.RunningContainer`.

    The first process is our child (the plugin is a subreaper), and `wait` is the one
    place that reaps it. Until then its pid cannot be given to another process, so
    signals sent before cannot hit a stranger.
    """

    def __init__(
        self,
        oci_id: str,
        first_process: Child,
        *,
        output: Output,
        invocations: Invocations,
        out_of_memory: Callable[[], bool],
        clean_up: Callable[[Container], Awaitable[None]],
    ) -> None:
        """Owns `first_process`. `out_of_memory` blocks; it is asked once, after the end."""
        self.oci_id = oci_id
        self.output = output
        self.invocations = invocations
        self._first = first_process
        self._out_of_memory = out_of_memory
        self._clean_up = clean_up
        self._status: ExitStatus | None = None
        self._waiting = trio.Lock()
        self._ending = trio.Lock()
        self._destroyed = False
        self._lost: RuntimeFailed | None = None

    @property
    def pid(self) -> int:
        """Of the first process, in our pid namespace."""
        return self._first.pid

    async def wait(self) -> ExitStatus:
        """Until the first process has ended; any number of callers, any number of times.

        Raises `RuntimeFailed` if the status was lost (somebody else reaped the process).
        """
        async with self._waiting:
            if self._status is None and self._lost is None:
                await self._learn_status()
        if self._status is None:
            raise self._lost or RuntimeFailed(f"container {self.oci_id}", "has no exit status")
        return self._status

    async def signal(self, signum: int, *, whole_group: bool) -> None:
        """Send a signal. Raises `Conflict` after the end, `RuntimeFailed` if the kernel refuses."""
        await trio.lowlevel.checkpoint()
        self._require_running()
        try:
            if whole_group:
                os.killpg(self.pid, signum)
            else:
                self._first.send_signal(signum)
        except ProcessLookupError as error:
            raise self._ended() from error
        except OSError as error:
            raise RuntimeFailed(
                f"container {self.oci_id}", f"signal {signum} was refused", actual=error
            ) from error

    async def invoke(self, invocation: Invocation) -> InvocationResult:
        """Run an additional entry point inside; see `Invocations.run`."""
        self._require_running()
        try:
            return await self.invocations.run(invocation)
        except RuntimeFailed as error:
            # A runtime can do nothing in a container that is about to end.
            with trio.move_on_after(ENDING_S):
                await self.wait()
                raise self._ended() from error
            raise

    async def destroy(self) -> None:
        """Kill what is left and remove all traces. Idempotent, bounded, never raises."""
        # The lock is never held longer than the clean-up's own deadline.
        with trio.CancelScope(shield=True):
            async with self._ending:
                if not self._destroyed:
                    await self._clean_up(self)
                    self._destroyed = True

    async def kill(self) -> None:
        """SIGKILL the first process, with which the kernel ends its pid namespace; wait for it."""
        if self._status is None and self._lost is None:
            with suppress(ProcessLookupError):
                self._first.send_signal(signal.SIGKILL)
            await self.wait()

    def close(self) -> None:
        """Give the pidfd back; after this the end can no longer be noticed. Idempotent."""
        if self._status is None and self._lost is None:
            self._lost = RuntimeFailed(f"container {self.oci_id}", "was given up before it ended")
        self._first.close()

    async def _learn_status(self) -> None:
        try:
            code = await self._first.wait()
        except ChildProcessError as error:
            self._lost = RuntimeFailed(
                f"container {self.oci_id}", "its exit status must be ours", actual=error
            )
            return
        except trio.ClosedResourceError:
            # `close` was called meanwhile, and has said why.
            return
        out_of_memory = await trio.to_thread.run_sync(self._out_of_memory)
        self._status = ExitStatus(
            exit_code=code if code >= 0 else None,
            signal=-code if code < 0 else None,
            out_of_memory=out_of_memory,
        )

    def _require_running(self) -> None:
        if self._first.ended or self._lost is not None:
            raise self._ended()

    def _ended(self) -> Conflict:
        return Conflict(f"container {self.oci_id}", "has ended already")
