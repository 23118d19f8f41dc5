"""The tree of checks: three outcomes, and no way to say more than was found."""

from __future__ import annotations

import pytest

from verifier import Check, Outcome
from verifier.td_bits import attribute_names, attribute_problems, xfam_problems
from verifier.verdict import equal, group, judge, unmade


def leaf(outcome: str) -> Check:
    if outcome == "open":
        return unmade("a.open", "t", why="policy", actual="x", left_open=True)
    if outcome == "unmade":
        return unmade("a.unmade", "t", why="no data", actual="x", left_open=False)
    return equal("a", "t", expected="1", actual="1" if outcome == "pass" else "2", anchor="x")


@pytest.mark.parametrize(
    ("members", "outcome", "left_open"),
    [
        (["pass", "pass"], Outcome.PASS, False),
        (["pass", "fail", "open"], Outcome.FAIL, False),
        (["pass", "open"], Outcome.NOT_CHECKED, True),
        (["open", "unmade"], Outcome.NOT_CHECKED, False),
        (["unmade", "fail"], Outcome.FAIL, False),
    ],
)
def test_a_group_is_as_good_as_its_worst_member(
    members: list[str], outcome: Outcome, left_open: bool
) -> None:
    made = group("g", "t", [leaf(one) for one in members])
    assert (made.outcome, made.left_open) == (outcome, left_open)


def test_a_group_cannot_claim_another_outcome_than_its_members() -> None:
    with pytest.raises(ValueError, match="children"):
        Check(id="g", title="t", outcome=Outcome.PASS, children=(leaf("fail"),))


def test_a_group_of_nothing_and_a_check_without_values_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing"):
        group("g", "t", [])
    with pytest.raises(ValueError, match="compared"):
        Check(id="g", title="t", outcome=Outcome.PASS)


def test_a_check_that_was_made_cannot_be_left_open() -> None:
    with pytest.raises(ValueError, match="left open"):
        Check(id="a", title="t", outcome=Outcome.PASS, expected="1", actual="1", left_open=True)


def test_a_judged_check_keeps_what_was_compared() -> None:
    check = judge("a", "t", holds=False, expected="1", actual="2", anchor="x", policy_rule="p.q")
    assert (check.outcome, check.expected, check.actual) == (Outcome.FAIL, "1", "2")
    assert (check.anchor, check.policy_rule) == ("x", "p.q")


ALLOWED = {27, 30, 31, 63}


@pytest.mark.parametrize("bit", range(64))
def test_each_attribute_bit_is_allowed_or_a_problem_by_itself(bit: int) -> None:
    with_bit = (1 << 28 | 1 << bit).to_bytes(8, "little")
    problems = attribute_problems(with_bit)
    assert bool(problems) == (bit not in ALLOWED | {28})
    assert all(f"bit {bit} " in problem for problem in problems)
    assert attribute_names(with_bit)


def test_sept_ve_disable_must_be_set() -> None:
    (problem,) = attribute_problems(bytes(8))
    assert "SEPT_VE_DISABLE" in problem


@pytest.mark.parametrize(
    ("xfam", "problems"), [(0x3, 0), (0x6DBE7, 0), (0x1, 1), (0x8, 2), (1 << 63 | 3, 1)]
)
def test_xfam_is_held_within_its_bounds(xfam: int, problems: int) -> None:
    assert len(xfam_problems(xfam.to_bytes(8, "little"))) == problems
