"""Google's own verifier, go-tdx-guest's `check`, accepts a simulated v4 quote under the
simulator's root and under no other. Built with `go install`; skipped where that cannot be.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from plugins.tdx_sim.firmware import BaseImage
from plugins.tdx_sim.pki import SimPki, ensure_pki
from plugins.tdx_sim.software_td import SoftwareTd
from supervisor.formats.quote import parse_quote

pytestmark = pytest.mark.full

TOOL = "github.com/google/go-tdx-guest/tools/check@v0.3.1"
REPORT_DATA = bytes(range(64))


@pytest.fixture(scope="module")
def check(tmp_path_factory: pytest.TempPathFactory) -> Path:
    go = shutil.which("go")
    if go is None:
        pytest.skip("go is not installed")
    folder = tmp_path_factory.mktemp("go")
    environment = {
        **os.environ,
        "GOPATH": str(folder / "path"),
        "GOBIN": str(folder / "bin"),
        "GOCACHE": str(folder / "cache"),
        # Read-only folders in the module cache could not be removed with the test's own.
        "GOFLAGS": "-modcacherw",
    }
    try:
        built = subprocess.run(
            [go, "install", TOOL], env=environment, capture_output=True, text=True, timeout=300
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"{TOOL} was not built in 300 s")
    if built.returncode != 0:
        pytest.skip(f"{TOOL} cannot be built here: {built.stderr.strip()[-300:]}")
    return folder / "bin" / "check"


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> SimPki:
    return ensure_pki(tmp_path_factory.mktemp("sim") / "pki")


@pytest.fixture(scope="module")
def quote(pki: SimPki) -> bytes:
    td = SoftwareTd(pki, BaseImage())
    td.registers.extend(3, bytes(range(48)))
    return td.finish_quote(td.begin_quote(REPORT_DATA, 4))


def accepted(check: Path, quote: bytes, *options: str) -> bool:
    """Exit codes: 0 accepted, 1 wrong usage or no TDX quote, 2 not verified, 4 not as expected."""
    command = [str(check), "-in", "-", "-get_collateral=false", *options]
    ended = subprocess.run(command, input=quote, capture_output=True, timeout=60)
    assert ended.returncode in (0, 1, 2, 4), ended.stderr.decode()
    return ended.returncode == 0


def test_check_accepts_the_quote_with_all_its_values(
    check: Path, pki: SimPki, quote: bytes
) -> None:
    body = parse_quote(quote).body
    assert accepted(
        check,
        quote,
        f"-trusted_roots={pki.root_pem_path}",
        f"-report_data={REPORT_DATA.hex()}",
        f"-mr_td={body.mr_td.hex()}",
        f"-mr_seam={body.mr_seam.hex()}",
        f"-td_attributes={body.td_attributes.hex()}",
        f"-xfam={body.xfam.hex()}",
        f"-minimum_tee_tcb_svn={body.tee_tcb_svn.hex()}",
        f"-rtmrs={','.join(rtmr.hex() for rtmr in body.rtmrs)}",
    )


def test_check_refuses_it_under_other_roots(
    check: Path, pki: SimPki, quote: bytes, tmp_path: Path
) -> None:
    other = ensure_pki(tmp_path / "other")
    assert accepted(check, quote, f"-trusted_roots={pki.root_pem_path}")
    assert not accepted(check, quote)
    assert not accepted(check, quote, f"-trusted_roots={other.root_pem_path}")


def test_check_refuses_other_values_and_a_changed_quote(
    check: Path, pki: SimPki, quote: bytes
) -> None:
    root = f"-trusted_roots={pki.root_pem_path}"
    assert not accepted(check, quote, root, f"-report_data={bytes(64).hex()}")
    for offset in (60, 500, 620, 650, 720, 800, 1160):
        changed = bytearray(quote)
        changed[offset] ^= 1
        assert not accepted(check, bytes(changed), root), offset
