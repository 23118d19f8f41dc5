"""One supervisor's containers, the kill of it, and what the next makes of them.

python -m oci_runtime_succession FOLDER RUNTIME

is the predecessor: it runs containers and a command in one of them, says so, and goes on
starting others until it is killed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import msgspec
import structlog
import trio
from control_group_views import groups_called
from oci_runtime_rig import make_rootfs, running_rig, traces_of

from plugins.oci_runtime import OciRuntime
from plugins.oci_runtime.gateway import Gateway
from supervisor import Event, Invocation, PluginContext, PredecessorEnded

HERE = Path(__file__).resolve().parent
PATIENCE_S = 60
COMMAND = ("sleep", "4711")


class Outcome(msgspec.Struct, kw_only=True):
    """What the predecessor said and left; what the successor told, and left in turn.

    `members` were in control groups when it had started, `alive` a while later.
    """

    said: str
    found: tuple[int, ...]
    members: tuple[int, ...]
    alive: tuple[int, ...]
    ids: tuple[str, ...]
    processes: int
    notes: tuple[str, ...]
    traces: tuple[str, ...]
    events: int


async def succession(folder: Path, first: str, second: str, delay_s: float = 0) -> Outcome:
    """Kill a predecessor with runtime `first`, `delay_s` after its word; run `second` then.

    `folder` is empty.
    """
    rootfs = await trio.to_thread.run_sync(make_rootfs, folder / "rootfs")
    _add_entry_point(rootfs)
    with await trio.to_thread.run_sync(_predecessor, folder, first) as predecessor:
        assert predecessor.stdout is not None
        said = await trio.to_thread.run_sync(predecessor.stdout.readline)
        await trio.sleep(delay_s)
        predecessor.kill()
    runtime_dir = folder / "runtime"
    instance = Gateway(runtime_dir, shared_size_mib=1).instance
    found = _members(instance)
    events: list[Event] = []
    context = PluginContext(
        name="oci_runtime",
        runtime_dir=runtime_dir,
        log=structlog.stdlib.get_logger("test"),
        report=events.append,
    )
    plugin = OciRuntime(OciRuntime.Config(runtime=second), context)
    async with trio.open_nursery() as nursery:
        with trio.fail_after(PATIENCE_S):
            await nursery.start(plugin.lifespan)
        members = _members(instance)
        traces = traces_of(instance, with_gateway=False)
        with trio.move_on_after(PATIENCE_S):
            # A first process is not quite gone before init has reaped what was invoked in it.
            while any(_is_alive(pid) for pid in found):  # noqa: ASYNC110 - init's doing
                await trio.sleep(0.01)
        alive = [pid for pid in found if _is_alive(pid)]
        notes = (await plugin.container_runtime()).notes
        nursery.cancel_scope.cancel()
    (event,) = events
    assert isinstance(event, PredecessorEnded)
    return Outcome(
        said=said.decode().strip(),
        found=tuple(found),
        members=tuple(members),
        alive=tuple(alive),
        ids=event.containers,
        processes=event.processes,
        notes=notes,
        traces=(*traces, *traces_of(instance, with_gateway=True)),
        events=len(events),
    )


def _add_entry_point(rootfs: Path) -> None:
    folder = rootfs / "lib" / "acon" / "entrypoint.d"
    folder.mkdir(parents=True)
    for parent in (folder, folder.parent, folder.parent.parent):
        parent.chmod(0o755)
    program = folder / "Slow"
    program.write_text(f"#!/bin/sh\n{' '.join(COMMAND)}\n")
    program.chmod(0o755)


def _predecessor(folder: Path, runtime: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "oci_runtime_succession", str(folder), runtime],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parent}:{HERE.parent.parent}"},
    )


def _members(instance: str) -> list[int]:
    """Whoever lives in a control group of this instance."""
    found: set[int] = set()
    for group in groups_called(f"acond-{instance}"):
        for folder, _, _ in os.walk(group):
            with suppress(OSError):  # it may have ended since
                found.update(map(int, Path(folder, "cgroup.procs").read_text().split()))
    return sorted(found)


def _is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


async def _live_until_killed(folder: Path, runtime: str) -> None:
    async with (
        running_rig(folder, OciRuntime.Config(runtime=runtime)) as rig,
        trio.open_nursery() as nursery,
    ):
        for _ in range(2):
            last = await rig.start(rig.spec("/bin/sleep", "1000"))
        call = Invocation(entry_point="Slow", capture_bytes=0, timeout_s=1000)
        nursery.start_soon(last.run.invoke, call)
        mark = "\0".join(COMMAND).encode()
        lines: list[bytes] = []
        while not any(line.startswith(mark) for line in lines):
            await trio.sleep(0.01)
            lines = [_command_line(pid) for pid in _members(rig.instance)]
        sys.stdout.write("running\n")
        sys.stdout.flush()
        while True:
            short = await rig.start(rig.spec("/bin/true"))
            await short.destroy()


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


if __name__ == "__main__":
    # Its words are on standard output; the plugin's are not.
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    trio.run(_live_until_killed, Path(sys.argv[1]), sys.argv[2])
