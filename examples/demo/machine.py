"""The operator's machine: a software TD that can be booted, and the daemon inside it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

from registry import Registry
from stage import Argument, SceneFailed, Stage

PLUGINS = ("tdx_sim", "image_store", "csp_delegation", "oci_runtime", "http_api")


class Machine:
    """One software TD for the whole demo; each `boot` begins a new life of it."""

    def __init__(self, stage: Stage, registry: Registry, layouts: Path) -> None:
        self.stage = stage
        self._registry = registry
        self._layouts = layouts
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
            f'[plugin.http_api]\nsocket = "{self.stage.api}"\n\n'
            f'[plugin.image_store]\nfile_roots = ["{self._layouts}"]\n\n'
            f'[plugin.image_store.registries."{self._registry.name}"]\n'
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

    def load(self, items: Sequence[Argument], *, show: bool = False) -> None:
        """Bundles' folders and images in registries; the daemon fetches the layers itself."""
        done = self.stage.acon("load", *items, "--json", show=show)
        events = [json.loads(line) for line in done.out.splitlines()]
        layers = [event for event in events if event["event"] == "layer"]
        fetched = [event for event in layers if event.get("how") == "fetched"]
        if len(fetched) != len(layers):
            raise SceneFailed(f"the daemon was to fetch every layer itself:\n{done.out}")
        if show:
            self.stage.say(f"  {len(fetched)} layers, fetched by the daemon and verified")

    def start(self, names: Sequence[str], *, show: bool = False) -> None:
        for name in names:
            self.stage.acon("start", name, show=show)

    def evidence(self, nonce: str, name: str, *, show: bool = False) -> Path:
        path = self.stage.out / "evidence" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        self.stage.acon("evidence", "--nonce", nonce, "-o", path, show=show)
        return path
