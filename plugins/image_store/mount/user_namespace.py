"""A user namespace that only says how owners are mapped (mount_setattr(2), MOUNT_ATTR_IDMAP)."""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import trio

from supervisor import DeadlineExceeded, RuntimeFailed

MAKE_TIMEOUT_S = 5
END_TIMEOUT_S = 2
# The kernel takes one write of less than a page, and 340 lines at most (user_namespaces(7)).
MAX_MAP_BYTES = 4095
MAX_MAP_LINES = 340
_READY = b"ready\n"


def map_text(pairs: Iterable[tuple[int, int]], *, item: str) -> bytes:
    """`uid_map` lines for pairs (in the layer, as shown). Neighbours share a line."""
    runs: list[tuple[int, int, int]] = []
    for inside, outside in sorted(pairs):
        if runs:
            first_inside, first_outside, count = runs[-1]
            if (inside, outside) == (first_inside + count, first_outside + count):
                runs[-1] = (first_inside, first_outside, count + 1)
                continue
        runs.append((inside, outside, 1))
    text = b"".join(b"%d %d %d\n" % run for run in runs)
    if len(runs) > MAX_MAP_LINES or len(text) > MAX_MAP_BYTES:
        raise RuntimeFailed(
            item,
            "the container has too many separate user ids for the kernel",
            expected=f"at most {MAX_MAP_LINES} runs and {MAX_MAP_BYTES} bytes",
            actual=f"{len(runs)} runs, {len(text)} bytes",
        )
    return text


@asynccontextmanager
async def user_namespace(pairs: Iterable[tuple[int, int]], *, item: str) -> AsyncIterator[int]:
    """A descriptor of a namespace with this mapping, for users and groups alike.

    A short-lived child is born into it (Python cannot unshare one thread safely) and has
    ended when the body runs. Closed afterwards. Raises `RuntimeFailed`, `DeadlineExceeded`.
    """
    text = map_text(pairs, item=item)
    try:
        with trio.fail_after(MAKE_TIMEOUT_S):
            namespace_fd = await _made(text, item)
    except trio.TooSlowError as error:
        raise DeadlineExceeded(
            item, "no user namespace was made in time", expected=f"{MAKE_TIMEOUT_S} s"
        ) from error
    try:
        yield namespace_fd
    finally:
        os.close(namespace_fd)


async def _made(text: bytes, item: str) -> int:
    process = await _child(item)
    try:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the child's pipes are missing")
        # cat answers only once unshare has made the namespace and become it.
        await process.stdin.send_all(_READY)
        if await process.stdout.receive_some(len(_READY)) == b"":
            raise RuntimeFailed(item, "no user namespace can be made here (unshare --user failed)")
        return _mapped(process.pid, text, item)
    except trio.BrokenResourceError as error:
        raise RuntimeFailed(
            item, "no user namespace can be made here (unshare --user failed)"
        ) from error
    finally:
        process.kill()
        with trio.move_on_after(END_TIMEOUT_S, shield=True):
            await process.wait()
        await _close_pipes(process)


async def _child(item: str) -> trio.Process:
    try:
        return await trio.lowlevel.open_process(
            ["unshare", "--user", "cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except OSError as error:
        raise RuntimeFailed(item, "unshare (util-linux) must be installed", actual=error) from error


async def _close_pipes(process: trio.Process) -> None:
    with trio.move_on_after(END_TIMEOUT_S, shield=True):
        if process.stdin is not None:
            await process.stdin.aclose()
        if process.stdout is not None:
            await process.stdout.aclose()


def _mapped(pid: int, text: bytes, item: str) -> int:
    try:
        for name in ("uid_map", "gid_map"):
            map_fd = os.open(f"/proc/{pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(map_fd, text)
            finally:
                os.close(map_fd)
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise RuntimeFailed(item, "the user namespace could not be mapped", actual=error) from error
