"""`acon doctor`: what it tries, what it says of each runtime, and that it leaves nothing."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from acon_helpers import Acon
from control_group_views import groups_called, machine_is_hybrid, run_in_view

from acon import machine, runtime_trial
from acon.finding import Finding
from plugins.oci_runtime.probe import CANDIDATES

OK = Finding("one", "ok", "found")
ABSENT = Finding("two", "absent", "not there", "get one")
MISSING = Finding("three", "missing", "broken", "mend it")


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, str]]:
    findings = json.loads(capsys.readouterr().out)["findings"]
    return {one["subject"]: one for one in findings}


@pytest.mark.parametrize(
    ("findings", "code"), [([OK], 0), ([OK, ABSENT], 0), ([OK, MISSING, ABSENT], 1)]
)
def test_the_exit_code_says_whether_anything_is_missing(
    acon: Acon,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    findings: list[Finding],
    code: int,
) -> None:
    monkeypatch.setattr(machine, "examine", lambda: findings)
    assert acon("doctor", "--json") == code
    answer = json.loads(capsys.readouterr().out)
    assert answer["passed"] is (code == 0)
    assert [one["state"] for one in answer["findings"]] == [one.state for one in findings]
    assert acon("doctor") == code
    lines = capsys.readouterr().out.splitlines()
    for one in findings:
        at = lines.index(f"{one.state:8} {one.subject}: {one.found}")
        # What is well needs no advice.
        assert one.state == "ok" or lines[at + 1].strip() == one.remedy


def test_without_root_nothing_is_tried_and_that_is_said(
    acon: Acon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    acon("doctor", "--json")
    found = told(capsys)
    for subject in ("user namespaces", "overlay", "layers", "control groups", "container runtime"):
        assert found[subject]["state"] == "untried"
        assert found[subject]["remedy"] == "sudo acon doctor"


@pytest.mark.root
def test_what_the_machine_has_is_found_and_nothing_is_left(
    acon: Acon, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = set(os.listdir(tempfile.gettempdir()))
    acon("doctor", "--json")
    found = told(capsys)
    assert found["Python"]["state"] == "ok"
    for subject in ("seccomp", "pidfd", "mounts without a place", "user namespaces"):
        assert found[subject]["state"] in ("ok", "missing")
    assert found["layers"]["found"]
    # The one that will be used works; the others' reasons are told.
    works = [name for name in CANDIDATES if found[name]["state"] == "ok"]
    assert found["container runtime"]["state"] == ("ok" if works else "missing")
    assert all(found[name]["found"].endswith("ran a container") for name in works)
    assert not works or found["container runtime"]["found"].endswith(f"/{works[0]} will be used")
    left = set(os.listdir(tempfile.gettempdir())) - folders
    assert not [name for name in left if name.startswith("acon-doctor")]
    assert "acon-doctor" not in Path("/proc/self/mountinfo").read_text()
    assert groups_called("acond-doctor-") == []


@pytest.mark.root
@pytest.mark.skipif(not machine_is_hybrid(), reason="needs a hybrid machine")
def test_a_hybrid_machine_s_controllers_are_told(
    acon: Acon, capsys: pytest.CaptureFixture[str]
) -> None:
    acon("doctor", "--json")
    found = told(capsys)
    assert found["control groups"]["found"].startswith("hybrid")
    for controller in ("cpu", "memory", "pids"):
        assert controller in found["control groups"]["found"]
        assert controller in found["limits"]["found"]
    assert found["limits"]["state"] == "ok"


@pytest.mark.root
@pytest.mark.skipif(not machine_is_hybrid(), reason="needs version 1 to hold the controllers")
def test_a_machine_without_controllers_is_told_what_is_not_limited() -> None:
    findings = run_in_view(
        "v2",
        """
        import msgspec, trio
        from acon.runtime_trial import control_group_findings

        print(msgspec.json.encode(trio.run(control_group_findings)).decode())
        """,
    )
    groups, limits = findings
    assert groups["found"] == "version 2; controllers: none"
    assert limits["state"] == "absent"
    assert limits["found"].count("no control group limits") == 3


@pytest.mark.root
def test_a_machine_without_control_groups_is_told_so() -> None:
    (finding,) = run_in_view(
        "none",
        """
        import msgspec, trio
        from acon.runtime_trial import control_group_findings

        print(msgspec.json.encode(trio.run(control_group_findings)).decode())
        """,
    )
    assert finding["state"] == "missing"


def test_a_trial_that_fails_is_told_in_its_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such module >&2; exit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    (finding,) = machine._containers()
    assert (finding.subject, finding.state) == ("container runtime", "missing")
    assert finding.found == "no such module" or "unshare" in finding.found


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """Installs shell scripts as the only runtimes of the machine."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setattr(runtime_trial, "SEARCH_PATH", str(folder))

    def install(name: str, script: str) -> str:
        program = folder / name
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        return str(program)

    return install


@pytest.mark.root
async def test_each_runtime_s_own_reason_is_told(
    tmp_path: Path, installed: Callable[[str, str], str]
) -> None:
    program = installed("runc", "exit 4")
    found = {one.subject: one for one in await runtime_trial.runtime_findings(tmp_path)}
    assert found["runc"].state == "absent"
    assert found["runc"].found == f"{program}: must tell its version; got exit code 4"
    assert (found["crun"].state, found["crun"].found) == ("absent", "not installed")
    assert (found["container runtime"].state, found["container runtime"].found) == (
        "missing",
        "none works",
    )
