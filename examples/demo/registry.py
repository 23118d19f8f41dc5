"""Somebody's registry: Debian's docker-registry on loopback, its files in the demo's folder."""

from __future__ import annotations

import json
import re
import shutil
import time

from stage import BIN, READY_TIMEOUT_S, SceneFailed, Stage

PROGRAM = "docker-registry"


class Registry:
    """Runs until the stage is closed.

    It speaks plain HTTP, as loopback may: what comes from it is trusted for nothing anyway.
    """

    def __init__(self, stage: Stage) -> None:
        if shutil.which(PROGRAM) is None and not (BIN / PROGRAM).exists():
            raise SceneFailed(f"{PROGRAM} is not here; ./run demo fetches it, and says why not")
        config = stage.out / "registry.yml"
        config.write_text(  # JSON is YAML too
            json.dumps(
                {
                    "version": "0.1",
                    "log": {"level": "info"},
                    "storage": {"filesystem": {"rootdirectory": str(stage.out / "registry")}},
                    "http": {"addr": "127.0.0.1:0", "secret": "demo"},
                }
            )
        )
        process = stage.start("registry", PROGRAM, "serve", config, environment=None)
        log = stage.log("registry")
        deadline = time.monotonic() + READY_TIMEOUT_S
        while True:
            # It takes a port of the kernel's choice and says which.
            listening = re.search(r"listening on (127\.0\.0\.1:\d+)", log.read_text())
            if listening is not None:
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise SceneFailed(f"the registry did not get ready; see {log}")
            time.sleep(0.02)
        self.name = listening[1]

    def reference(self, repository: str, tag: str = "1") -> str:
        """As `acon` takes it."""
        return f"docker://{self.name}/{repository}:{tag}"
