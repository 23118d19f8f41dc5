"""A running `oci_runtime` plugin over a root file system made of busybox, for its tests."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import structlog
import trio

from plugins.oci_runtime import OciRuntime
from plugins.oci_runtime.container import Container
from plugins.oci_runtime.gateway import Gateway
from plugins.oci_runtime.launcher import Launcher
from plugins.oci_runtime.probe import elf_file
from supervisor import ContainerSpec, IdMap, PluginContext, StartReceipt
from supervisor.formats.log_events import StartContainerEvent

BUSYBOX = Path("/bin/busybox")
FIRST_ID = 200_000
MOUNT_POINTS = ("proc", "dev", "tmp", "run", "shared", "sys")


def make_rootfs(path: Path) -> Path:
    """A tree with every busybox applet in /bin, and mount points, owned by the machine's root."""
    (path / "bin").mkdir(parents=True)
    for name in (*MOUNT_POINTS, "work"):
        (path / name).mkdir()
        (path / name).chmod(0o755)
    path.chmod(0o755)
    shutil.copy(BUSYBOX, path / "bin" / "busybox")
    applets = subprocess.run(
        [BUSYBOX, "--list"], check=True, capture_output=True, text=True
    ).stdout.split()
    for applet in applets:
        if applet != "busybox":
            (path / "bin" / applet).symlink_to("busybox")
    return path


def write_program(rootfs: Path, name: str, x86_code: bytes) -> str:
    """A static program of these instructions in the tree; returns its path inside."""
    program = rootfs / "bin" / name
    program.write_bytes(elf_file(62, x86_code))
    program.chmod(0o755)
    return f"/bin/{name}"


def receipt_for(spec: ContainerSpec) -> StartReceipt:
    """The receipt that measuring exactly this start would have given."""
    event = StartContainerEvent(
        image_id=spec.image_id,
        layers=(),
        delegations=(),
        argv=spec.argv,
        environment=spec.environment,
    )
    return StartReceipt._create("00" * 48, event)


class Rig:
    """The plugin, what it runs on, and how to look for what it left."""

    def __init__(self, launcher: Launcher, folder: Path, rootfs: Path) -> None:
        self.launcher = launcher
        self.folder = folder
        self.rootfs = rootfs
        self._last_id = 0
        self.sockets: dict[int, socket.socket] = {}

    @property
    def instance(self) -> str:
        return Gateway(self.folder, scratch_size_mib=1, shared_size_mib=1).instance

    def spec(
        self,
        *argv: str,
        environment: tuple[str, ...] = ("PATH=/bin",),
        working_dir: str = "/",
        uids: tuple[int, ...] = (),
        writable_root: bool = False,
        log_fds: tuple[int, ...] = (1, 2),
    ) -> ContainerSpec:
        """A container of its own id, ids and listening socket."""
        self._last_id += 1
        container_id = self._last_id
        socket_path = self.folder / f"{container_id}.sock"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(socket_path))
        socket_path.chmod(0o666)
        listener.listen(8)
        self.sockets[container_id] = listener
        base = FIRST_ID + 100 * container_id
        pairs = tuple((inside, base + index) for index, inside in enumerate((0, *uids)))
        return ContainerSpec(
            container_id=container_id,
            image_id=f"sha384/{'a' * 96}/{'b' * 96}",
            root=self.rootfs,
            argv=argv,
            environment=environment,
            working_dir=working_dir,
            id_map=IdMap(pairs=pairs),
            writable_root=writable_root,
            no_new_privileges=not uids,
            log_fds=log_fds,
            socket_path=socket_path,
        )

    async def start(self, spec: ContainerSpec) -> Container:
        return await self.launcher.start(spec, receipt_for(spec))

    async def output_of(self, spec: ContainerSpec) -> str:
        """What a program printed until it ended with exit code 0."""
        with trio.fail_after(20):
            container = await self.start(spec)
            try:
                status = await container.wait()
            finally:
                await container.destroy()
        text = container.logs().decode()
        assert status.exit_code == 0, (status, text)
        return text

    async def shell(self, script: str, *, uids: tuple[int, ...] = ()) -> str:
        return await self.output_of(self.spec("/bin/sh", "-c", script, uids=uids))

    def remains(self) -> list[str]:
        """Every trace of a container anywhere: state, bundles, groups, mounts, processes, fds."""
        return [
            *(str(path) for path in (self.folder / "state").iterdir()),
            *(str(path) for path in (self.folder / "bundles").iterdir()),
            *traces_of(self.instance, with_gateway=False),
            *(f"child {child}" for child in children()),
        ]


def traces_of(instance: str, *, with_gateway: bool) -> list[str]:
    """Control groups and mounts of one instance."""
    found = [
        str(path) for path in Path("/sys/fs/cgroup").glob(f"**/acond-{instance}/*") if path.is_dir()
    ]
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount_point = line.split(" ")[4]
        marker = f"/acond-{instance}"
        if marker not in mount_point:
            continue
        if with_gateway or not mount_point.endswith((marker, f"{marker}/shared")):
            found.append(mount_point)
    return found


def children() -> list[str]:
    """This process's children, dead ones included."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        found += (task / "children").read_text().split()
    return found


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def make_plugin(folder: Path, config: OciRuntime.Config | None = None) -> OciRuntime:
    context = PluginContext(
        name="oci_runtime",
        runtime_dir=folder,
        log=structlog.stdlib.get_logger("test"),
        report=lambda event: None,
    )
    return OciRuntime(config or OciRuntime.Config(), context)


@asynccontextmanager
async def running_rig(
    tmp_path: Path, config: OciRuntime.Config | None = None
) -> AsyncIterator[Rig]:
    """The plugin between the start and the end of its lifespan."""
    folder = tmp_path / "runtime"
    folder.mkdir(mode=0o700, exist_ok=True)
    rootfs = tmp_path / "rootfs"
    if not rootfs.exists():
        make_rootfs(rootfs)
    plugin = make_plugin(folder, config)
    async with trio.open_nursery() as nursery:
        await nursery.start(plugin.lifespan)
        launcher = cast(Launcher, await plugin.container_runtime())
        rig = Rig(launcher, folder, rootfs)
        try:
            yield rig
        finally:
            for listener in rig.sockets.values():
                listener.close()
            nursery.cancel_scope.cancel()
