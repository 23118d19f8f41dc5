"""Why something was refused, split by whose fault it is.

Every refusal names the item, the rule that it broke and both values, so that a
reader can act on it without reading code. `supervisor.errors` adds the faults
that only a running daemon can have.
"""

from __future__ import annotations

from typing import ClassVar


class Refusal(Exception):
    """Something was refused; nothing was changed.

    `item` names the thing (an image id, a field's path, a file), `rule` says in
    words what must hold, `expected` and `actual` are the two values compared
    (either may be absent when the rule alone says it all).
    """

    kind: ClassVar[str] = "refused"

    def __init__(
        self,
        item: str,
        rule: str,
        *,
        expected: object | None = None,
        actual: object | None = None,
    ) -> None:
        self.item = item
        self.rule = rule
        self.expected = None if expected is None else str(expected)
        self.actual = None if actual is None else str(actual)
        super().__init__(item, rule)

    def __str__(self) -> str:
        text = f"{self.item}: {self.rule}"
        if self.expected is not None:
            text += f"; expected {self.expected}"
        if self.actual is not None:
            text += f"{',' if self.expected is not None else ';'} got {self.actual}"
        return text

    def to_dict(self) -> dict[str, str | None]:
        """What the APIs send: kind, item, rule, expected, actual and the sentence."""
        return {
            "kind": self.kind,
            "item": self.item,
            "rule": self.rule,
            "expected": self.expected,
            "actual": self.actual,
            "message": str(self),
        }


class Untrusted(Refusal):
    """Bytes from outside are not what they must be: their sender's fault."""

    kind = "untrusted"


class FormatError(Untrusted):
    """Bytes do not follow their format; `item` is the path of the field or the offset."""

    kind = "format"


class SignatureInvalid(Untrusted):
    """A signature, key or certificate does not vouch for the bytes."""

    kind = "signature"


class DigestMismatch(Untrusted):
    """Bytes have another digest than the one they were asked for by."""

    kind = "digest"


class PolicyDenied(Untrusted):
    """Images do not accept each other (launch policy), or a start breaks the manifest's rules."""

    kind = "policy"


class DelegationUnresolved(Untrusted):
    """No statement, or no unambiguous one, resolves a delegated layer reference."""

    kind = "delegation"
