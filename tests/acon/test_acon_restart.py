"""`acon restart` against the real HTTP server."""

from __future__ import annotations

import json

import pytest
from acon_daemon import Daemon

from supervisor import Conflict, DeadlineExceeded, PolicyDenied, Refusal


async def test_a_container_is_started_again(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await daemon.acon("restart", "1") == 0
    assert await daemon.acon("restart", "1", "--timeout", "60") == 0
    assert daemon.operations.restarts == [(1, 30), (1, 60)]
    assert "container 1 runs again (restarts: 2)" in capsys.readouterr().out


async def test_json_is_the_container_as_it_is_now(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await daemon.acon("restart", "1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["restarts"] == 2


@pytest.mark.parametrize("kind", [PolicyDenied, DeadlineExceeded, Conflict])
async def test_a_refused_restart_is_a_failure_with_its_reason(
    daemon: Daemon, kind: type[Refusal], capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.operations.refusal = kind("container 1", "must end", expected="30 s")
    assert await daemon.acon("restart", "1") == 1
    assert "container 1: must end; expected 30 s" in capsys.readouterr().err


@pytest.mark.parametrize("timeout", ["-1", "0", "1.5", "soon"])
async def test_a_timeout_that_is_none_is_wrong_usage(daemon: Daemon, timeout: str) -> None:
    assert await daemon.acon("restart", "1", f"--timeout={timeout}") == 2
    assert daemon.operations.restarts == []
