"""The demo itself, as a newcomer sees it: with real containers, packages and attacks.

It listens on a fixed port of the machine, so only one demo runs at a time (`alone`).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from plugins.oci_runtime.hierarchies import visible_hierarchies

pytestmark = pytest.mark.root

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo" / "demo.py"
# Packages are downloaded the first time; only a hang takes so long.
PATIENCE_S = 900
SCENES = (
    "1. Two owners and a cloud provider (CSP) make and sign images",
    "2. Before anything boots: what will the register hold?",
    "3. The relying party writes its policy, from a rehearsal that it compares",
    "4. The operator boots a TD, loads the images as a group, seals, starts",
    "5. The relying party verifies offline, then sends a patient's record",
    "6. The operator looks after the containers, as far as their owners allow",
    "7. The CSP updates the interpreter; the owners sign nothing",
    "8. The relying party verifies offline, with the same policy as before, then sends",
    "9. Attacks: each is refused, or exposed by the verdict",
)
# What the operator is shown, and what is not granted.
OPERATED = (
    "audit: entry 1",
    "its manifest does not list this signal; expected -15, got 9",
    "only entry points that begin with A to Z can be invoked from outside",
    "container 5 runs again (restarts: 1)",
    "container 5 says of itself, which nobody checked:",
    "a restart is not in the log, RTMR[3] is what it was",
)
# Each attack of the project's promise, as its line begins, and how the line goes on.
ATTACKS = {
    "a sixth image side-loaded before the seal": "refused",
    "the same among owners who do not reject it": "verdict FAILED",
    "a program of eve's that writes to the register": "refused",
    "the same, giving orders to the supervisor": "refused",
    "an image loaded after the seal": "refused",
    "one changed byte in a layer": "refused",
    "the CSP's older interpreter, python:1": "refused",
    "python:3 signed by another key": "refused",
    "a program signed by the CSP": "refused",
    "a supervisor with one plugin more": "verdict FAILED",
    "a supervisor with one unsafe_ setting more": "verdict FAILED",
    "an event dropped from the log": "verdict FAILED",
    "an event moved in the log": "verdict FAILED",
    "evidence replayed for another nonce": "verdict FAILED",
    "a proxy with its own key before the gateway": "verdict FAILED",
    "a simulator's quote shown to one who trusts only Intel": "verdict FAILED",
}


@pytest.fixture
def alone() -> Iterator[None]:
    """Holds the demo's port against other test runs of this machine."""
    path = Path(tempfile.gettempdir(), "acon-demo-test.lock")
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Downloaded packages; skips, visibly, where the distribution's archive is out of reach."""
    given = os.environ.get("ACON_DEMO_CACHE")
    folder = Path(given) if given else tmp_path_factory.mktemp("demo-cache")
    if not any(folder.glob("archives/*.deb")):
        probe = tmp_path_factory.mktemp("probe")
        command = ["apt-get", "download", "-o", "APT::Sandbox::User=root", "busybox-static"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=probe)
        if done.returncode != 0:
            pytest.skip(f"apt downloads nothing, ACON_DEMO_CACHE is empty: {done.stderr[-300:]}")
    return folder


def start(out: Path, cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, DEMO, "--out", out, "--cache", cache],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def remains(out: Path) -> set[str]:
    """What is there of the demo that wrote `out`: folder, mounts, control groups, processes."""
    runtime_dir = Path(tomllib.loads((out / "acond.toml").read_text())["runtime_dir"])
    run_dir = runtime_dir.parent
    assert run_dir.name.startswith("acon-demo-")
    # As the container runtime names its groups: after its folder.
    own_folder = str(runtime_dir / "plugins" / "oci_runtime")
    group = f"acond-{hashlib.sha256(own_folder.encode()).hexdigest()[:12]}"
    mountinfo = Path("/proc/self/mountinfo").read_text()
    groups = (one.mount_point / group for one in visible_hierarchies())
    found = {f"group {path}" for path in groups if path.exists()}
    if run_dir.exists():
        found.add(f"folder {run_dir}")
    if f"{run_dir}/" in mountinfo:
        found.add("mounts")
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if os.fsencode(run_dir) in line or os.fsencode(out / "acond.toml") in line:
                found.add(f"process {entry.name} {line!r}")
    return found


def container_processes() -> set[int]:
    """The demo's programs, wherever they run."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if b"/app/gateway.py" in (entry / "cmdline").read_bytes():
                    found.add(int(entry.name))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


def test_every_scene_comes_out_as_it_should(alone: None, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    demo = start(out, cache)
    said, _ = demo.communicate(timeout=PATIENCE_S)
    assert demo.returncode == 0, said
    transcript = (out / "transcript.txt").read_text()
    assert transcript == said
    places = [transcript.find(f" {scene}") for scene in SCENES]
    assert -1 not in places and places == sorted(places), transcript
    assert transcript.count("VERDICT: PASSED (SIMULATION)") == 3
    operated = transcript[places[5] : places[6]]
    for line in OPERATED:
        assert line in operated, operated
    for attack, outcome in ATTACKS.items():
        (line,) = re.findall(rf"^  {re.escape(attack)}\b.*$", transcript, re.MULTILINE)
        assert re.search(rf"  {outcome}\b", line), line
    assert f"{len(ATTACKS)} attacks, none succeeded" in transcript
    # The daemon fetched layers from the registry, others from files.
    assert re.search(
        r'"GET /v2/clinic/gateway/blobs/\S+ HTTP', (out / "logs/registry.log").read_text()
    )
    assert "layers, fetched by the daemon and verified" in transcript
    # What it promised to leave, and nothing else.
    for name in ("policy.toml", "verdict-python-2.txt", "verdict-python-3.txt"):
        assert (out / name).stat().st_size > 0
    assert len(list((out / "evidence").glob("*.json"))) > 2
    assert remains(out) == set()


def test_an_interrupted_demo_leaves_nothing_behind(
    alone: None, cache: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    demo = start(out, cache)
    try:
        transcript = out / "transcript.txt"
        deadline = time.monotonic() + PATIENCE_S
        # The gateway runs, and the relying party is about to speak with it.
        while not (transcript.is_file() and "5. The relying party" in transcript.read_text()):
            assert demo.poll() is None, demo.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        kinds = {one.split()[0] for one in remains(out)}
        assert kinds == {"group", "folder", "mounts", "process"}
        containers = container_processes()
        assert containers
        demo.send_signal(signal.SIGINT)
        said, _ = demo.communicate(timeout=PATIENCE_S)
    finally:
        if demo.poll() is None:
            demo.terminate()
            demo.communicate()
    assert demo.returncode not in (0, 1), said
    assert "interrupted; cleaning up" in said
    assert not containers & container_processes()
    assert remains(out) == set()
