"""What this machine offers to a daemon, found out by trying."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from acon.finding import Finding
from supervisor.errors import Refusal
from supervisor.ram import (
    PROC_MOUNTS,
    PROC_SWAPS,
    RAM_FILE_SYSTEMS,
    active_swap,
    file_system_of,
)

_TRIAL_TIMEOUT_S = 30
# Each runtime, control groups, and what is slow about a loaded machine.
_CONTAINERS_TIMEOUT_S = 120
_TDX_INTERFACES = (
    ("/sys/devices/virtual/misc/tdx_guest/measurements/rtmr3:sha384", "extending registers"),
    ("/sys/kernel/config/tsm/report", "quotes (configfs-tsm)"),
    ("/dev/tdx_guest", "TD reports"),
    ("/sys/firmware/acpi/tables/data/CCEL", "the firmware's event log"),
)


def examine() -> list[Finding]:
    """Every finding, those first that stop everything else. Leaves nothing behind."""
    return [
        _python(),
        _kernel(),
        _swap(),
        _runtime_folder(),
        *_needing_root(),
        *(_tdx(path, use) for path, use in _TDX_INTERFACES),
    ]


def _python() -> Finding:
    right = sys.version_info >= (3, 11)
    return Finding(
        "Python",
        "ok" if right else "missing",
        platform.python_version(),
        "3.11 or later is needed (Debian 12, Ubuntu 24.04 and later have it)",
    )


def _kernel() -> Finding:
    return Finding("kernel", "ok", f"{platform.system()} {platform.release()}")


def _swap() -> Finding:
    try:
        areas = active_swap(PROC_SWAPS.read_text(encoding="ascii"))
    except OSError as error:
        return Finding("swap", "missing", f"nobody can tell: {error}", "mount /proc")
    return Finding(
        "swap",
        "missing" if areas else "ok",
        ", ".join(areas) or "none, or zram only",
        "swapoff -a: layers and secrets in RAM must not reach a disk that the host sees "
        "(unsafe_allow_swap for trying things)",
    )


def _runtime_folder() -> Finding:
    """Where the daemon keeps its folder unless `runtime_dir` says otherwise."""
    usual = Path("/run/acond")
    nearest = usual if usual.is_dir() else usual.parent
    try:
        kind = file_system_of(nearest, PROC_MOUNTS.read_text(encoding="utf-8"))
    except (OSError, ValueError, IndexError) as error:
        return Finding("runtime folder", "missing", f"nobody can tell: {error}", "mount /proc")
    return Finding(
        "runtime folder",
        "ok" if kind in RAM_FILE_SYSTEMS else "missing",
        f"{nearest} is on {kind}",
        f"mkdir -p {usual} && mount -t tmpfs -o mode=711 acond {usual}: it must be in RAM",
    )


def _needing_root() -> list[Finding]:
    trials: list[tuple[str, Callable[[Path], str], str]] = [
        ("user namespaces", _user_namespace, "sysctl user.max_user_namespaces, not 0"),
        ("overlay", _overlay, "modprobe overlay, or a kernel with CONFIG_OVERLAY_FS"),
    ]
    if os.geteuid() != 0:
        return [
            Finding(subject, "untried", "only root can try", "sudo acon doctor")
            for subject in (
                *(one for one, _, _ in trials),
                "layers",
                "control groups",
                "container runtime",
            )
        ]
    found = [_trial(subject, trial, remedy) for subject, trial, remedy in trials]
    return [*found, _layers(), *_containers()]


def _trial(subject: str, trial: Callable[[Path], str], remedy: str) -> Finding:
    with tempfile.TemporaryDirectory(prefix="acon-doctor-") as folder:
        try:
            return Finding(subject, "ok", trial(Path(folder)))
        except (OSError, subprocess.SubprocessError, Refusal) as error:
            words = error.stderr if isinstance(error, subprocess.CalledProcessError) else None
            return Finding(subject, "missing", (words or str(error)).strip(), remedy)


def _run(command: list[str]) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=_TRIAL_TIMEOUT_S, check=True
    )
    return done.stdout.strip()


def _user_namespace(_folder: Path) -> str:
    _run(["unshare", "--user", "--map-root-user", "true"])
    return "one was made"


def _overlay(folder: Path) -> str:
    # In a mount namespace of its own, which takes the mounts with it when the shell ends.
    script = (
        'mount -t tmpfs none "$1" && cd "$1" && mkdir lower upper work merged && '
        "mount -t overlay none -o lowerdir=lower,upperdir=upper,workdir=work merged"
    )
    _run(["unshare", "--mount", "sh", "-ec", script, "sh", str(folder)])
    return "one was mounted"


def _layers() -> Finding:
    """How the image store would show layers: what falls short of the best still works."""
    remedy = (
        "Linux 6.12 with CONFIG_EROFS_FS mounts layers without unpacking them, "
        "6.3 has idmapped mounts of tmpfs; without, layers are unpacked or copied"
    )
    with tempfile.TemporaryDirectory(prefix="acon-doctor-") as folder:
        command = ["unshare", "--mount", sys.executable, "-m", "acon.layer_trial", folder]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_TRIAL_TIMEOUT_S, check=True
            )
        except (OSError, subprocess.SubprocessError) as error:
            words = error.stderr if isinstance(error, subprocess.CalledProcessError) else None
            return Finding("layers", "missing", (words or str(error)).strip(), remedy)
    detail = " ".join((done.stdout + done.stderr).split())
    return Finding("layers", "absent" if done.stderr else "ok", detail, remedy)


def _containers() -> list[Finding]:
    """The kernel's part, control groups and runtimes, tried as the daemon uses them."""
    with tempfile.TemporaryDirectory(prefix="acon-doctor-") as folder:
        command = ["unshare", "--mount", sys.executable, "-m", "acon.runtime_trial", folder]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_CONTAINERS_TIMEOUT_S, check=True
            )
            return msgspec.json.decode(done.stdout, type=list[Finding])
        except (OSError, subprocess.SubprocessError, msgspec.MsgspecError) as error:
            words = error.stderr if isinstance(error, subprocess.CalledProcessError) else None
            return [Finding("container runtime", "missing", (words or str(error)).strip())]


def _tdx(path: str, use: str) -> Finding:
    if Path(path).exists():
        return Finding(f"TDX: {use}", "ok", path)
    return Finding(
        f"TDX: {use}",
        "absent",
        f"no {path}",
        "only a TD with a recent kernel has it (Linux 6.16 for registers); elsewhere `acon sim`",
    )
