"""A software TD and the daemon inside it, as processes that end with the benchmark."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from benchmarks.figures import CannotMeasure
from plugins.tdx_sim.client import boot
from plugins.tdx_sim.wire import owner_socket_path

BIN = Path(sys.executable).parent
PLUGINS = ("tdx_sim", "image_store", "csp_delegation", "oci_runtime", "http_api")
READY_TIMEOUT_S = 60
STOP_TIMEOUT_S = 120
POLL_S = 0.001
_REQUEST = b"GET /api/v2/images HTTP/1.1\r\nHost: acond\r\nConnection: close\r\n\r\n"


class Machine:
    """Everything lies below `folder`, whose owner removes it. Use with `with`.

    `settings` are more tables of the daemon's configuration, TOML.
    """

    def __init__(self, folder: Path, *, settings: str = "") -> None:
        self.folder = folder
        self._settings = settings
        self.pki = folder / "pki"
        self.td_socket = folder / "td" / "td.sock"
        self.api = folder / "api.sock"
        self.runtime_dir = folder / "acond"
        self._td: subprocess.Popen[bytes] | None = None
        self._daemon: subprocess.Popen[bytes] | None = None

    @property
    def runtime_files(self) -> Path:
        """Where the daemon's `oci_runtime` has its bundles and its runtime's state."""
        return self.runtime_dir / "plugins" / "oci_runtime"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.halt()
        finally:
            if self._td is not None:
                _stop(self._td)

    def power_on(self) -> None:
        """Make the simulator's keys and start the software TD; returns once it answers."""
        subprocess.run(
            [BIN / "acon", "sim", "init", "--pki", self.pki],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        self._td = self._start(
            "td", "acon", "sim", "run", "--pki", self.pki, "--td-socket", self.td_socket
        )
        # The last of its two sockets.
        last = owner_socket_path(self.td_socket)
        _wait_until(lambda: _accepts(last), self._td, self.folder / "td.log")
        self._write_config()

    def boot(self) -> None:
        """Let the TD's registers fall to zero; the daemon must not run."""
        boot(self.td_socket)

    def start_daemon(self) -> subprocess.Popen[bytes]:
        """Run `acond`; returns once its API has answered a request."""
        self._daemon = self._start("acond", "acond", "--config", self._config)
        _wait_until(self._answers, self._daemon, self.folder / "acond.log")
        return self._daemon

    @property
    def _config(self) -> Path:
        return self.folder / "acond.toml"

    def _write_config(self) -> None:
        order = ", ".join(f'"{name}"' for name in PLUGINS)
        self._config.write_text(
            f'runtime_dir = "{self.runtime_dir}"\n'
            f"unsafe_allow_swap = true\n"  # the benchmark may run where swap is on
            f"[plugins]\norder = [{order}]\n"
            f'[plugin.tdx_sim]\nsocket = "{self.td_socket}"\n'
            f'[plugin.http_api]\nsocket = "{self.api}"\n'
            f"{self._settings}"
        )

    def halt(self) -> int | None:
        """End the daemon, and with it its containers; its exit code, None if there was none."""
        daemon, self._daemon = self._daemon, None
        return None if daemon is None else _stop(daemon)

    def _start(self, name: str, program: str, *arguments: str | Path) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [BIN / program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches the benchmark alone, which then cleans up
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(READY_TIMEOUT_S)
            try:
                connection.connect(str(self.api))
                connection.sendall(_REQUEST)
                return connection.recv(64).startswith(b"HTTP/1.1 200")
            except (FileNotFoundError, ConnectionError):
                return False


def _accepts(path: Path) -> bool:
    """A socket's file is there a moment before anybody listens."""
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(str(path))
        except (FileNotFoundError, ConnectionError):
            return False
        return True


def _wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            raise CannotMeasure(f"{log.stem} did not get ready: {log.read_text()[-2000:]}")
        time.sleep(POLL_S)


def _stop(process: subprocess.Popen[bytes]) -> int:
    """SIGTERM and time to clean up; SIGKILL only if that was not enough. The exit code."""
    process.send_signal(signal.SIGTERM)
    try:
        return process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
