"""Running the OCI runtime's command line: a process of ours, with exactly these descriptors.

posix_spawn(3) and a pidfd, rather than `subprocess`: that cannot give a child descriptors
under numbers of our choice, and needs a thread (and a copy of our page tables) for each.
"""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import trio

from supervisor import RuntimeFailed

# A cancelled command may finish for so long: a runtime killed half-way leaves more behind
# than one that is done.
GRACE_S = 3
KILLED_S = 3
POLL_S = 0.01
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# All that a runtime needs of an environment; ours is none of its business.
ENVIRONMENT = {"PATH": SEARCH_PATH}
# Python ignores these, and an ignored signal is inherited.
_DEFAULT_SIGNALS = (signal.SIGPIPE, signal.SIGXFSZ)


class Child:
    """A process whose parent we are, and which nobody else reaps. `close` must follow."""

    def __init__(self, pid: int) -> None:
        """Raises `OSError` if `pid` is no child of ours (`ChildProcessError`) or not there."""
        self.pid = pid
        self._code: int | None = None
        self._pidfd = os.pidfd_open(pid)
        try:
            os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except OSError:
            os.close(self._pidfd)
            raise

    async def wait(self) -> int:
        """Until it has ended; its exit code, or -signal. Again afterwards: the same at once.

        Raises `ChildProcessError` if somebody else reaped it.
        """
        if self._code is None:
            await trio.lowlevel.wait_readable(self._pidfd)
            self._reap()
        else:
            await trio.lowlevel.checkpoint()
        if self._code is None:
            raise RuntimeError("a readable pidfd means an end")
        return self._code

    @property
    def ended(self) -> bool:
        """Whether `wait` has seen its end."""
        return self._code is not None

    def send_signal(self, signum: int) -> None:
        """To this process alone. Raises `ProcessLookupError` after its end, and `OSError`."""
        if self._code is not None:
            raise ProcessLookupError(self.pid)
        signal.pidfd_send_signal(self._pidfd, signum)

    def close(self) -> None:
        """Give the pidfd back. Idempotent; a `wait` that is under way raises."""
        if self._pidfd >= 0:
            trio.lowlevel.notify_closing(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _reap(self) -> None:
        result = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
        if result is not None:
            exited = result.si_code == os.CLD_EXITED
            self._code = result.si_status if exited else -result.si_status


def keep_descriptors_here() -> None:
    """What the supervisor was started with is for none of its children. To be called once.

    All that it opens by itself is closed at execve(2) anyway. Raises `OSError`.
    """
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            # The list's own descriptor is closed by now.
            with suppress(OSError):
                os.set_inheritable(int(name), False)


async def run_to_end(argv: Sequence[str], *, fds: Mapping[int, int], timeout_s: float) -> int:
    """Run `argv` (an absolute path first) to its end; returns its exit code, or -signal.

    `fds`: number in the child -> our descriptor, which stays ours; of 0, 1 and 2 those
    absent are /dev/null, and (after `keep_descriptors_here`) it has no others. It leads a
    process group of its own.
    When this raises or is cancelled, it and its group are gone. Raises `RuntimeFailed`.
    """
    try:
        child = Child(_spawn(argv, fds))
    except OSError as error:
        raise RuntimeFailed(argv[0], "must be executable", actual=error) from error
    code = None
    try:
        with trio.move_on_after(timeout_s):
            code = await child.wait()
            return code
        raise RuntimeFailed(argv[0], "must finish in time", expected=f"{timeout_s} s")
    finally:
        if code != 0:
            await _end(child)
        child.close()


async def _end(child: Child) -> None:
    with trio.move_on_after(GRACE_S, shield=True):
        if await child.wait() == 0:
            return
    with trio.move_on_after(KILLED_S, shield=True):
        if not child.ended:
            # What it was about to give over leads a group of its own already.
            with _children_of(child.pid) as pidfds:
                os.killpg(child.pid, signal.SIGKILL)
                await child.wait()
                for pidfd in pidfds:
                    await _end_orphan(pidfd)
        # What it left in its group became our children. As long as there are any, nobody
        # else can have a group of this number.
        while reap(os.P_PGID, child.pid):
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            await trio.sleep(POLL_S)


@contextmanager
def _children_of(pid: int) -> Iterator[list[int]]:
    """A pidfd of each child that a process has now."""
    pidfds: list[int] = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for number in (task / "children").read_text(encoding="ascii").split():
                with suppress(OSError):
                    pidfds.append(os.pidfd_open(int(number)))
        yield pidfds
    finally:
        for pidfd in pidfds:
            os.close(pidfd)


async def _end_orphan(pidfd: int) -> None:
    """Its parent is dead, hence we are."""
    with suppress(OSError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        await trio.lowlevel.wait_readable(pidfd)
        reap(os.P_PIDFD, pidfd)


def reap(kind: int, number: int) -> bool:
    """Reap all children of this kind that have ended; whether others of it still live."""
    with suppress(ChildProcessError):
        while os.waitid(kind, number, os.WEXITED | os.WNOHANG) is not None:
            pass
        return True
    return False


def _spawn(argv: Sequence[str], fds: Mapping[int, int]) -> int:
    with _out_of_the_way(fds) as copies:
        return os.posix_spawn(
            argv[0],
            list(argv),
            ENVIRONMENT,
            file_actions=[
                *(
                    (os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0)
                    for number in (0, 1, 2)
                    if number not in fds
                ),
                *((os.POSIX_SPAWN_DUP2, copy, number) for number, copy in copies.items()),
            ],
            setpgroup=0,
            setsigdef=_DEFAULT_SIGNALS,
        )


@contextmanager
def _out_of_the_way(fds: Mapping[int, int]) -> Iterator[dict[int, int]]:
    """Copies under numbers that the child does not use, so that none overwrites another."""
    above = max((2, *fds)) + 1
    copies: dict[int, int] = {}
    try:
        for number, descriptor in fds.items():
            copies[number] = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, above)
        yield copies
    finally:
        for copy in copies.values():
            os.close(copy)
