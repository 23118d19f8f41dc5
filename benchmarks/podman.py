"""Podman as a starter, through the same OCI runtime and with a storage of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from itertools import count
from pathlib import Path

import trio

from benchmarks.figures import CannotMeasure
from benchmarks.foreground import Foreground
from benchmarks.orphans import reap
from benchmarks.program_image import PROGRAM
from benchmarks.programs import run_program
from plugins.oci_runtime.cgroups import ControlGroups

CLOSE_TIMEOUT_S = 120
REMOVE_ATTEMPTS = 10
REMOVE_PAUSE_S = 0.1
DRIVERS = ("overlay", "vfs")
IMAGE = "program:1"
# Where Podman keeps its locks, whatever its options say.
_LOCKS = Path("/dev/shm/libpod_lock")
# Podman raises these limits to what the kernel can do at most, which not every machine lets it.
_LIMITS = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024")
# Below these nobody has an id on an ordinary machine; 2**16 for each container.
_FIRST_ID = 1_000_000_000
_IDS = 1 << 16


class PodmanStorage:
    """One storage with the image in it. The first driver that can run a container is used."""

    def __init__(self, podman: str, runtime: str, driver: str, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        self._groups = ControlGroups(f"bench-podman-{os.getpid()}")
        folder.mkdir(mode=0o711)
        self.command = (
            *(podman, "--root", str(folder / "storage"), "--runroot", str(folder / "run")),
            *("--tmpdir", str(folder / "tmp"), "--storage-driver", driver),
            *("--runtime", runtime, "--cgroup-manager", "cgroupfs", "--events-backend", "none"),
        )

    @property
    def cgroup_parent(self) -> str:
        return self._groups.path_of("podman")

    async def load(self, layer: Path) -> None:
        """Import the image and start it once. Raises `CannotMeasure` with Podman's words."""
        await self._groups.find()
        await run_program([*self.command, "import", str(layer), IMAGE], self.log)
        trial = Podman(self, name="trial")
        await trial.start(0)
        await trial.end(0)

    async def close(self) -> None:
        """Remove what is left of containers and of the storage's mounts."""
        with suppress(CannotMeasure):
            await run_program([*self.command, "rm", "--all", "--force", "--time", "0"], self.log)
        await self._groups.end()
        _unmount_below(self.folder)


class Podman:
    """`podman run`: the host's network, a read-only root, no daemon of events; otherwise its
    defaults, so it has no user namespace unless `own_ids`, and then every container other ids.
    """

    def __init__(self, storage: PodmanStorage, *, name: str, own_ids: bool = False) -> None:
        self.name = name
        self._storage = storage
        self._own_ids = own_ids
        self._maps = count(_FIRST_ID, _IDS)
        self._prefix = name.replace(" ", "-")
        self._running: dict[int, Foreground] = {}

    async def prepare(self, number: int) -> None:
        await trio.lowlevel.checkpoint()

    async def start(self, number: int) -> None:
        storage = self._storage
        arguments = ["run", "--name", self.container(number), "--pull", "never", "--read-only"]
        arguments += ["--network", "host", "--cgroup-parent", storage.cgroup_parent, *_LIMITS]
        arguments += ["--conmon-pidfile", str(self._conmon(number))]
        if self._own_ids:
            first = next(self._maps)
            arguments += ["--uidmap", f"0:{first}:{_IDS}", "--gidmap", f"0:{first}:{_IDS}"]
        self._running[number] = await Foreground.start(
            [*storage.command, *arguments, IMAGE, PROGRAM], storage.log
        )

    async def first_instruction(self, number: int) -> float:
        await trio.lowlevel.checkpoint()
        return self._running[number].first_instruction

    async def end(self, number: int) -> None:
        """Killed, then removed: Podman's own clean-up, which conmon starts at the container's
        end, must be over by then."""
        storage = self._storage
        command = [*storage.command, "kill", "--signal", "KILL", self.container(number)]
        await run_program(command, storage.folder / "end-log")
        await self._running.pop(number).end()
        if self._conmon(number).exists():
            await reap(int(self._conmon(number).read_text()))
        await self._remove(number)

    async def _remove(self, number: int) -> None:
        """More than one attempt: now and then (4.3) its storage is busy for a moment."""
        storage = self._storage
        remove = ["rm", "--force", "--time", "0", self.container(number)]
        for attempts_left in reversed(range(REMOVE_ATTEMPTS)):
            try:
                await run_program([*storage.command, *remove], storage.folder / "end-log")
                return
            except CannotMeasure:
                if not attempts_left:
                    raise
            await trio.sleep(REMOVE_PAUSE_S)

    def container(self, number: int) -> str:
        """Podman's name for it."""
        return f"{self._prefix}-{number}"

    def _conmon(self, number: int) -> Path:
        return self._storage.folder / f"conmon-{self.container(number)}"


@asynccontextmanager
async def podman_storage(runtime: str, layer: Path, folder: Path) -> AsyncIterator[PodmanStorage]:
    """With the image in it, tried; `folder` is where it is made. Raises `CannotMeasure`."""
    executable = shutil.which("podman")
    if executable is None:
        raise CannotMeasure("podman is not installed")
    with _locks_as_before():
        reasons = []
        for driver in DRIVERS:
            storage = PodmanStorage(executable, runtime, driver, folder / f"podman-{driver}")
            try:
                try:
                    await storage.load(layer)
                except CannotMeasure as error:
                    reasons.append(f"with {driver}: {error}")
                    continue
                yield storage
                return
            finally:
                with trio.move_on_after(CLOSE_TIMEOUT_S, shield=True):
                    await storage.close()
        raise CannotMeasure(f"podman: {'; '.join(reasons)}")


@contextmanager
def _locks_as_before() -> Iterator[None]:
    existed = _LOCKS.exists()
    try:
        yield
    finally:
        if not existed:
            _LOCKS.unlink(missing_ok=True)


def _unmount_below(folder: Path) -> None:
    for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
        place = line.split()[1]
        if place.startswith(f"{folder}/"):
            subprocess.run(["umount", "--lazy", place], check=False, capture_output=True)
