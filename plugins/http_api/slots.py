"""A bounded number of things at one time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from supervisor import Busy


class Slots:
    """`item` names them in the refusal of those beyond `most`."""

    def __init__(self, item: str, rule: str, *, most: int) -> None:
        self._item = item
        self._rule = rule
        self._most = most
        self.taken = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """Hold one while the block runs. Raises `Busy` when all are taken; never waits."""
        if self.taken >= self._most:
            raise Busy(self._item, self._rule, expected=f"at most {self._most}")
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1
