"""Debian's `docker-registry` on a free loopback port, as a process that ends with its user."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from benchmarks.figures import CannotMeasure

START_TIMEOUT_S = 30
STOP_TIMEOUT_S = 15
POLL_S = 0.01


@contextmanager
def running_registry(
    folder: Path,
    *,
    http: Mapping[str, object] | None = None,
    auth: Mapping[str, object] | None = None,
) -> Iterator[str]:
    """Its name, "127.0.0.1:PORT", once it listens. All its files lie below `folder`.

    `http` and `auth` are more of its configuration's tables of these names. It ends with the
    body, and with this process if that is killed. Raises `CannotMeasure` if it is not
    installed or does not start.
    """
    if shutil.which("docker-registry") is None:
        raise CannotMeasure("docker-registry (Debian: docker-registry) is not installed")
    storage = folder / "storage"
    storage.mkdir(parents=True)
    config: dict[str, object] = {
        "version": "0.1",
        "log": {"level": "info"},
        "storage": {"filesystem": {"rootdirectory": str(storage)}, "delete": {"enabled": True}},
        # The registry takes a port of the kernel's choice and says in its log which.
        "http": {"addr": "127.0.0.1:0", "secret": "of-this-process", **(http or {})},
    }
    if auth is not None:
        config["auth"] = dict(auth)
    config_file, log = folder / "registry.yml", folder / "registry.log"
    config_file.write_text(json.dumps(config))  # JSON is YAML too
    with _process(config_file, log) as process:
        yield _name_when_ready(process, log)


@contextmanager
def _process(config_file: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    # Settings of the environment would win over the file's.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("REGISTRY_", "OTEL_"))}
    with log.open("wb") as words:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "docker-registry", "serve", config_file],
            stdin=subprocess.DEVNULL,
            stdout=words,
            stderr=words,
            env=environment,
            start_new_session=True,  # Ctrl-C is for its user, who then ends it
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _name_when_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        said = log.read_text(errors="replace")
        listening = re.search(r"listening on (127\.0\.0\.1:\d+)", said)
        if listening is not None:
            return listening[1]
        if process.poll() is not None or time.monotonic() > deadline:
            raise CannotMeasure(f"docker-registry did not get ready: {said[-2000:]}")
        time.sleep(POLL_S)
