"""Load, seal, start, evidence, verdict: with the commands that people use."""

from __future__ import annotations

import json
import secrets
import signal
from pathlib import Path

import pytest
from integration_images import Image, ImageMaker
from integration_machine import Machine, is_alive, wait_until

pytestmark = pytest.mark.root

# Asked to end, it says so and waits to be let go; then it ends with a status of its own.
WAITS_TO_BE_LET_GO = """\
trap 'touch_ asked; while ! test -e /shared/go; do sleep 0.1; done; exit 7' TERM
touch_() { : > /shared/$1; }
touch_ ready
while :; do sleep 1 & wait $!; done
"""
NEVER_ENDS = """\
trap '' TERM
: > /shared/ready
while :; do sleep 1; done
"""


def test_an_image_is_loaded_sealed_started_and_verified_by_the_commands(
    machine: Machine, images: ImageMaker, tmp_path: Path
) -> None:
    key, certificate = images.signer("shop owner")
    source = images.layout("shop", "trap 'exit 0' TERM\nwhile :; do sleep 1 & wait $!; done\n")
    bundle = tmp_path / "shop"
    machine.acon("image", "convert", source, "-o", bundle, "--name", "shop:1", "--signal", "15")
    machine.acon("image", "sign", bundle, "--key", key, "--cert", certificate)
    identity = tmp_path / "identity.json"
    identity.write_text(machine.acond("--config", machine.config, "--print-identity").stdout)
    plan = json.loads(machine.acon("plan", bundle, "--identity", identity, "--json"))
    machine.start_daemon()

    machine.acon("load", bundle)
    machine.acon("seal")
    machine.acon("start", "shop")
    nonce = secrets.token_hex(32)
    evidence, policy, collateral = (tmp_path / name for name in ("e.json", "p.toml", "c.json"))
    machine.acon("evidence", "--nonce", nonce, "-o", evidence)
    machine.acon("sim", "collateral", "--pki", machine.pki, "-o", collateral)
    machine.acon("policy", "init", evidence, "-o", policy, "--collateral", collateral)
    verify = ["verify", evidence, "--policy", policy, "--collateral", collateral]
    verify += ["--trust-simulated-root", machine.pki / "root.pem"]
    text = machine.acon(*verify, "--nonce", nonce)
    assert "PASSED (SIMULATION)" in text
    machine.acon(*verify, "--nonce", secrets.token_hex(32), expect=1)
    # What `acon plan` predicted is in the register, and in the log that the evidence holds.
    shown = json.loads(machine.acon("log", "show", evidence, "--json"))
    assert shown["register"] == plan["rtmr3"] == machine.register().hex()
    assert [record["operation"] for record in shown["records"]] == [
        "Start",
        "AdmitImages",
        "Seal",
        "StartContainer",
    ]
    (listed,) = json.loads(machine.acon("ps", "--json"))["containers"]
    assert listed["state"] == "running"
    assert Path(f"/proc/{listed['pid']}/cmdline").read_bytes() == b"/bin/sh\0/app/main.sh\0"


def test_sigterm_ends_the_containers_first_and_then_the_daemon(
    machine: Machine, images: ImageMaker
) -> None:
    image = images.make("waits-to-be-let-go", WAITS_TO_BE_LET_GO)
    machine.write_config(more="[containers]\nstop_timeout_s = 600")
    machine.start_daemon()
    machine.load(image)
    pid = machine.start(image).pid
    assert pid is not None and machine.daemon is not None
    shared = Path(f"/proc/{pid}/root/shared")
    wait_until((shared / "ready").exists, "a container that has set its trap")

    machine.daemon.send_signal(signal.SIGTERM)
    wait_until((shared / "asked").exists, "a container that was asked to end")
    # As long as it takes its time the daemon waits for it, which it says it will.
    assert is_alive(pid) and machine.daemon.poll() is None
    (shared / "go").touch()
    assert machine.stop_daemon() == 0
    assert not is_alive(pid)
    assert machine.log_events("stopped")
    machine.require_nothing_left()


def test_a_container_that_ignores_sigterm_is_killed_when_its_time_is_up(
    machine: Machine, images: ImageMaker
) -> None:
    image = images.make("never-ends", NEVER_ENDS)
    machine.write_config(more="[containers]\nstop_timeout_s = 1")
    machine.start_daemon()
    machine.load(image)
    pid = machine.start(image).pid
    assert pid is not None
    wait_until(Path(f"/proc/{pid}/root/shared/ready").exists, "a container that ignores SIGTERM")
    assert machine.stop_daemon() == 0
    assert not is_alive(pid)
    machine.require_nothing_left()


def test_a_second_daemon_is_refused_while_the_first_lives(
    machine: Machine, patient: Image, other: Image
) -> None:
    machine.start_daemon()
    machine.load(patient)
    pid = machine.start(patient).pid
    assert pid is not None
    register = machine.register()

    second = machine.acond("--config", machine.config)

    assert second.returncode == 1
    refusal = json.loads(second.stderr.splitlines()[-1])
    assert "another supervisor" in refusal["reason"]
    assert str(machine.runtime_dir) in refusal["reason"]
    # It neither measured, ended nor cleaned up anything of the first one's.
    assert is_alive(pid)
    assert machine.register() == register
    assert [one.state for one in machine.containers()] == ["running"]
    machine.load(other)
    machine.start(other)
    machine.require_agreement()
