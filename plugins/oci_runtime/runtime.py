"""The OCI runtime's command line, as far as we use it, and its failures in its own words."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import trio

from supervisor import RuntimeFailed

# A cancelled start lets the runtime finish for so long: a runtime killed half-way
# leaves more behind than one that is done.
GRACE_S = 3
KILLED_S = 3
COMMAND_TIMEOUT_S = 10
MAX_WORDS = 2000
MAX_LOG_BYTES = 256 * 1024
MAX_VERSION_BYTES = 4096


class LogLine(msgspec.Struct, frozen=True):
    """One line of `--log-format json`."""

    level: str = ""
    msg: str = ""


class OciCommand:
    """One runtime executable and the folder in which it keeps its state.

    Of each call of the runtime we are the parent and nobody else reaps it or what it
    left behind: it gets a process group of its own for that.
    """

    def __init__(self, executable: str, state_dir: Path) -> None:
        self.executable = executable
        self.state_dir = state_dir

    async def version(self) -> str:
        """The first line of `--version`. Raises `RuntimeFailed`."""
        read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            code = await _run(
                [self.executable, "--version"],
                stdout=write_end,
                stderr=write_end,
                timeout_s=COMMAND_TIMEOUT_S,
            )
            text = ""
            with suppress(BlockingIOError):
                text = os.read(read_end, MAX_VERSION_BYTES).decode(errors="replace")
        finally:
            os.close(read_end)
            os.close(write_end)
        if code or not text:
            raise RuntimeFailed(
                self.executable, "must tell its version", actual=text or f"exit code {code}"
            )
        return text.partition("\n")[0]

    async def run_detached(
        self, oci_id: str, bundle: Path, *, stdout: int, stderr: int, timeout_s: float
    ) -> int:
        """`run --detach`: create and start in one go; returns the first process's pid.

        That process's parent is then the nearest subreaper. Raises `RuntimeFailed` with
        the runtime's words. When it raises or is cancelled the process is ended, but
        the runtime's state and control groups may be left.
        """
        pid_file = bundle / "pid"
        log_file = bundle / "log"
        argv = [*self._with_state(log_file), "run", "--detach", "--bundle", str(bundle)]
        try:
            code = await _run(
                [*argv, "--pid-file", str(pid_file), oci_id],
                stdout=stdout,
                stderr=stderr,
                timeout_s=timeout_s,
            )
        except BaseException:
            await _end_first_process(pid_file)
            raise
        try:
            if code == 0:
                return int(pid_file.read_text())
        except (OSError, ValueError) as error:
            raise RuntimeFailed(
                f"container {oci_id}", "the runtime must say its pid", actual=error
            ) from error
        raise RuntimeFailed(
            f"container {oci_id}",
            f"{Path(self.executable).name} must be able to start it",
            actual=_words(log_file) or f"exit code {code}",
        )

    async def delete(self, oci_id: str, log_file: Path) -> None:
        """`delete --force`. Raises `RuntimeFailed`; that the container is unknown is no error."""
        code = await _run(
            [*self._with_state(log_file), "delete", "--force", oci_id],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout_s=COMMAND_TIMEOUT_S,
        )
        if code and (self.state_dir / oci_id).exists():
            raise RuntimeFailed(
                f"container {oci_id}", "the runtime must delete it", actual=_words(log_file)
            )

    def _with_state(self, log_file: Path) -> tuple[str, ...]:
        log = ("--log", str(log_file), "--log-format", "json")
        return (self.executable, "--root", str(self.state_dir), *log)


async def _run(argv: Sequence[str], *, stdout: int, stderr: int, timeout_s: float) -> int:
    """Run to the end and return the exit code; when cancelled or late, end it first."""
    try:
        process = await trio.lowlevel.open_process(
            argv, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, process_group=0
        )
    except OSError as error:
        raise RuntimeFailed(argv[0], "must be executable", actual=error) from error
    try:
        with trio.move_on_after(timeout_s):
            return await process.wait()
        raise RuntimeFailed(argv[0], "must finish in time", expected=f"{timeout_s} s")
    finally:
        if process.returncode != 0:
            await _end(process)


async def _end(process: trio.Process) -> None:
    with trio.move_on_after(GRACE_S, shield=True):
        if await process.wait() == 0:
            return
    with trio.move_on_after(KILLED_S, shield=True):
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        # trio reaped the leader; what it left in its group became our children. As long
        # as there are any, nobody else can have a group of this number.
        while _reap(os.P_PGID, process.pid):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await trio.sleep(0.01)


async def _end_first_process(pid_file: Path) -> None:
    """Kill and reap what the runtime had started by the time that it was interrupted."""
    pidfd = _open_first_process(pid_file)
    if pidfd is None:
        # It came not so far: the control group says who else there is.
        return
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        with trio.move_on_after(KILLED_S, shield=True):
            await trio.lowlevel.wait_readable(pidfd)
        _reap(os.P_PIDFD, pidfd)
    finally:
        os.close(pidfd)


def _open_first_process(pid_file: Path) -> int | None:
    try:
        return os.pidfd_open(int(pid_file.read_text()))
    except (OSError, ValueError):
        return None


def _reap(kind: int, number: int) -> bool:
    """Reap all that have ended; whether others of this kind still live."""
    with suppress(ChildProcessError):
        while os.waitid(kind, number, os.WEXITED | os.WNOHANG) is not None:
            pass
        return True
    return False


def _words(log_file: Path) -> str:
    """The last error of the runtime's log, or its last line."""
    try:
        with log_file.open("rb") as file:
            lines = file.read(MAX_LOG_BYTES).splitlines()
    except OSError:
        return ""
    words = ""
    for line in lines:
        try:
            entry = msgspec.json.decode(line, type=LogLine)
        except msgspec.DecodeError:
            continue
        if entry.level in ("error", "fatal", "panic") or not words:
            words = entry.msg
    return words[:MAX_WORDS]
