"""What the plugin holds while the daemon lives, from the inside out: containers, the
nursery of their output, the gateway's mounts, the subreaper setting, the lock."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog
import trio

from plugins.oci_runtime import kernel
from plugins.oci_runtime.cgroups import ControlGroups
from plugins.oci_runtime.gateway import Gateway
from plugins.oci_runtime.launcher import DESTROY_TIMEOUT_S, Launcher
from plugins.oci_runtime.leftovers import end_leftovers
from plugins.oci_runtime.probe import find_runtime
from plugins.oci_runtime.runtime import OciCommand
from plugins.oci_runtime.seccomp import load_seccomp
from supervisor import Conflict, RuntimeFailed


class RuntimeService:
    """`run` is the plugin's lifespan; `launcher` is there once it has started."""

    def __init__(
        self,
        runtime_dir: Path,
        log: structlog.stdlib.BoundLogger,
        *,
        runtime: str,
        seccomp_profile: str,
        scratch_size_mib: int,
        shared_size_mib: int,
        parallel_starts: int,
        start_timeout_s: float,
    ) -> None:
        self.launcher: Launcher | None = None
        self._runtime_dir = runtime_dir
        self._log = log
        self._runtime = runtime
        self._seccomp_profile = seccomp_profile
        self._scratch_size_mib = scratch_size_mib
        self._shared_size_mib = shared_size_mib
        self._parallel_starts = parallel_starts
        self._start_timeout_s = start_timeout_s

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        """End leftovers, find a runtime, then hold everything until cancelled.

        Raises `ConfigError`, `Conflict` (another supervisor lives here) or `RuntimeFailed`.
        """
        seccomp = load_seccomp(self._seccomp_profile)
        with _lock(self._runtime_dir / "lock"), kernel.child_subreaper():
            gateway = Gateway(
                self._runtime_dir,
                scratch_size_mib=self._scratch_size_mib,
                shared_size_mib=self._shared_size_mib,
            )
            groups = ControlGroups(gateway.instance)
            state_dir, bundles_dir = self._runtime_dir / "state", self._runtime_dir / "bundles"
            found = await end_leftovers(
                state_dir=state_dir, bundles_dir=bundles_dir, groups=groups, gateway=gateway
            )
            if found.any:
                self._log.warning(
                    "ended what a killed predecessor left",
                    containers=found.containers,
                    processes=found.processes,
                )
            for folder in (state_dir, bundles_dir):
                folder.mkdir(mode=0o700)
            gateway.open()
            try:
                launcher = Launcher(
                    OciCommand(self._runtime, state_dir),
                    bundles_dir=bundles_dir,
                    gateway=gateway,
                    groups=groups,
                    seccomp=seccomp,
                    parallel_starts=self._parallel_starts,
                    start_timeout_s=self._start_timeout_s,
                    log=self._log,
                )
                command, version = await find_runtime(
                    self._runtime, launcher, gateway, self._runtime_dir
                )
                self._log.info(
                    "container runtime",
                    executable=command.executable,
                    version=version,
                    seccomp=seccomp.source,
                )
                async with trio.open_nursery() as nursery:
                    launcher.nursery = nursery
                    self.launcher = launcher
                    task_status.started()
                    try:
                        await trio.sleep_forever()
                    finally:
                        self.launcher = None
                        launcher.nursery = None
                        with trio.move_on_after(2 * DESTROY_TIMEOUT_S, shield=True):
                            await launcher.destroy_all()
            finally:
                with trio.move_on_after(DESTROY_TIMEOUT_S, shield=True):
                    await groups.end()
                gateway.close()


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One supervisor per runtime folder: a second would take the first for a dead one."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Conflict(str(path.parent), "is used by another supervisor") from error
        except OSError as error:
            raise RuntimeFailed(str(path), "must be lockable", actual=error) from error
        yield
    finally:
        os.close(fd)
