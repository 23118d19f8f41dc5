"""Finds out how containers can be run here. Run in a mount namespace of its own, by `acon doctor`.

unshare --mount python -m acon.runtime_trial EMPTY_FOLDER

Prints the findings as JSON. Each runtime is tried by the plugin that will use it, as the
daemon starts it: with control groups, limits, user namespace and seccomp profile.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import structlog
import trio

from acon.finding import Finding
from plugins.image_store.mount.kernel import MS_NODEV, MS_NOSUID, attach, cloned_at, mount
from plugins.oci_runtime import OciRuntime
from plugins.oci_runtime.cgroups import ControlGroups
from plugins.oci_runtime.hierarchies import TOP, is_unified, visible_hierarchies
from plugins.oci_runtime.limits import missing_notes
from plugins.oci_runtime.probe import CANDIDATES
from plugins.oci_runtime.runtime import OciCommand
from plugins.oci_runtime.spawn import SEARCH_PATH
from supervisor import PluginContext, Refusal

TRIAL_TIMEOUT_S = 30
PR_SET_SECCOMP = 22
SECCOMP_MODE_FILTER = 2


def kernel_findings(folder: Path) -> list[Finding]:
    """What the kernel must offer. `folder` is in a mount namespace that ends with us."""
    return [_seccomp(), _detached_mounts(folder), _pidfd()]


async def runtime_findings(folder: Path) -> list[Finding]:
    """One finding for each runtime, and one that says whether any works."""
    works: str | None = None
    findings = []
    for name in CANDIDATES:
        program = shutil.which(name, path=SEARCH_PATH)
        if program is None:
            findings.append(Finding(name, "absent", "not installed", f"apt install {name}"))
            continue
        reason = await why_not(program, folder / name)
        if reason is None:
            version = await OciCommand(program, folder / name).version()
            works = works or f"{program} will be used"
            findings.append(Finding(name, "ok", f"{version} ran a container"))
        else:
            findings.append(Finding(name, "absent", reason, "only one runtime has to work"))
    remedy = "apt install runc (or crun); the reasons above say what kept them from running"
    overall = Finding(
        "container runtime", "ok" if works else "missing", works or "none works", remedy
    )
    return [*findings, overall]


async def why_not(program: str, folder: Path) -> str | None:
    """None if this runtime has run a container; else the reason. Leaves nothing running."""
    await trio.Path(folder).mkdir(mode=0o711)
    context = PluginContext(
        name="oci_runtime",
        runtime_dir=folder,
        log=structlog.stdlib.get_logger("trial"),
        report=lambda event: None,
    )
    plugin = OciRuntime(OciRuntime.Config(runtime=program), context)
    try:
        with trio.fail_after(TRIAL_TIMEOUT_S):
            async with trio.open_nursery() as nursery:
                await nursery.start(plugin.lifespan)
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        refusals, others = group.split(Refusal)
        if others is not None or refusals is None:
            raise
        return "; ".join(_reason(error, program) for error in _leaves(refusals))
    except Refusal as error:
        return _reason(error, program)
    except trio.TooSlowError:
        return f"no container within {TRIAL_TIMEOUT_S} s"
    return None


async def control_group_findings() -> list[Finding]:
    """Which hierarchies and controllers our containers would have."""
    found = await trio.to_thread.run_sync(visible_hierarchies)
    remedy = f"mount -t cgroup2 none {TOP}"
    if not found:
        return [Finding("control groups", "missing", f"none at {TOP}", remedy)]
    if is_unified(found):
        version = "version 2"
    elif any(one.version == 2 for one in found):
        version = "hybrid: version 1, with version 2 beside it (runc copes, crun may not)"
    else:
        version = "version 1"
    groups = ControlGroups(f"doctor-{os.getpid()}")
    try:
        await groups.find()
        try:
            await groups.open()
        finally:
            with trio.move_on_after(TRIAL_TIMEOUT_S, shield=True):
                await groups.end()
    except Refusal as error:
        return [Finding("control groups", "missing", f"{version}; {error}", remedy)]
    names = ", ".join(sorted(groups.controllers)) or "none"
    notes = missing_notes(groups.controllers)
    limits = Finding(
        "limits",
        "absent" if notes else "ok",
        "; ".join(notes) or f"by {names}",
        "a kernel and a boot command line with these controllers; under systemd Delegate=yes",
    )
    return [Finding("control groups", "ok", f"{version}; controllers: {names}"), limits]


def _seccomp() -> Finding:
    # seccomp(2): without a filter to read the kernel says EFAULT if it knows filters at all.
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), None, 0, 0)
    number = ctypes.get_errno()
    if number == errno.EFAULT:
        return Finding("seccomp", "ok", "filters can be set")
    reason = f"filters cannot be set: {os.strerror(number)}"
    return Finding("seccomp", "missing", reason, "a kernel with CONFIG_SECCOMP_FILTER")


def _detached_mounts(folder: Path) -> Finding:
    subject, calls = "mounts without a place", "open_tree, move_mount"
    source, target = folder / "source", folder / "target"
    try:
        for one in (source, target):
            one.mkdir()
        fd = cloned_at(os.fsencode(source))
        try:
            attach(fd, os.fsencode(target))
        finally:
            os.close(fd)
    except OSError as error:
        return Finding(subject, "missing", f"{calls}: {error}", "Linux 5.2 or later")
    return Finding(subject, "ok", calls)


def _pidfd() -> Finding:
    subject, calls = "pidfd", "pidfd_open, pidfd_send_signal, waitid"
    child = os.fork()
    if child == 0:
        signal.pause()
    try:
        fd = os.pidfd_open(child)
        try:
            signal.pidfd_send_signal(fd, signal.SIGKILL)
            os.waitid(os.P_PIDFD, fd, os.WEXITED)
        finally:
            os.close(fd)
    except OSError as error:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return Finding(subject, "missing", f"{calls}: {error}", "Linux 5.4 or later")
    return Finding(subject, "ok", calls)


def _leaves(group: BaseExceptionGroup[Refusal]) -> Iterator[Refusal]:
    for one in group.exceptions:
        if isinstance(one, BaseExceptionGroup):
            yield from _leaves(one)
        else:
            yield one


def _reason(error: Refusal, program: str) -> str:
    """The plugin's own words list a reason for each runtime; here there is one."""
    reasons = str(error.actual)
    prefix = f"{program}: "
    return reasons.removeprefix(prefix) if reasons.startswith(prefix) else str(error)


def main() -> int:
    folder = Path(sys.argv[1])
    # What the daemon would log is no finding.
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    mount(b"none", os.fsencode(folder), filesystem=b"tmpfs", flags=MS_NODEV | MS_NOSUID)
    folder.chmod(0o711)
    findings = [
        *kernel_findings(folder),
        *trio.run(control_group_findings),
        *trio.run(runtime_findings, folder),
    ]
    sys.stdout.write(msgspec.json.encode(findings).decode() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
