"""What a relying party gets: a tree of checks, and the facts those checks established.

A check passes, fails, or was not made. One that was not made is never mistaken for a
pass: `left_open` says whether the caller's policy expressly asked for it not to be made,
and a verdict with any other unmade check does not pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from typing import Literal

import msgspec

from verifier.facts import Facts


class Outcome(Enum):
    """How a check ended. The values are what the JSON report shows."""

    PASS = "pass"
    FAIL = "fail"
    NOT_CHECKED = "not_checked"


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One comparison, or a group of them.

    `id` is stable and dotted (`quote.tcb_status`); `expected` and `actual` are what was
    compared, in words; `anchor` names what makes `actual` believable (a root key, the
    quote, a signature); `policy_rule` the path of the policy's setting that asked for it.
    A group has children and no values of its own; its outcome follows from theirs.
    """

    id: str
    title: str
    outcome: Outcome
    expected: str | None = None
    actual: str | None = None
    anchor: str | None = None
    policy_rule: str | None = None
    left_open: bool = False
    children: tuple[Check, ...] = ()

    def __post_init__(self) -> None:
        if self.left_open and self.outcome is not Outcome.NOT_CHECKED:
            raise ValueError(f"{self.id}: only a check that was not made can be left open")
        if self.children:
            outcome, left_open = _combined(self.children)
            if (outcome, left_open) != (self.outcome, self.left_open):
                raise ValueError(f"{self.id}: a group's outcome is that of its children")
        elif self.expected is None or self.actual is None:
            raise ValueError(f"{self.id}: a check says what was compared with what")

    def walk(self) -> Iterator[Check]:
        """This check and everything below it, parents first."""
        yield self
        for child in self.children:
            yield from child.walk()

    def leaves(self) -> Iterator[Check]:
        return (check for check in self.walk() if not check.children)


def _combined(children: Sequence[Check]) -> tuple[Outcome, bool]:
    outcomes = {child.outcome for child in children}
    if Outcome.FAIL in outcomes:
        return Outcome.FAIL, False
    if Outcome.NOT_CHECKED in outcomes:
        unmade = [child for child in children if child.outcome is Outcome.NOT_CHECKED]
        return Outcome.NOT_CHECKED, all(child.left_open for child in unmade)
    return Outcome.PASS, False


def judge(
    id: str,
    title: str,
    *,
    holds: bool,
    expected: str,
    actual: str,
    anchor: str,
    policy_rule: str | None = None,
) -> Check:
    """A leaf that was checked."""
    return Check(
        id=id,
        title=title,
        outcome=Outcome.PASS if holds else Outcome.FAIL,
        expected=expected,
        actual=actual,
        anchor=anchor,
        policy_rule=policy_rule,
    )


def equal(
    id: str,
    title: str,
    *,
    expected: str,
    actual: str,
    anchor: str,
    policy_rule: str | None = None,
) -> Check:
    """A leaf that passes exactly when both texts are the same."""
    return judge(
        id,
        title,
        holds=expected == actual,
        expected=expected,
        actual=actual,
        anchor=anchor,
        policy_rule=policy_rule,
    )


def unmade(
    id: str,
    title: str,
    *,
    why: str,
    actual: str,
    left_open: bool,
    policy_rule: str | None = None,
) -> Check:
    """A leaf that was not checked; `why` stands where the expectation would."""
    return Check(
        id=id,
        title=title,
        outcome=Outcome.NOT_CHECKED,
        expected=why,
        actual=actual,
        left_open=left_open,
        policy_rule=policy_rule,
    )


def group(id: str, title: str, children: Iterable[Check]) -> Check:
    """A check that is as good as the worst of its children, of which there must be some."""
    members = tuple(children)
    if not members:
        raise ValueError(f"{id}: a group of no checks would prove nothing")
    outcome, left_open = _combined(members)
    return Check(id=id, title=title, outcome=outcome, left_open=left_open, children=members)


class TrustAnchor(msgspec.Struct, frozen=True, kw_only=True):
    """The root key under which the quote was judged. Anything but Intel's is a simulation."""

    kind: Literal["intel", "simulated"]
    name: str
    public_key_sha384: str  # hex SHA-384 of the uncompressed point, as dcap-qvl reports it


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The answer. `judged_at` is the verifier's own time, RFC 3339, as the caller gave it."""

    judged_at: str
    trust_anchor: TrustAnchor
    checks: tuple[Check, ...]
    facts: Facts

    @property
    def ok(self) -> bool:
        """No failure, and nothing unchecked that the policy did not expressly leave open."""
        return bool(self.checks) and all(
            check.outcome is Outcome.PASS or check.left_open for check in self.checks
        )

    def leaves(self) -> Iterator[Check]:
        return (leaf for check in self.checks for leaf in check.leaves())

    @property
    def failures(self) -> tuple[Check, ...]:
        return tuple(leaf for leaf in self.leaves() if leaf.outcome is Outcome.FAIL)

    @property
    def unchecked(self) -> tuple[Check, ...]:
        return tuple(leaf for leaf in self.leaves() if leaf.outcome is Outcome.NOT_CHECKED)

    def find(self, id: str) -> tuple[Check, ...]:
        """Every check with this id, groups included."""
        return tuple(c for check in self.checks for c in check.walk() if c.id == id)
