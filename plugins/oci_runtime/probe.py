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
import struct
from pathlib import Path

import trio

from plugins.oci_runtime.gateway import Gateway
from plugins.oci_runtime.launcher import Launcher
from plugins.oci_runtime.runtime import OciCommand
from supervisor import ConfigError, ContainerSpec, ExitStatus, IdMap, Refusal, RuntimeFailed

CANDIDATES = ("runc", "crun")
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PROBE_TIMEOUT_S = 10
PROBE_EXIT_CODE = 42
PROBE_ID = 0
# Below every id that the supervisor hands out, and not the overflow id.
PROBE_USER = 65533
MOUNT_POINTS = ("dev", "proc", "run", "shared", "tmp")

# exit(42), as instructions: platform.machine() -> (ELF machine, code)
_PROGRAMS = {
    # mov eax, 60 (exit); mov edi, 42; syscall
    "x86_64": (62, bytes.fromhex("b83c000000bf2a0000000f05")),
    # mov x0, 42; mov x8, 93 (exit); svc 0
    "aarch64": (183, bytes.fromhex("400580d2a80b80d2010000d4")),
}


async def find_runtime(
    setting: str, launcher: Launcher, gateway: Gateway, folder: Path
) -> tuple[OciCommand, str]:
    """The first candidate that runs a container, and its version; `launcher` then uses it.

    `setting` is `auto` or an absolute path. `folder` takes a socket for a moment.
    Raises `ConfigError`, or `RuntimeFailed` naming every candidate's reason.
    """
    reasons = []
    for executable in _candidates(setting):
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
        actual="; ".join(reasons) or "none found",
    )


def _candidates(setting: str) -> list[str]:
    if setting == "auto":
        found = (shutil.which(name, path=SEARCH_PATH) for name in CANDIDATES)
        return [path for path in found if path]
    if not Path(setting).is_absolute():
        raise ConfigError(
            "$.plugin.oci_runtime.runtime", "must be auto or an absolute path", actual=setting
        )
    return [setting]


async def _probe(launcher: Launcher, gateway: Gateway, folder: Path) -> None:
    socket_path = folder / "probe.sock"
    root = gateway.make_folder("probe")
    try:
        for name in MOUNT_POINTS:
            (root / name).mkdir(mode=0o755)
        program = root / "probe"
        program.write_bytes(exit_program(platform.machine()))
        program.chmod(0o755)
        socket_path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(socket_path))
            await _run_probe(launcher, root, socket_path)
    except OSError as error:
        raise RuntimeFailed("probe container", "must be preparable", actual=error) from error
    finally:
        shutil.rmtree(root, ignore_errors=True)
        socket_path.unlink(missing_ok=True)


async def _run_probe(launcher: Launcher, root: Path, socket_path: Path) -> None:
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
    with trio.move_on_after(PROBE_TIMEOUT_S):
        container = await launcher.launch(spec)
        try:
            status = await container.wait()
        finally:
            await container.destroy()
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
    elf_machine, code = _PROGRAMS[machine]
    return elf_file(elf_machine, code)


def elf_file(elf_machine: int, code: bytes) -> bytes:
    """An ELF64 executable (object file format 1.5) of one segment: header, then `code`."""
    base, header_size, segment_size = 0x400000, 64, 56
    code_offset = header_size + segment_size
    file_size = code_offset + len(code)
    identification = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    header = identification + struct.pack(
        "<HHIQQQIHHHHHH",
        *(2, elf_machine, 1, base + code_offset, header_size, 0, 0),
        *(header_size, segment_size, 1, 0, 0, 0),
    )
    readable_and_executable = 5
    segment = struct.pack(
        "<IIQQQQQQ", 1, readable_and_executable, 0, base, base, file_size, file_size, 0x1000
    )
    return header + segment + code
