"""The operator's machine: a software TD that can be booted, and the daemon inside it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

from stage import Argument, SceneFailed, Stage

PLUGINS = ("tdx_sim", "image_store", "csp_delegation", "oci_runtime", "http_api")


class Machine:
    """One software TD for the whole demo; each `boot` begins a new life of it."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.pki = stage.out / "simulator"
        self.config = stage.out / "acond.toml"
        self.write_config(self.config)
        self._td: subprocess.Popen[bytes] | None = None
        self._daemon: subprocess.Popen[bytes] | None = None

    def write_config(self, path: Path, *, more_plugins: Sequence[str] = (), more: str = "") -> None:
        order = ", ".join(f'"{name}"' for name in (*PLUGINS, *more_plugins))
        path.write_text(
            f'runtime_dir = "{self.stage.run_dir / "acond"}"\n{more}\n'
            f"[plugins]\norder = [{order}]\n\n"
            f'[plugin.tdx_sim]\nsocket = "{self.stage.td_socket}"\n\n'
            f'[plugin.http_api]\nsocket = "{self.stage.api}"\n'
        )

    def power_on(self) -> None:
        """Make the simulator's keys and start the software TD."""
        self.stage.acon("sim", "init", "--pki", self.pki)
        arguments: list[Argument] = [
            "sim",
            "run",
            "--pki",
            self.pki,
            "--td-socket",
            self.stage.td_socket,
        ]
        self._td = self.stage.start("td", "acon", *arguments, environment=None)
        for path in (self.stage.td_socket, self.stage.td_owner_socket):
            self.stage.wait_for_socket(path, self._td, "td")

    def boot(
        self, *, config: Path | None = None, environment: dict[str, str] | None = None
    ) -> None:
        """End the daemon, boot the TD (its registers fall to zero), start the daemon."""
        self.halt()
        self.stage.acon("sim", "boot", "--td-socket", self.stage.td_socket)
        arguments: list[Argument] = ["--config", config or self.config]
        self._daemon = self.stage.start("acond", "acond", *arguments, environment=environment)
        self.stage.wait_for_socket(self.stage.api, self._daemon, "acond")

    def halt(self) -> None:
        if self._daemon is not None:
            self.stage.stop(self._daemon)
            self._daemon = None

    def description(self) -> dict[str, object]:
        """What the base image measures to: the values its builder publishes."""
        done = self.stage.acon("sim", "boot", "--td-socket", self.stage.td_socket, "--json")
        value = done.json()
        if not isinstance(value, dict):
            raise SceneFailed("acon sim boot --json was to print an object")
        return value

    def identity(self) -> dict[str, object]:
        """What `Start` will hold: the values that the supervisor's builder publishes."""
        done = self.stage.command("acond", "--config", self.config, "--print-identity")
        (self.stage.out / "identity.json").write_text(done.out)
        value: dict[str, object] = json.loads(done.out)
        return value

    def load(self, bundles: Sequence[Argument], *, show: bool = False) -> None:
        self.stage.acon("load", *bundles, show=show)

    def start(self, names: Sequence[str], *, show: bool = False) -> None:
        for name in names:
            self.stage.acon("start", name, show=show)

    def evidence(self, nonce: str, name: str) -> Path:
        path = self.stage.out / "evidence" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        self.stage.acon("evidence", "--nonce", nonce, "-o", path)
        return path
