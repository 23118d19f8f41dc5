"""Three ways to start the same program: `acond`, the OCI runtime alone, Podman.

Each is timed from the request until its answer, and each answers once the container's
process runs (`run --detach` does, and so does `acond`'s API).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import trio

from acon.client import Client
from acon.tar_source import FileTar
from benchmarks.figures import CannotMeasure
from benchmarks.programs import run_program
from plugins.oci_runtime.cgroups import ControlGroups
from supervisor.formats.digest import Digest, digest_of
from supervisor.testing import Owner, manifest

PROGRAM = ("/bin/busybox", "sleep", "3600")
FOLDERS = ("bin", "dev", "proc", "run", "shared", "sys", "tmp")
END_TIMEOUT_S = 60
POLL_S = 0.01
# Podman raises these limits to what the kernel can do at most, which not every machine lets it.
_LIMITS = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024")


class Starter(Protocol):
    """`start` is timed, `prepare` and `end` are not. Numbers are used once."""

    name: str

    async def prepare(self, number: int) -> None: ...

    async def start(self, number: int) -> None: ...

    async def end(self, number: int) -> None: ...


def make_layer(path: Path) -> None:
    """A tar with a static busybox and empty folders. Raises `CannotMeasure` without busybox."""
    busybox = shutil.which("busybox")
    if busybox is None:
        raise CannotMeasure("busybox (Debian: busybox-static) is not installed")
    with tarfile.open(path, "w") as tar:
        for name in FOLDERS:
            folder = tarfile.TarInfo(name)
            folder.type, folder.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(folder)
        with open(busybox, "rb") as program:
            member = tarfile.TarInfo("bin/busybox")
            member.size, member.mode = os.stat(busybox).st_size, 0o755
            tar.addfile(member, program)


class Acond:
    """Requests over the daemon's Unix socket, on a connection that is kept."""

    name = "acond"

    def __init__(self, client: Client) -> None:
        self._client = client
        self._image_id = ""
        self._containers: dict[int, int] = {}

    async def load(self, layer: Path) -> None:
        digest = _digest(layer)
        owner = Owner("somebody")
        image = manifest(
            name="program:1",
            layers=[str(digest)],
            entrypoint=list(PROGRAM),
            env=["NUMBER"],  # each start differs, so that each is measured
            maxInstances=0,
            signals=[int(signal.SIGKILL)],
        )
        self._image_id = (await self._client.admit([owner.sign(image)])).image_ids[0]
        await self._client.upload_layer(digest, FileTar(layer))

    async def prepare(self, number: int) -> None:
        await trio.lowlevel.checkpoint()

    async def start(self, number: int) -> None:
        self._containers[number] = await self._client.start(self._image_id, [f"NUMBER={number}"])

    def id_of(self, number: int) -> int:
        """The daemon's number for a container."""
        return self._containers[number]

    async def end(self, number: int) -> None:
        container_id = self._containers.pop(number)
        await self._client.signal(container_id, int(signal.SIGKILL))
        with trio.fail_after(END_TIMEOUT_S):
            while True:
                views = await self._client.containers()
                if all(v.state == "exited" for v in views if v.container_id == container_id):
                    return
                await trio.sleep(POLL_S)


