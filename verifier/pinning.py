"""A measured value against the policy's pins: equal to one, to none, or expressly unpinned."""

from __future__ import annotations

from verifier.policy import Pins, pins
from verifier.verdict import Check, judge, unmade


def pinned(
    id: str, title: str, *, actual: str, expected: Pins, anchor: str, policy_rule: str
) -> Check:
    """Compare a hex value with what the policy says of it at `policy_rule`."""
    values = pins(expected)
    if values is None:
        return unmade(
            id,
            title,
            why='the policy says "unpinned"',
            actual=actual,
            left_open=True,
            policy_rule=policy_rule,
        )
    return judge(
        id,
        title,
        holds=actual in values,
        expected=" or ".join(values),
        actual=actual,
        anchor=anchor,
        policy_rule=policy_rule,
    )
