"""`acon verify` and `acon policy init` over whole evidence, made in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from acon_helpers import Acon
from evidence_factory import AT, NONCE, build, honest

from plugins.tdx_sim.pki import SimPki, ensure_pki


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> SimPki:
    return ensure_pki(tmp_path_factory.mktemp("sim") / "pki")


@pytest.fixture
def files(tmp_path: Path, pki: SimPki) -> Path:
    """A folder with evidence, collateral and root of an honest TD."""
    built = build(honest(), pki)
    assert built.collateral is not None
    (tmp_path / "evidence.json").write_bytes(built.evidence)
    (tmp_path / "collateral.json").write_text(built.collateral)
    (tmp_path / "root.pem").write_bytes(built.root_pem)
    return tmp_path


def judge(folder: Path, *options: object, nonce: str = NONCE.hex()) -> tuple[object, ...]:
    return (
        *("verify", folder / "evidence.json", "--nonce", nonce, "--at", AT.isoformat()),
        *("--policy", folder / "policy.toml", "--collateral", folder / "collateral.json"),
        *options,
    )


@pytest.fixture
def policy(files: Path, acon: Acon, capsys: pytest.CaptureFixture[str]) -> Path:
    evidence, output = files / "evidence.json", files / "policy.toml"
    collateral = files / "collateral.json"
    assert acon("policy", "init", evidence, "-o", output, "--collateral", collateral) == 0
    capsys.readouterr()
    return output


def test_the_policy_that_init_writes_accepts_the_evidence_that_it_was_made_of(
    files: Path, policy: Path, acon: Acon, capsys: pytest.CaptureFixture[str]
) -> None:
    trusting = ("--trust-simulated-root", files / "root.pem")
    assert acon(*judge(files, *trusting)) == 0
    assert "VERDICT: PASSED" in capsys.readouterr().out
    assert acon(*judge(files, *trusting, "--json")) == 0
    verdict = json.loads(capsys.readouterr().out)
    assert (verdict["ok"], verdict["simulation"]) == (True, True)


def test_a_simulators_quote_fails_for_who_trusts_intel_only(
    files: Path, policy: Path, acon: Acon, capsys: pytest.CaptureFixture[str]
) -> None:
    assert acon(*judge(files)) == 1
    assert "VERDICT: FAILED" in capsys.readouterr().out


def test_another_nonce_another_time_and_an_expected_key_fail(
    files: Path, policy: Path, acon: Acon
) -> None:
    trusting = ("--trust-simulated-root", files / "root.pem")
    assert acon(*judge(files, *trusting, nonce="00" * 32)) == 1
    assert acon(*judge(files, *trusting, "--at", "2099-01-01T00:00:00Z")) == 1
    assert acon(*judge(files, *trusting, "--expect-key", "0" * 96)) == 1


def test_without_collateral_nothing_passes(files: Path, policy: Path, acon: Acon) -> None:
    command = ("verify", files / "evidence.json", "--nonce", NONCE.hex(), "--policy", policy)
    root = ("--trust-simulated-root", files / "root.pem")
    assert acon(*command, *root, "--at", AT.isoformat()) == 1


@pytest.mark.parametrize("name", ["evidence.json", "policy.toml", "collateral.json", "root.pem"])
@pytest.mark.parametrize("absent", [True, False])
def test_what_cannot_be_read_is_exit_code_2(
    name: str, absent: bool, files: Path, policy: Path, acon: Acon
) -> None:
    if absent:
        (files / name).unlink()
    else:
        (files / name).write_text("\x00 not what it should be [[[")
    assert acon(*judge(files, "--trust-simulated-root", files / "root.pem")) == 2


def test_a_policy_is_made_of_nothing_but_evidence(tmp_path: Path, acon: Acon) -> None:
    (tmp_path / "evidence.json").write_text("{}")
    output = tmp_path / "policy.toml"
    assert acon("policy", "init", tmp_path / "evidence.json", "-o", output) == 2
    assert not output.exists()
