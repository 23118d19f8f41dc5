"""The OCI runtime's command line, as far as we use it, and its failures in its own words."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import msgspec
import trio

from plugins.oci_runtime.spawn import run_to_end
from supervisor import RuntimeFailed

COMMAND_TIMEOUT_S = 10
MAX_WORDS = 2000
STANDARD_FDS = 3
MAX_LOG_BYTES = 256 * 1024
MAX_VERSION_BYTES = 4096


class LogLine(msgspec.Struct, frozen=True):
    """One line of `--log-format json`."""

    level: str = ""
    msg: str = ""


class OciCommand:
    """One runtime executable and the folder in which it keeps its state.

    Each call is a process of ours in a group of its own (`spawn`).
    """

    def __init__(self, executable: str, state_dir: Path) -> None:
        self.executable = executable
        self.state_dir = state_dir

    async def version(self) -> str:
        """The first line of `--version`. Raises `RuntimeFailed`."""
        read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            code = await run_to_end(
                [self.executable, "--version"],
                fds={1: write_end, 2: write_end},
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
        self, oci_id: str, bundle: Path, *, log_file: Path, fds: Mapping[int, int], timeout_s: float
    ) -> None:
        """`run --detach`: create and start in one go.

        `fds`: number in the container -> our descriptor, from 0 on without gaps. The first
        process's parent is then the nearest subreaper. Raises `RuntimeFailed` with the
        runtime's words. When it raises or is cancelled the process may be there, and the
        runtime's state and control groups: the caller ends them.
        """
        code = await run_to_end(
            [
                *(*self._with_state(log_file), "run", "--detach", "--bundle", str(bundle)),
                *("--preserve-fds", str(len(fds) - STANDARD_FDS), oci_id),
            ],
            fds=fds,
            timeout_s=timeout_s,
        )
        if code:
            raise RuntimeFailed(
                f"container {oci_id}",
                f"{Path(self.executable).name} must be able to start it",
                actual=await trio.to_thread.run_sync(_words, log_file) or f"exit code {code}",
            )

    async def exec_detached(
        self, oci_id: str, folder: Path, *, fds: Mapping[int, int], timeout_s: float
    ) -> None:
        """`exec --detach`: one more process in a container, as `folder`/process.json says.

        `fds`: number in the container -> our descriptor, from 0 on without gaps. The process's
        parent is then the nearest subreaper. Raises `RuntimeFailed` with the runtime's words.
        When it raises or is cancelled the process may be there, and then its pid is in
        `folder`/pid: the caller ends it.
        """
        log_file = folder / "log"
        code = await run_to_end(
            [
                *(*self._with_state(log_file), "exec", "--detach"),
                *("--process", str(folder / "process.json"), "--pid-file", str(folder / "pid")),
                *("--preserve-fds", str(len(fds) - STANDARD_FDS), oci_id),
            ],
            fds=fds,
            timeout_s=timeout_s,
        )
        if code:
            raise RuntimeFailed(
                f"container {oci_id}",
                f"{Path(self.executable).name} must be able to run a command in it",
                actual=await trio.to_thread.run_sync(_words, log_file) or f"exit code {code}",
            )

    async def delete(self, oci_id: str, log_file: Path) -> None:
        """`delete --force`. Raises `RuntimeFailed`; that the container is unknown is no error."""
        code = await run_to_end(
            [*self._with_state(log_file), "delete", "--force", oci_id],
            fds={},
            timeout_s=COMMAND_TIMEOUT_S,
        )
        if code and (self.state_dir / oci_id).exists():
            raise RuntimeFailed(
                f"container {oci_id}",
                "the runtime must delete it",
                actual=await trio.to_thread.run_sync(_words, log_file) or f"exit code {code}",
            )

    def _with_state(self, log_file: Path) -> tuple[str, ...]:
        log = ("--log", str(log_file), "--log-format", "json")
        return (self.executable, "--root", str(self.state_dir), *log)


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
