"""What `acond` refuses before anything runs, and what must not end it."""

from __future__ import annotations

import resource
import socket
from pathlib import Path

import pytest
import structlog.testing

from supervisor import daemon, ram, runtime_dir

SWAPS = "Filename\tType\tSize\tUsed\tPriority\n/swapfile file 1024 0 -2\n"


def configured(folder: Path, settings: str = "") -> list[str]:
    file = folder / "acond.toml"
    file.write_text(
        f'runtime_dir = "{folder / "run"}"\n{settings}\n[plugins]\norder = ["csp_delegation"]\n'
    )
    return ["--config", str(file)]


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the two checks ran; logging stays as the tests have it."""
    ran: list[str] = []

    def run(config: object, host: object) -> int:
        ran.append("run")
        return 0

    monkeypatch.setattr(daemon, "refuse_active_swap", lambda: ran.append("swap"))
    monkeypatch.setattr(runtime_dir, "refuse_disk", lambda path: ran.append(f"disk {path.name}"))
    monkeypatch.setattr(daemon, "_run", run)
    monkeypatch.setattr(daemon, "_configure_logging", lambda level: None)
    return ran


def test_swap_and_disk_are_ruled_out_before_anything_runs(
    tmp_path: Path, checks: list[str]
) -> None:
    assert daemon.main(configured(tmp_path)) == 0
    assert checks == ["disk run", "swap", "run"]


def test_only_the_unsafe_settings_leave_the_checks_out(tmp_path: Path, checks: list[str]) -> None:
    settings = "unsafe_allow_swap = true\nunsafe_allow_runtime_dir_on_disk = true\n"
    assert daemon.main(configured(tmp_path, settings)) == 0
    assert checks == ["run"]


def test_active_swap_ends_acond_with_its_name(
    tmp_path: Path,
    checks: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    table = tmp_path / "swaps"
    table.write_text(SWAPS)
    monkeypatch.setattr(daemon, "refuse_active_swap", lambda: ram.refuse_active_swap(table))
    assert daemon.main(configured(tmp_path)) == daemon.EXIT_USAGE
    assert "/swapfile" in capsys.readouterr().err
    assert "run" not in checks


def test_a_service_manager_is_told_and_one_that_is_gone_harms_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "notify"
    monkeypatch.setenv("NOTIFY_SOCKET", str(path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        daemon._tell_service_manager("READY=1")
        assert manager.recv(100) == b"READY=1"
    daemon._tell_service_manager("READY=1")  # nobody listens any more
    path.unlink()
    daemon._tell_service_manager("READY=1")


def test_the_daemon_may_hold_as_many_descriptors_as_the_machine_lets_it() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before[1] // 2, before[1]))
        with structlog.testing.capture_logs() as logs:
            daemon._raise_descriptor_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
        assert [(one["limit_before"], one["limit"]) for one in logs] == [
            (before[1] // 2, before[1])
        ]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
