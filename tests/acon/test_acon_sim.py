"""`acon sim`: keys, collateral, and a process whose registers fall to zero when booted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from acon_helpers import Acon

from plugins.tdx_sim.client import SimRegisters, describe


@contextmanager
def running(pki: Path, socket: Path) -> Iterator[subprocess.Popen[str]]:
    """`acon sim run` as a process of its own; ended and waited for at the end."""
    command = [sys.executable, "-m", "acon.cli", "sim", "run", "--pki", str(pki), "--json"]
    with subprocess.Popen(
        [*command, "--td-socket", str(socket)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            deadline = time.monotonic() + 30
            while not socket.exists() and time.monotonic() < deadline:
                assert process.poll() is None
                time.sleep(0.05)
            yield process
        finally:
            process.kill()


def test_init_makes_a_root_once_and_root_prints_it(
    tmp_path: Path, acon: Acon, capsys: pytest.CaptureFixture[str]
) -> None:
    pki = tmp_path / "pki"
    assert acon("sim", "root", "--pki", pki) == 2
    assert acon("sim", "init", "--pki", pki) == 0
    assert acon("sim", "init", "--pki", pki) == 0
    capsys.readouterr()
    assert acon("sim", "root", "--pki", pki) == 0
    assert capsys.readouterr().out == (pki / "root.pem").read_text()


def test_collateral_is_issued_for_the_time_that_is_asked_for(tmp_path: Path, acon: Acon) -> None:
    pki, output = tmp_path / "pki", tmp_path / "collateral.json"
    assert acon("sim", "init", "--pki", pki) == 0
    make = ("sim", "collateral", "--pki", pki, "-o", output, "--at")
    assert acon(*make, "2026-03-05T12:00:00Z") == 0
    tcb_info = json.loads(json.loads(output.read_text())["tcb_info"])
    assert tcb_info["issueDate"] == "2026-03-05T12:00:00Z"
    issued = datetime(2026, 3, 5, 12, tzinfo=UTC)
    assert datetime.fromisoformat(tcb_info["nextUpdate"]) == issued + timedelta(days=30)
    assert acon(*make, "2026-03-05T12:00:00") == 2
    assert acon(*make, "yesterday") == 2


def test_a_running_td_keeps_its_registers_until_it_is_booted_and_ends_on_sigterm(
    tmp_path: Path, acon: Acon, capsys: pytest.CaptureFixture[str]
) -> None:
    socket = tmp_path / "td" / "td.sock"
    with running(tmp_path / "pki", socket) as process:
        registers = SimRegisters(socket, 3, timeout_s=5)
        registers.extend(b"\x01" * 48)
        assert registers.read() != bytes(48)
        base = describe(socket)
        assert acon("sim", "boot", "--td-socket", socket, "--kernel", "another", "--json") == 0
        booted = json.loads(capsys.readouterr().out)
        assert registers.read() == bytes(48)
        assert booted["boots"] == 2
        assert booted["base_image"]["kernel"] == "another"
        assert booted["rtmrs"][1] != base.rtmrs[1]
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(10) == 0
    assert not socket.exists()


def test_a_second_td_at_the_same_place_is_refused(tmp_path: Path, acon: Acon) -> None:
    socket = tmp_path / "td.sock"
    with running(tmp_path / "pki", socket):
        command = ("sim", "run", "--pki", tmp_path / "pki", "--td-socket", socket)
        done = subprocess.run(
            [sys.executable, "-m", "acon.cli", *map(str, command)],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == 1
        assert "already" in done.stderr


def test_booting_a_td_that_does_not_run_fails(tmp_path: Path, acon: Acon) -> None:
    assert acon("sim", "boot", "--td-socket", tmp_path / "absent.sock") == 1
