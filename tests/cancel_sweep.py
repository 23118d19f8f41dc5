"""Cancel an operation at its first, second, third … scheduling step, until it gets through.

A sweep, not a sample: each round runs in a fresh `trio.run`, and an instrument cancels
the operation's scope before the n-th step of any task since it was armed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio
import trio.testing

MAX_STEPS = 2000


class CancelAtStep(trio.abc.Instrument):
    """Cancels `scope` before the n-th task step after `arm`."""

    def __init__(self, step: int) -> None:
        self._step = step
        self._seen = 0
        self._scope: trio.CancelScope | None = None
        self.fired = False

    def arm(self, scope: trio.CancelScope) -> None:
        self._scope = scope

    def disarm(self) -> None:
        self._scope = None

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if self._scope is None or self.fired:
            return
        self._seen += 1
        if self._seen == self._step:
            self.fired = True
            self._scope.cancel()


Operation = Callable[[], Awaitable[None]]
Round = Callable[[Callable[[Operation], Awaitable[bool]]], Awaitable[None]]


def sweep(one_round: Round, *, mock_clock: bool = True) -> int:
    """Run `one_round(cancelling)` once per step; returns how many steps were swept.

    The round calls `await cancelling(operation)` once, which answers whether the operation
    finished, and then asserts that everything agrees.
    """
    for step in range(1, MAX_STEPS):
        instrument = CancelAtStep(step)

        async def cancelling(operation: Operation, tool: CancelAtStep = instrument) -> bool:
            finished = False
            with trio.CancelScope() as scope:
                tool.arm(scope)
                await operation()
                finished = True
            tool.disarm()
            return finished

        clock = trio.testing.MockClock(autojump_threshold=0) if mock_clock else None
        trio.run(one_round, cancelling, instruments=[instrument], clock=clock)
        if not instrument.fired:
            return step - 1
    raise AssertionError(f"the operation did not end within {MAX_STEPS} steps")
