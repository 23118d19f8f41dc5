"""The stage: one folder, the processes that act on it, and everything that must go at the end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO, TypeAlias

Argument: TypeAlias = str | Path
BIN = Path(sys.executable).parent
COMMAND_TIMEOUT_S = 300
READY_TIMEOUT_S = 60
STOP_TIMEOUT_S = 60


class SceneFailed(Exception):
    """A scene did not come out as it should; its text says what was expected."""


class Done:
    """What a command said: its exit code and both streams."""

    def __init__(self, completed: subprocess.CompletedProcess[str]) -> None:
        self.code = completed.returncode
        self.out = completed.stdout
        self.said = (completed.stdout + completed.stderr).strip()

    def json(self) -> object:
        return json.loads(self.out)


class Stage:
    """Everything lies below `out` (kept) and `run` (short paths for sockets; removed)."""

    def __init__(self, out: Path, transcript: TextIO) -> None:
        self.out = out
        self.run_dir = Path(tempfile.mkdtemp(prefix="acon-demo-", dir="/run"))
        # The daemon wants its folder in RAM, and /run is a tmpfs on most machines, not on all.
        mount = ["mount", "-t", "tmpfs", "-o", "mode=711", "acon-demo", str(self.run_dir)]
        subprocess.run(mount, check=True, capture_output=True)
        self._transcript = transcript
        self._processes: list[tuple[str, subprocess.Popen[bytes]]] = []
        self._logs = out / "logs"
        self._logs.mkdir(parents=True, exist_ok=True)

    # --- what the audience sees -----------------------------------------------------------

    def say(self, text: str = "") -> None:
        """A line on the terminal and in the transcript."""
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
        self._transcript.write(text + "\n")
        self._transcript.flush()

    def scene(self, title: str) -> None:
        self.say()
        self.say(f"== {title}")

    # --- commands -------------------------------------------------------------------------

    def acon(self, *arguments: Argument, expect: int | None = 0, show: bool = False) -> Done:
        """Run `acon`; with `expect`, any other exit code fails the scene."""
        return self.command("acon", *arguments, expect=expect, show=show)

    def command(
        self,
        program: str,
        *arguments: Argument,
        expect: int | None = 0,
        show: bool = False,
        environment: dict[str, str] | None = None,
    ) -> Done:
        """Run one of the project's commands, or a program of the system."""
        ours = BIN / program
        line = [str(ours if ours.exists() else program), *map(str, arguments)]
        if show:
            self.say("  $ " + " ".join([program, *map(self.short, arguments)]))
        done = Done(
            subprocess.run(
                line,
                capture_output=True,
                text=True,
                timeout=COMMAND_TIMEOUT_S,
                check=False,
                env={**os.environ, "ACON_SOCKET": str(self.api), **(environment or {})},
            )
        )
        if expect is not None and done.code != expect:
            raise SceneFailed(
                f"{' '.join(line)}\nwas to end with {expect}, not {done.code}:\n{done.said}"
            )
        return done

    def short(self, argument: str | Path) -> str:
        """Paths below the demo's folders, without them; long digests cut."""
        text = str(argument).replace(f"{self.out}/", "").replace(f"{self.run_dir}/", "")
        return text if len(text) < 100 else text[:60] + "…"

    # --- processes ------------------------------------------------------------------------

    @property
    def api(self) -> Path:
        return self.run_dir / "acond" / "api.sock"

    @property
    def td_socket(self) -> Path:
        return self.run_dir / "td" / "td.sock"

    @property
    def td_owner_socket(self) -> Path:
        """Where the software TD is booted: the machine's owner's, not the guest's."""
        return self.td_socket.with_name("td.sock.owner")

    def start(
        self, name: str, program: str, *arguments: Argument, environment: dict[str, str] | None
    ) -> subprocess.Popen[bytes]:
        """Start a process of the stage; its output goes to `logs/NAME.log`."""
        ours = BIN / program
        with self.log(name).open("ab") as log:
            process = subprocess.Popen(
                [str(ours if ours.exists() else program), *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches this script alone, which then cleans up
                env={**os.environ, **(environment or {})},
            )
        self._processes.append((name, process))
        return process

    def log(self, name: str) -> Path:
        """What a process of the stage said."""
        return self._logs / f"{name}.log"

    def wait_for_socket(self, path: Path, process: subprocess.Popen[bytes], name: str) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not path.is_socket():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SceneFailed(f"{name} did not get ready; see {self.log(name)}")
            time.sleep(0.02)

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        """SIGTERM, then time to clean up; SIGKILL only if that was not enough."""
        self._processes = [entry for entry in self._processes if entry[1] is not process]
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def close(self) -> None:
        """Stop what still runs, newest first, and check that nothing is left."""
        for _, process in reversed(self._processes.copy()):
            self.stop(process)
        left = [f"process {line}" for line in _processes_naming(self.run_dir)]
        mounts = [line.split()[1] for line in _mounts() if str(self.run_dir) in line]
        left += [f"mount {path}" for path in mounts if path != str(self.run_dir)]
        for path in reversed(mounts):
            subprocess.run(["umount", "--lazy", path], check=False, capture_output=True)
        shutil.rmtree(self.run_dir, ignore_errors=True)
        if left:
            raise SceneFailed("something was left: " + ", ".join(left))


def indented(text: str) -> str:
    """What a command printed, as the transcript shows it."""
    return "\n".join("    " + line for line in text.rstrip().splitlines())


def _processes_naming(folder: Path) -> list[str]:
    """Command lines of other processes in which the folder occurs."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if str(folder) in line and int(entry.name) != os.getpid():
                found.append(f"{entry.name} {line.strip()}")
    return found


def _mounts() -> list[str]:
    return Path("/proc/self/mounts").read_text().splitlines()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM ends the demo as Ctrl-C does: through every `finally`.

    By way of SIGINT, which trio turns into an orderly end of what runs under it.
    """

    def stop(_signum: int, _frame: object) -> None:
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGTERM, stop)
    # A shell starts background jobs with SIGINT ignored.
    before_interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, before_interrupt)