class BareRuntime:
    """`runc run --detach` on a copy of a bundle that `acond` made, prepared beforehand.

    The copy has the same namespaces, id mappings, mounts, seccomp filter and capabilities;
    only the paths differ: root, scratch space, socket and control group are its own.
    """

    name = "runc"

    def __init__(self, runtime: str, config: bytes, layer: Path, folder: Path) -> None:
        self._runtime = runtime
        self._config = config
        self._folder = folder
        self._state = folder / "state"
        self._log = folder / "log"
        self._groups = ControlGroups(f"bench-runc-{os.getpid()}")
        folder.mkdir(mode=0o711)
        self._root = folder / "root"
        with tarfile.open(layer) as tar:
            # Not extractall's own filter argument: Debian 12's Python does not have it yet.
            tar.extraction_filter = lambda member, _path: member
            tar.extractall(self._root)
        self._root.chmod(0o755)
        self._owner: int = json.loads(config)["linux"]["uidMappings"][0]["hostID"]
        for path in (self._root, *self._root.rglob("*")):
            os.lchown(path, self._owner, self._owner)
        self._sockets: dict[int, socket.socket] = {}

    async def prepare(self, number: int) -> None:
        bundle = self._folder / str(number)
        bundle.mkdir(mode=0o711)
        document = json.loads(self._config)
        document["root"]["path"] = str(self._root)
        document["linux"]["cgroupsPath"] = self._groups.path_of(str(number))
        for mount in document["mounts"]:
            if mount["type"] == "bind":
                mount["source"] = str(self._source(bundle, mount["destination"], number))
        (bundle / "config.json").write_text(json.dumps(document))
        await trio.lowlevel.checkpoint()

    def _source(self, bundle: Path, destination: str, number: int) -> Path:
        path = bundle / destination.strip("/").replace("/", "-")
        if destination.endswith(".sock"):
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(path))
            path.chmod(0o666)
            self._sockets[number] = listener
        else:
            path.mkdir()
            os.chown(path, self._owner, self._owner)
            if destination == "/run":  # where the socket is mounted
                (path / "acon.sock").touch()
        return path

    async def start(self, number: int) -> None:
        bundle = self._folder / str(number)
        arguments = ["run", "--detach", "--bundle", str(bundle)]
        arguments += ["--pid-file", str(bundle / "pid"), str(number)]
        await run_program([*self._command(), *arguments], self._log)

    async def end(self, number: int) -> None:
        pid = int((self._folder / str(number) / "pid").read_text())
        os.kill(pid, signal.SIGKILL)
        await _reap(pid)
        await run_program([*self._command(), "delete", "--force", str(number)], self._log)
        self._sockets.pop(number).close()

    def _command(self) -> tuple[str, ...]:
        return (self._runtime, "--root", str(self._state))

    async def close(self) -> None:
        """End what a failure left running."""
        for number in tuple(self._sockets):
            with suppress(CannotMeasure, OSError):
                await self.end(number)
        for listener in self._sockets.values():
            listener.close()
        await self._groups.end()


class Podman:
    """`podman run --detach` with a storage of its own and the same program as image.

    The host's network, a read-only root, no daemon of events; otherwise its defaults, so
    it has no user namespace. The first driver that can run a container is used.
    """

    name = "podman"
    DRIVERS = ("overlay", "vfs")

    def __init__(self, podman: str, runtime: str, driver: str, folder: Path) -> None:
        self._folder = folder
        self._log = folder / "log"
        self._groups = ControlGroups(f"bench-podman-{os.getpid()}")
        folder.mkdir(mode=0o711)
        self._command = (
            *(podman, "--root", str(folder / "storage"), "--runroot", str(folder / "run")),
            *("--tmpdir", str(folder / "tmp"), "--storage-driver", driver),
            *("--runtime", runtime, "--cgroup-manager", "cgroupfs", "--events-backend", "none"),
        )

    async def load(self, layer: Path) -> None:
        """Import the image and start it once. Raises `CannotMeasure` with Podman's words."""
        await run_program([*self._command, "import", str(layer), "program:1"], self._log)
        await self.start(0)
        await self.end(0)

    async def prepare(self, number: int) -> None:
        await trio.lowlevel.checkpoint()

    async def start(self, number: int) -> None:
        arguments = ["run", "--detach", "--name", f"n{number}", "--pull", "never", "--read-only"]
        arguments += ["--network", "host", "--cgroup-parent", self._groups.parent, *_LIMITS]
        arguments += ["--conmon-pidfile", str(self._folder / f"conmon-{number}"), "program:1"]
        await run_program([*self._command, *arguments, *PROGRAM], self._log)

    async def end(self, number: int) -> None:
        await run_program([*self._command, "rm", "--force", "--time", "0", f"n{number}"], self._log)
        conmon = self._folder / f"conmon-{number}"
        if conmon.exists():
            await _reap(int(conmon.read_text()))

    async def close(self) -> None:
        """Remove what is left of containers and of the storage's mounts."""
        with suppress(CannotMeasure):
            await run_program([*self._command, "rm", "--all", "--force", "--time", "0"], self._log)
        await self._groups.end()
        _unmount_below(self._folder)


async def _reap(pid: int) -> None:
    """Wait for a process that we adopted."""
    with trio.fail_after(END_TIMEOUT_S), suppress(ChildProcessError):
        await trio.to_thread.run_sync(os.waitpid, pid, 0, abandon_on_cancel=True)


def _digest(path: Path) -> Digest:
    return digest_of("sha384", path.read_bytes())


def _unmount_below(folder: Path) -> None:
    for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
        place = line.split()[1]
        if place.startswith(f"{folder}/"):
            subprocess.run(["umount", "--lazy", place], check=False, capture_output=True)
