"""A software TD with the daemon and the image that the container benchmarks start."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from acon.client import Client
from benchmarks.figures import require_root
from benchmarks.machine import Machine
from benchmarks.orphans import orphans_reaped
from benchmarks.program_image import make_layer
from benchmarks.ram import ram_folder
from benchmarks.starters import Acond


class ContainerMachine:
    """`machine`'s daemon, of process `daemon_pid`, runs; `layer` is the image's, a tar file."""

    def __init__(self, machine: Machine, layer: Path, daemon_pid: int) -> None:
        self.machine = machine
        self.layer = layer
        self.daemon_pid = daemon_pid

    @asynccontextmanager
    async def acond(self) -> AsyncIterator[tuple[Client, Acond]]:
        """A client, and the daemon as a starter, which has the image."""
        async with Client.over_socket(self.machine.api) as client:
            acond = Acond(client)
            await acond.load(self.layer)
            yield client, acond


@contextmanager
def container_machine() -> Iterator[ContainerMachine]:
    """All in memory, all gone afterwards. Raises `CannotMeasure`."""
    require_root()
    with ram_folder() as folder, orphans_reaped(), Machine(folder) as machine:
        layer = folder / "layer.tar"
        make_layer(layer)
        machine.power_on()
        machine.boot()
        daemon = machine.start_daemon()
        yield ContainerMachine(machine, layer, daemon.pid)
