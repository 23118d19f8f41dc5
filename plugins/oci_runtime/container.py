"""One running container: its end is awaited, it can be signalled, and it can be ended."""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress

import trio

from plugins.oci_runtime.output import Output
from supervisor import Conflict, ExitStatus, RuntimeFailed


class Container:
    """Implements `supervisor.seams.RunningContainer`.

    The first process is our child (the plugin is a subreaper), and `_reap` is the one
    place that reaps it. Until then its pid cannot be given to another process, so
    signals sent before cannot hit a stranger.
    """

    def __init__(
        self,
        oci_id: str,
        pid: int,
        *,
        output: Output,
        clean_up: Callable[[Container], Awaitable[None]],
    ) -> None:
        """Raises `RuntimeFailed` if `pid` is no child of ours; owns a pidfd from then on."""
        self.oci_id = oci_id
        self._pid = pid
        self.output = output
        self._clean_up = clean_up
        self._status: ExitStatus | None = None
        self._waiting = trio.Lock()
        self._ending = trio.Lock()
        self._destroyed = False
        self._lost: RuntimeFailed | None = None
        try:
            self._pidfd = os.pidfd_open(pid)
        except OSError as error:
            raise self._not_our_child(error) from error
        try:
            os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except OSError as error:
            os.close(self._pidfd)
            raise self._not_our_child(error) from error

    @property
    def pid(self) -> int:
        """Of the first process, in our pid namespace."""
        return self._pid

    def logs(self) -> bytes:
        """The last 64 KiB of what came through descriptors in `log_fds`; also after the end."""
        return self.output.tail()

    async def wait(self) -> ExitStatus:
        """Until the first process has ended; any number of callers, any number of times.

        Raises `RuntimeFailed` if the status was lost (somebody else reaped the process).
        """
        async with self._waiting:
            if self._status is None and self._lost is None:
                await trio.lowlevel.wait_readable(self._pidfd)
                self._reap()
        if self._status is None:
            raise self._lost or RuntimeFailed(f"container {self.oci_id}", "has no exit status")
        return self._status

    async def signal(self, signum: int, *, whole_group: bool) -> None:
        """Send a signal. Raises `Conflict` after the end, `RuntimeFailed` if the kernel refuses."""
        await trio.lowlevel.checkpoint()
        if self._status is not None or self._lost is not None:
            raise Conflict(f"container {self.oci_id}", "has ended already")
        try:
            if whole_group:
                os.killpg(self._pid, signum)
            else:
                signal.pidfd_send_signal(self._pidfd, signum)
        except ProcessLookupError as error:
            raise Conflict(f"container {self.oci_id}", "has ended already") from error
        except OSError as error:
            raise RuntimeFailed(
                f"container {self.oci_id}", f"signal {signum} was refused", actual=error
            ) from error

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
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            await self.wait()

    def close(self) -> None:
        """Give the pidfd back; after this the end can no longer be noticed."""
        if self._status is None and self._lost is None:
            self._lost = RuntimeFailed(f"container {self.oci_id}", "was given up before it ended")
        if self._pidfd >= 0:
            trio.lowlevel.notify_closing(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _reap(self) -> None:
        try:
            result = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
        except ChildProcessError as error:
            self._lost = RuntimeFailed(
                f"container {self.oci_id}", "its exit status must be ours", actual=error
            )
            return
        if result is None:
            raise RuntimeFailed(f"container {self.oci_id}", "a readable pidfd means an end")
        if result.si_code == os.CLD_EXITED:
            self._status = ExitStatus(exit_code=result.si_status)
        else:
            self._status = ExitStatus(signal=result.si_status)

    def _not_our_child(self, error: OSError) -> RuntimeFailed:
        return RuntimeFailed(
            f"container {self.oci_id}", "its first process must be our child", actual=error
        )
