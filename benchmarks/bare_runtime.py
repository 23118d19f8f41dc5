"""The OCI runtime alone, on a copy of what `acond` gave it."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import trio

from benchmarks.figures import CannotMeasure
from benchmarks.foreground import Foreground
from benchmarks.machine import Machine
from benchmarks.program_image import PROGRAM, unpack_layer
from benchmarks.programs import run_program
from benchmarks.starters import Acond
from plugins.oci_runtime.cgroups import ControlGroups

CLOSE_TIMEOUT_S = 120


class BareRuntime:
    """`runc run` on a copy of a bundle that `acond` made, prepared beforehand.

    The copy has the same namespaces, id mappings, mounts, seccomp filter, capabilities and
    limits. What exists only while `acond` starts a container is replaced: root, scratch
    space, sockets and control group are its own, and the program is run without the shim.
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
        self._owner: int = json.loads(config)["linux"]["uidMappings"][0]["hostID"]
        self._root = folder / "root"
        unpack_layer(layer, self._root, owner=self._owner)
        self._shared = self._own_folder(folder / "shared")
        self._running: dict[int, Foreground] = {}

    async def open(self) -> None:
        await self._groups.find()

    async def prepare(self, number: int) -> None:
        bundle = self._bundle(number)
        bundle.mkdir(mode=0o711)
        document = json.loads(self._config)
        document["root"]["path"] = str(self._root)
        document["process"]["args"] = [PROGRAM]
        document["linux"]["cgroupsPath"] = self._groups.path_of(str(number))
        for mount in document["mounts"]:
            if mount["type"] == "bind":
                mount["source"] = str(self._source(bundle, mount["destination"]))
        (bundle / "config.json").write_text(json.dumps(document))
        await trio.lowlevel.checkpoint()

    def _source(self, bundle: Path, destination: str) -> Path:
        if destination == "/shared":
            return self._shared
        if not destination.endswith(".sock"):
            path = self._own_folder(bundle / destination.strip("/"))
            if destination == "/run":
                (path / "acon.sock").touch()  # where the socket is mounted
            return path
        path = bundle / "socket"
        if not path.exists():
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(path))
            path.chmod(0o666)
        return path

    def _own_folder(self, path: Path) -> Path:
        path.mkdir()
        os.chown(path, self._owner, self._owner)
        return path

    async def start(self, number: int) -> None:
        bundle = self._bundle(number)
        command = [*self._command(), "run", "--bundle", str(bundle), str(number)]
        self._running[number] = await Foreground.start(command, self._log)

    async def first_instruction(self, number: int) -> float:
        await trio.lowlevel.checkpoint()
        return self._running[number].first_instruction

    async def end(self, number: int) -> None:
        """The command that ran it deletes it, too."""
        await run_program(
            [*self._command(), "kill", str(number), "KILL"], self._folder / "kill-log"
        )
        await self._running.pop(number).end()

    async def close(self) -> None:
        """End what a failure left running."""
        for number in tuple(self._running):
            with suppress(CannotMeasure):
                await self.end(number)
        for state in self._state.glob("*"):
            with suppress(CannotMeasure):
                await run_program([*self._command(), "delete", "--force", state.name], self._log)
        await self._groups.end()

    def _bundle(self, number: int) -> Path:
        return self._folder / str(number)

    def _command(self) -> tuple[str, ...]:
        return (self._runtime, "--root", str(self._state))


@asynccontextmanager
async def bare_runtime(
    acond: Acond, machine: Machine, layer: Path, number: int
) -> AsyncIterator[BareRuntime]:
    """On what `acond` makes of its start of `number`, which is ended again.

    Raises `CannotMeasure` without runc.
    """
    runtime = require_runc()
    await acond.start(number)
    bundle = machine.runtime_files / "bundles" / str(acond.id_of(number))
    config = (bundle / "config.json").read_bytes()
    await acond.end(number)
    bare = BareRuntime(runtime, config, layer, machine.folder / "bare")
    await bare.open()
    try:
        yield bare
    finally:
        with trio.move_on_after(CLOSE_TIMEOUT_S, shield=True):
            await bare.close()


def require_runc() -> str:
    """Its path. Raises `CannotMeasure`."""
    runtime = shutil.which("runc")
    if runtime is None:
        raise CannotMeasure("runc is not installed")
    return runtime
