"""What the plugin holds while the daemon lives, from the inside out: containers, the
nursery of their output, control groups, the gateway's mounts, settings of the machine, the
lock."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import trio

from plugins.oci_runtime import kernel
from plugins.oci_runtime.cgroups import ControlGroups
from plugins.oci_runtime.common_quotas import common_quotas_lifted
from plugins.oci_runtime.config_json import Common
from plugins.oci_runtime.exchange import exchange_pace
from plugins.oci_runtime.gateway import Gateway
from plugins.oci_runtime.launcher import Launcher
from plugins.oci_runtime.leftovers import end_leftovers
from plugins.oci_runtime.limits import limits_for, machine_memory_bytes, missing_notes, resources
from plugins.oci_runtime.network import machine_ports_from
from plugins.oci_runtime.oom import spared_by_the_oom_killer
from plugins.oci_runtime.orphans import reap_orphans, reap_orphans_for_ever
from plugins.oci_runtime.output import output_pace
from plugins.oci_runtime.prepared import DESTROY_TIMEOUT_S, Workshop
from plugins.oci_runtime.probe import find_runtime
from plugins.oci_runtime.runtime import OciCommand
from plugins.oci_runtime.seccomp import Seccomp, load_seccomp
from plugins.oci_runtime.settings import OWN, Settings
from plugins.oci_runtime.spawn import keep_descriptors_here
from supervisor import Conflict, PluginContext, RuntimeFailed


class RuntimeService:
    """`run` is the plugin's lifespan; `launcher` is there once it has started."""

    def __init__(self, context: PluginContext, settings: Settings) -> None:
        self.launcher: Launcher | None = None
        self._context = context
        self._settings = settings
        self._runtime_dir = context.runtime_dir
        self._state_dir = context.runtime_dir / "state"
        self._bundles_dir = context.runtime_dir / "bundles"

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        """End leftovers, find a runtime, then hold everything until cancelled.

        Raises `ConfigError`, `Conflict` (another supervisor lives here) or `RuntimeFailed`.
        """
        settings = self._settings
        seccomp = load_seccomp(settings.seccomp_profile)
        own_network = settings.network == OWN
        machine_ports = None if own_network else settings.unprivileged_port_start
        keep_descriptors_here()
        with (
            _lock(self._runtime_dir / "lock"),
            kernel.child_subreaper(),
            machine_ports_from(machine_ports),
            common_quotas_lifted(),
            spared_by_the_oom_killer() as oom_score_adj,
        ):
            gateway = Gateway(self._runtime_dir, shared_size_mib=settings.shared_size_mib)
            groups = ControlGroups(gateway.instance)
            await groups.find()
            notes = await self._end_predecessor(groups, gateway)
            for folder in (self._state_dir, self._bundles_dir):
                folder.mkdir(mode=0o700)
            gateway.open()
            try:
                await groups.open()
                notes += missing_notes(groups.controllers)
                workshop = Workshop(
                    OciCommand(settings.runtime, self._state_dir),
                    gateway=gateway,
                    groups=groups,
                    output_pace=output_pace(),
                    exchange_pace=exchange_pace(),
                    parallel_starts=settings.parallel_starts,
                    start_timeout_s=settings.start_timeout_s,
                    max_invocations=settings.max_invocations,
                    log=self._context.log,
                )
                launcher = Launcher(
                    workshop,
                    self._common(groups, seccomp, oom_score_adj),
                    bundles_dir=self._bundles_dir,
                    scratch_size_mib=settings.scratch_size_mib,
                    notes=notes,
                )
                command, version = await find_runtime(
                    settings.runtime, launcher, gateway, self._runtime_dir
                )
                self._context.log.info(
                    "container runtime",
                    executable=command.executable,
                    version=version,
                    seccomp=seccomp.source,
                )
                await self._hold(launcher, workshop, task_status)
            finally:
                with trio.move_on_after(DESTROY_TIMEOUT_S, shield=True):
                    await groups.end()
                    await trio.to_thread.run_sync(reap_orphans)
                gateway.close()

    async def _end_predecessor(self, groups: ControlGroups, gateway: Gateway) -> tuple[str, ...]:
        """Sentences for the status. Raises `RuntimeFailed`."""
        found = await end_leftovers(
            state_dir=self._state_dir, bundles_dir=self._bundles_dir, groups=groups, gateway=gateway
        )
        if found.any:
            self._context.report(found.event())
            self._context.log.warning(
                "ended what a killed predecessor left",
                containers=found.containers,
                processes=found.processes,
            )
        return found.notes

    def _common(self, groups: ControlGroups, seccomp: Seccomp, oom_score_adj: int) -> Common:
        settings = self._settings
        own_network = settings.network == OWN
        limits = limits_for(
            memory_limit_mib=settings.memory_limit_mib,
            cpu_limit_percent=settings.cpu_limit_percent,
            pids_limit=settings.pids_limit,
            machine_memory_bytes=machine_memory_bytes(),
        )
        return Common(
            seccomp=msgspec.Raw(msgspec.json.encode(seccomp.document)),
            resources=resources(limits, groups.controllers),
            own_network=own_network,
            unprivileged_port_start=settings.unprivileged_port_start if own_network else None,
            oom_score_adj=oom_score_adj,
        )

    async def _hold(
        self, launcher: Launcher, workshop: Workshop, task_status: trio.TaskStatus[None]
    ) -> None:
        """Until cancelled; then everything that still runs is ended."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reap_orphans_for_ever)
            workshop.nursery = nursery
            self.launcher = launcher
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self.launcher = None
                workshop.nursery = None
                with trio.move_on_after(2 * DESTROY_TIMEOUT_S, shield=True):
                    await launcher.close_all()


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
