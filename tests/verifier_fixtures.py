"""One simulated platform for all tests of the verifier, and the policy of the honest case."""

from __future__ import annotations

import pytest
from evidence_factory import build, honest

from plugins.tdx_sim.pki import SimPki, ensure_pki
from verifier import Policy, parse_policy, policy_from_evidence


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> SimPki:
    return ensure_pki(tmp_path_factory.mktemp("sim") / "pki")


@pytest.fixture(scope="session")
def other_pki(tmp_path_factory: pytest.TempPathFactory) -> SimPki:
    return ensure_pki(tmp_path_factory.mktemp("sim") / "other-pki")


@pytest.fixture(scope="session")
def policy_text(pki: SimPki) -> str:
    built = build(honest(), pki)
    return policy_from_evidence(built.evidence, collateral=built.collateral, follow_vendors=True)


@pytest.fixture(scope="session")
def policy(policy_text: str) -> Policy:
    return parse_policy(policy_text)
