"""Every real quote with every collateral of its platform, at the times of `expected.json`."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from supervisor.formats.errors import FormatError
from verifier import Outcome, Policy
from verifier.collateral import read_collateral
from verifier.quote_check import QuoteJudgement, check_quote
from verifier.trust import INTEL_ROOT_KEY_SHA384, intel_root, read_root

replace = msgspec.structs.replace

CASES = {
    # quote: (of honest times) checks that fail although the chain is Intel's
    "dstack_quote_report_v4.bin": set[str](),
    "gtg_v5_td15.bin": set[str](),
    "qvl_near_v4.bin": set[str](),
    "qvl_v4.bin": set[str](),
    "qvl_tappd_v4.bin": {"quote.chain"},
    "trustee_v4_debug.bin": {"quote.chain", "quote.td.attributes"},
    "neg_sgx_v3.bin": {"quote.tee_type", "quote.format"},
}


@pytest.fixture
def real(policy: Policy) -> Policy:
    """The simulator's policy, freed of everything that is the simulator's."""
    return replace(
        policy,
        trust=replace(policy.trust, root="intel"),
        tcb=replace(policy.tcb, minimum_evaluation_number="unpinned"),
        td=replace(policy.td, attributes="unpinned", xfam="unpinned", mr_seam="unpinned"),
    )


def judge(vectors: Path, policy: Policy, name: str, case: dict[str, object]) -> QuoteJudgement:
    collateral = (vectors / "collateral" / str(case["collateral"])).read_text()
    now = case["now"]
    assert isinstance(now, int)
    return check_quote(
        (vectors / "quotes" / name).read_bytes(),
        policy,
        collateral=read_collateral(collateral),
        root=intel_root(),
        at=datetime.fromtimestamp(now, UTC),
    )


def failing(judgement: QuoteJudgement) -> set[str]:
    return {leaf.id for leaf in judgement.check.leaves() if leaf.outcome is Outcome.FAIL}


def expected(vectors: Path) -> dict[str, dict[str, object]]:
    quotes: dict[str, dict[str, object]] = json.loads((vectors / "expected.json").read_text())[
        "quotes"
    ]
    return quotes


@pytest.mark.parametrize("name", CASES)
def test_a_real_quote_comes_out_as_known_at_every_time(
    name: str, vectors: Path, real: Policy
) -> None:
    cases = expected(vectors)[name]["verify"]
    assert isinstance(cases, list)
    assert len(cases) == 3
    for case in cases:
        judgement = judge(vectors, real, name, case)
        failed = failing(judgement)
        is_tdx = "quote.format" not in failed
        assert judgement.authentic == (case["ok"] and is_tdx)
        assert judgement.tcb_status == (case.get("status") if judgement.authentic else None)
        if "window" in case and is_tdx:
            # Outside its window: the chain, and the document whose dates say why.
            assert {"quote.chain", "quote.collateral_dates.document"} <= failed
        elif "window" not in case:
            assert failed == CASES[name]


def test_all_real_quotes_are_among_the_cases(vectors: Path) -> None:
    assert expected(vectors).keys() == CASES.keys()


def test_a_real_quote_is_not_the_simulators(vectors: Path, policy: Policy) -> None:
    case = expected(vectors)["qvl_v4.bin"]["verify"]
    assert isinstance(case, list)
    judgement = judge(vectors, policy, "qvl_v4.bin", case[0])
    assert "quote.trust_anchor" in failing(judgement)
    assert "quote.td.mr_seam" in failing(judgement)


def test_our_reading_of_every_real_quote_is_the_known_one(vectors: Path, real: Policy) -> None:
    for name, known in expected(vectors).items():
        cases = known["verify"]
        assert isinstance(cases, list)
        judgement = judge(vectors, real, name, cases[0])
        if judgement.body is None:
            assert name == "neg_sgx_v3.bin"
            continue
        body = judgement.body
        for field in ("tee_tcb_svn", "mr_seam", "td_attributes", "xfam", "mr_td", "report_data"):
            assert getattr(body, field).hex() == known[field]
        for index in range(4):
            assert body.rtmrs[index].hex() == known[f"rt_mr{index}"]


def test_intels_root_given_as_a_file_is_intels(vectors: Path) -> None:
    pem = (vectors / "collateral" / "intel_sgx_root_ca.pem").read_bytes()
    root = read_root(pem)
    assert root.anchor.kind == "intel"
    assert root.anchor.public_key_sha384 == INTEL_ROOT_KEY_SHA384
    built_in = intel_root()
    assert (root.not_before, root.not_after) == (built_in.not_before, built_in.not_after)


def test_collateral_of_another_platform_does_not_verify(vectors: Path, real: Policy) -> None:
    case = {"collateral": "qvl_20A06F000000_2025-09.json", "now": 1758093775}
    assert failing(judge(vectors, real, "qvl_v4.bin", case)) == {"quote.chain"}


def test_every_altered_byte_of_a_real_quotes_signed_part_is_noticed(
    vectors: Path, real: Policy
) -> None:
    case = expected(vectors)["qvl_v4.bin"]["verify"]
    assert isinstance(case, list)
    raw = (vectors / "quotes" / "qvl_v4.bin").read_bytes()
    collateral = read_collateral((vectors / "collateral" / str(case[0]["collateral"])).read_text())
    at = datetime.fromtimestamp(case[0]["now"], UTC)
    for offset in range(0, 632, 7):
        altered = raw[:offset] + bytes([raw[offset] ^ 0x80]) + raw[offset + 1 :]
        judgement = check_quote(altered, real, collateral=collateral, root=intel_root(), at=at)
        assert not judgement.authentic
        assert failing(judgement) & {"quote.chain", "quote.format"}


def test_collateral_that_is_no_collateral_is_a_format_error(vectors: Path) -> None:
    text = (vectors / "collateral" / "qvl_B0C06F000000_2025-06.json").read_text()
    whole = json.loads(text)
    read_collateral(text)
    for changes in (
        {"tcb_info": "{"},
        {"tcb_info": '{"issueDate":"yesterday"}'},
        {"qe_identity": "[]"},
        {"pck_crl": "00"},
        {"root_ca_crl": "zz"},
    ):
        with pytest.raises(FormatError):
            read_collateral(json.dumps({**whole, **changes}))
