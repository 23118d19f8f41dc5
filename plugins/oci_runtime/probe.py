"""Which OCI runtime works on this machine: found by trying, not by name.

Distributions ship runtimes that cannot run anything on some of the machines they are
installed on (crun refuses hybrid control groups), so each candidate has to run one
real container, set up as all others will be. Its program is a static ELF file of our
own, since nothing else is known to be on the machine.
"""

from __future__ import annotations

import platform
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from plugins.oci_runtime import kernel
from plugins.oci_runtime.gateway import Gateway
from plugins.oci_runtime.launcher import Launcher
from plugins.oci_runtime.runtime import OciCommand
from plugins.oci_runtime.spawn import SEARCH_PATH
from supervisor import (
    ConfigError,
    ContainerSpec,
    ExitStatus,
    IdMap,
    Refusal,
    Rootfs,
    RuntimeFailed,
)
from supervisor.formats.elf import ELF_MACHINES, elf_file

CANDIDATES = ("runc", "crun")
PROBE_TIMEOUT_S = 10
PROBE_EXIT_CODE = 42
PROBE_ID = 0
# Below every id that the supervisor hands out, and not the overflow id.
PROBE_USER = 65533
MOUNT_POINTS = ("dev", "proc", "run", "shared", "tmp")

# exit(42), as instructions: platform.machine() -> code
_PROGRAMS = {
    # mov eax, 60 (exit); mov edi, 42; syscall
    "x86_64": bytes.fromhex("b83c000000bf2a0000000f05"),
    # mov x0, 42; mov x8, 93 (exit); svc 0
    "aarch64": bytes.fromhex("400580d2a80b80d2010000d4"),
}


async def find_runtime(
    setting: str, launcher: Launcher, gateway: Gateway, folder: Path
) -> tuple[OciCommand, str]:
    """The first candidate that runs a container, and its version; `launcher` then uses it.

    `setting` is `auto` or an absolute path. `folder` takes a socket for a moment.
    Raises `ConfigError`, or `RuntimeFailed` naming every candidate's reason.
    """
    reasons = []
    for name, executable in _candidates(setting):
        if executable is None:
            reasons.append(f"{name}: not installed")
            continue
        launcher.command = OciCommand(executable, launcher.command.state_dir)
        try:
            version = await launcher.command.version()
            await _probe(launcher, gateway, folder)
        except Refusal as error:
            reasons.append(f"{executable}: {error}")
        else:
            return launcher.command, version
    raise RuntimeFailed(
        "container runtime",
        "one that can run a container on this machine must be installed",
        expected=" or ".join(CANDIDATES) if setting == "auto" else setting,
        actual="; ".join(reasons),
    )


def _candidates(setting: str) -> list[tuple[str, str | None]]:
    """(name, absolute path if there is such a file)"""
    if setting == "auto":
        return [(name, shutil.which(name, path=SEARCH_PATH)) for name in CANDIDATES]
    if not Path(setting).is_absolute():
        raise ConfigError(
            "$.plugin.oci_runtime.runtime", "must be auto or an absolute path", actual=setting
        )
    return [(setting, setting)]


class ProbeRoot:
    """A folder with one program, as the root of the probe container: a `Rootfs`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._place: Path | None = None

    def attach(self, target: Path) -> None:
        kernel.bind(self._folder, target)
        self._place = target

    def detach(self) -> None:
        if self._place is not None:
            kernel.unmount(self._place)
            self._place = None

    async def close(self) -> None:
        await trio.to_thread.run_sync(self.detach)


class _NoLog:
    """The probe's program says nothing."""

    def write(self, fd: int, chunk: bytes) -> None:
        del fd, chunk


async def _probe(launcher: Launcher, gateway: Gateway, folder: Path) -> None:
    socket_path = folder / "probe.sock"
    try:
        root = await trio.to_thread.run_sync(_make_root, gateway)
        try:
            with _listening(socket_path):
                await _run_probe(launcher, ProbeRoot(root), socket_path)
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(shutil.rmtree, root, True)
    except OSError as error:
        raise RuntimeFailed("probe container", "must be preparable", actual=error) from error


def _make_root(gateway: Gateway) -> Path:
    root = gateway.make_folder("probe")
    for name in MOUNT_POINTS:
        (root / name).mkdir(mode=0o755)
    program = root / "probe"
    program.write_bytes(exit_program(platform.machine()))
    program.chmod(0o755)
    return root


@contextmanager
def _listening(path: Path) -> Iterator[None]:
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


async def _run_probe(launcher: Launcher, root: Rootfs, socket_path: Path) -> None:
    spec = ContainerSpec(
        container_id=PROBE_ID,
        image_id="probe",
        root=root,
        argv=("/probe",),
        environment=(),
        working_dir="/",
        id_map=IdMap(pairs=((0, PROBE_USER),)),
        writable_root=False,
        no_new_privileges=True,
        log_fds=(),
        socket_path=socket_path,
    )
    status = None
    with trio.move_on_after(PROBE_TIMEOUT_S) as scope:
        prepared = await launcher.prepare(spec)
        try:
            container = await prepared.launch(_NoLog())
            try:
                status = await container.wait()
            finally:
                await container.destroy()
        finally:
            await prepared.close()
    if scope.cancelled_caught:
        raise RuntimeFailed(
            "probe container", "must end in time", expected=f"within {PROBE_TIMEOUT_S} s"
        )
    expected = ExitStatus(exit_code=PROBE_EXIT_CODE)
    if status != expected:
        raise RuntimeFailed(
            "probe container", "must end as its program does", expected=expected, actual=status
        )


def exit_program(machine: str) -> bytes:
    """A static program that exits with PROBE_EXIT_CODE at once. Raises `ConfigError`."""
    if machine not in _PROGRAMS:
        raise ConfigError(
            "container runtime",
            "can be tried on this machine",
            expected=", ".join(_PROGRAMS),
            actual=machine,
        )
    return elf_file(ELF_MACHINES[machine], _PROGRAMS[machine])
