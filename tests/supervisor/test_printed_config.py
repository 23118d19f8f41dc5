"""What `acond --print-config` prints is a configuration, and the same one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CONFIG = """\
[plugins]
order = ["image_store", "csp_delegation", "http_api"]

[plugin.http_api]
request_deadline_s = 7.5
"""
TIMEOUT_S = 120


def acond(*arguments: str) -> str:
    """What the daemon prints when asked to print and end."""
    done = subprocess.run(
        [sys.executable, "-m", "supervisor.daemon", *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_printed_configuration_can_be_read_back_and_means_the_same(tmp_path: Path) -> None:
    written = tmp_path / "written.toml"
    written.write_text(CONFIG)
    printed = acond("--config", str(written), "--print-config")
    assert "request_deadline_s = 7.5\n" in printed
    complete = tmp_path / "complete.toml"
    complete.write_text(printed)
    assert acond("--config", str(complete), "--print-config") == printed
    identities = {acond("--config", str(path), "--print-identity") for path in (written, complete)}
    assert len(identities) == 1
