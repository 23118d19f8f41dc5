"""A running `oci_runtime` plugin over a root file system made of busybox, for its tests."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import structlog
import trio
from control_group_views import groups_called

from plugins.oci_runtime import OciRuntime, kernel
from plugins.oci_runtime.container import Container
from plugins.oci_runtime.gateway import Gateway
from plugins.oci_runtime.launcher import Launcher
from plugins.oci_runtime.prepared import Prepared
from supervisor import ContainerSpec, ExitStatus, IdMap, PluginContext, StartReceipt
from supervisor.formats.elf import elf_file
from supervisor.formats.log_events import StartContainerEvent

BUSYBOX = Path("/bin/busybox")
FIRST_ID = 200_000
MOUNT_POINTS = ("proc", "dev", "tmp", "run", "shared", "sys")


def make_rootfs(path: Path) -> Path:
    """A tree with every busybox applet in /bin, and mount points, owned by the machine's root."""
    (path / "bin").mkdir(parents=True)
    for name in (*MOUNT_POINTS, "place"):
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


def call(number: int, *arguments: int) -> bytes:
    """x86-64 instructions for one system call."""
    # mov edi / esi / edx / r10d / r8d, imm32; mov eax, number; syscall
    loads = (b"\xbf", b"\xbe", b"\xba", b"\x41\xba", b"\x41\xb8")
    code = b"".join(
        load + struct.pack("<I", argument) for load, argument in zip(loads, arguments, strict=False)
    )
    return code + b"\xb8" + struct.pack("<I", number) + b"\x0f\x05"


# neg eax; mov edi, eax; mov eax, 60 (exit); syscall: the errno of the call before.
EXIT_WITH_ERRNO = bytes.fromhex("f7d889c7b83c0000000f05")


def one_call(number: int, *arguments: int) -> bytes:
    return call(number, *arguments) + EXIT_WITH_ERRNO


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


class BoundRoot:
    """A `Rootfs` out of a folder: visible while attached, by a bind mount."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._target: Path | None = None

    def attach(self, target: Path) -> None:
        kernel.bind(self.folder, target)
        self._target = target

    def detach(self) -> None:
        if self._target is not None:
            kernel.unmount(self._target)
            self._target = None

    async def close(self) -> None:
        await trio.lowlevel.checkpoint()
        self.detach()


class MemoryLog:
    """A `LogSink` that keeps everything, in order of arrival."""

    def __init__(self) -> None:
        self.chunks: list[tuple[int, bytes]] = []

    def write(self, fd: int, chunk: bytes) -> None:
        self.chunks.append((fd, chunk))

    def text(self, fd: int | None = None) -> bytes:
        """Of one descriptor, or of all."""
        return b"".join(chunk for from_fd, chunk in self.chunks if fd in (None, from_fd))


class Held:
    """One run of a container, with all that it has: `destroy` frees that too."""

    def __init__(self, prepared: Prepared, run: Container, log: MemoryLog) -> None:
        self.prepared = prepared
        self.run = run
        self.log = log

    @property
    def pid(self) -> int:
        return self.run.pid

    def logs(self) -> bytes:
        return self.log.text()

    async def wait(self) -> ExitStatus:
        return await self.run.wait()

    async def signal(self, signum: int, *, whole_group: bool) -> None:
        await self.run.signal(signum, whole_group=whole_group)

    async def destroy(self) -> None:
        await self.run.destroy()
        await self.prepared.close()


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
        return Gateway(self.folder, shared_size_mib=1).instance

    def spec(
        self,
        *argv: str,
        environment: tuple[str, ...] = ("PATH=/bin",),
        working_dir: str = "/",
        uids: tuple[int, ...] = (),
        writable_root: bool = False,
        log_fds: tuple[int, ...] = (1, 2),
        root: Path | None = None,
    ) -> ContainerSpec:
        """A container of its own id, ids and listening socket."""
        self._last_id += 1
        container_id = self._last_id
        socket_path = self.folder / f"{container_id}.sock"
        socket_path.unlink(missing_ok=True)  # of a rig before this one in the same folder
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
            root=BoundRoot(root or self.rootfs),
            argv=argv,
            environment=environment,
            working_dir=working_dir,
            id_map=IdMap(pairs=pairs),
            writable_root=writable_root,
            no_new_privileges=not uids,
            log_fds=log_fds,
            socket_path=socket_path,
        )

    async def start(self, spec: ContainerSpec) -> Held:
        prepared = await self.launcher.prepare(spec)
        log = MemoryLog()
        try:
            return Held(prepared, await prepared.start(receipt_for(spec), log), log)
        except BaseException:
            await prepared.close()
            raise

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

    async def run_once(self, prepared: Prepared, spec: ContainerSpec) -> str:
        """What one run of a container that is kept printed; exit code 0."""
        log = MemoryLog()
        with trio.fail_after(20):
            run = await prepared.start(receipt_for(spec), log)
            try:
                status = await run.wait()
            finally:
                await run.destroy()
        assert status.exit_code == 0, (status, log.text())
        return log.text().decode()

    def passages(self) -> list[Path]:
        """Containers' own folders in the gateway, which last as long as bundles do."""
        gateway = Gateway(self.folder, shared_size_mib=1).path
        return [path for path in gateway.iterdir() if path.name != "shared"]

    def remains(self, *, bundles: bool = True) -> list[str]:
        """Every trace of a container anywhere: state, groups, mounts, processes, and bundles,
        which last as long as what is prepared."""
        return [
            *(str(path) for path in (self.folder / "state").iterdir()),
            *(str(path) for path in (self.folder / "bundles").iterdir() if bundles),
            *traces_of(self.instance, with_gateway=False),
            *(str(path) for path in self.passages() if bundles),
            *(f"child {child}" for child in children()),
        ]


def traces_of(instance: str, *, with_gateway: bool) -> list[str]:
    """Control groups and mounts of one instance."""
    found = [
        folder
        for group in groups_called(f"acond-{instance}")
        for folder, _, _ in os.walk(group)
        if folder != str(group)
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
