"""One transfer for all who wait: it outlives its first caller, and never its last."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from cancel_sweep import Operation, sweep
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor import Conflict, DigestMismatch, Refusal, RuntimeFailed
from supervisor.formats.digest import digest_of
from supervisor.shared_transfers import SharedTransfers

LAYER, OTHER = (digest_of("sha384", name) for name in (b"layer", b"other"))


class Work:
    """A transfer of `takes_s`, whose clean-up takes `cleans_s` when it is cancelled."""

    def __init__(
        self, takes_s: float = 10, *, cleans_s: float = 0, fails: Exception | None = None
    ) -> None:
        self.takes_s = takes_s
        self.cleans_s = cleans_s
        self.fails = fails
        self.begun = 0
        self.done = 0
        self.running = 0

    async def __call__(self) -> None:
        self.begun += 1
        self.running += 1
        assert self.running == 1, "two transfers of one layer at the same time"
        try:
            await trio.sleep(self.takes_s)
            if self.fails is not None:
                raise self.fails
            self.done += 1
        except trio.Cancelled:
            with trio.CancelScope(shield=True):
                await trio.sleep(self.cleans_s)
            raise
        finally:
            self.running -= 1


@asynccontextmanager
async def opened() -> AsyncIterator[SharedTransfers]:
    transfers = SharedTransfers()
    async with trio.open_nursery() as nursery:
        await nursery.start(transfers.run)
        yield transfers
        nursery.cancel_scope.cancel()


class Caller:
    """Somebody who waits, and what became of it."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.got: str | Refusal | None = None
        self.at_s = 0.0

    async def join(
        self, transfers: SharedTransfers, work: Callable[[], Awaitable[None]], after_s: float = 0
    ) -> None:
        began = trio.current_time()
        await trio.sleep(after_s)
        with self.scope:
            try:
                await transfers.join(LAYER, work)
                self.got = "layer"
            except Refusal as error:
                self.got = error
        if self.scope.cancelled_caught:
            self.got = "cancelled"
        self.at_s = trio.current_time() - began


async def test_callers_share_one_transfer_and_its_time(autojump_clock: object) -> None:
    work, callers = Work(10), [Caller() for _ in range(3)]
    async with opened() as transfers, trio.open_nursery() as nursery:
        for number, caller in enumerate(callers):
            nursery.start_soon(caller.join, transfers, work, number * 3)
    assert [caller.got for caller in callers] == ["layer"] * 3
    # Who joined later did not prolong it.
    assert [caller.at_s for caller in callers] == pytest.approx([10] * 3)
    assert (work.begun, work.done) == (1, 1)


async def test_two_layers_are_two_transfers(autojump_clock: object) -> None:
    first, second = Work(10), Work(10)
    async with opened() as transfers:
        before = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(transfers.join, LAYER, first)
            nursery.start_soon(transfers.join, OTHER, second)
            await trio.testing.wait_all_tasks_blocked()
            assert transfers.is_running(LAYER) and transfers.is_running(OTHER)
        assert trio.current_time() - before == pytest.approx(10)
        assert not transfers.is_running(LAYER) and not transfers.is_running(OTHER)
    assert (first.done, second.done) == (1, 1)


async def test_the_second_still_gets_it_when_the_first_is_cancelled(
    autojump_clock: object,
) -> None:
    work, first, second = Work(10), Caller(), Caller()
    async with opened() as transfers, trio.open_nursery() as nursery:
        nursery.start_soon(first.join, transfers, work)
        nursery.start_soon(second.join, transfers, work, 4)
        await trio.sleep(5)
        first.scope.cancel()
    assert (first.got, second.got) == ("cancelled", "layer")
    assert [first.at_s, second.at_s] == pytest.approx([5, 10])
    assert (work.begun, work.done) == (1, 1)


async def test_with_its_last_caller_a_transfer_ends_and_he_waits_for_its_clean_up(
    autojump_clock: object,
) -> None:
    work, first, second = Work(10, cleans_s=2), Caller(), Caller()
    async with opened() as transfers:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first.join, transfers, work)
            nursery.start_soon(second.join, transfers, work, 1)
            await trio.sleep(4)
            first.scope.cancel()
            await trio.sleep(1)
            assert work.running == 1
            second.scope.cancel()
        assert [first.at_s, second.at_s] == pytest.approx([4, 7])
        assert (work.running, work.done) == (0, 0)
        assert not transfers.is_running(LAYER)


async def test_who_comes_while_it_is_given_up_begins_anew_after_its_clean_up(
    autojump_clock: object,
) -> None:
    work, first, late = Work(10, cleans_s=3), Caller(), [Caller(), Caller()]
    async with opened() as transfers, trio.open_nursery() as nursery:
        nursery.start_soon(first.join, transfers, work)
        for caller in late:
            nursery.start_soon(caller.join, transfers, work, 6)
        await trio.sleep(5)
        first.scope.cancel()
    assert [caller.got for caller in late] == ["layer"] * 2
    assert [caller.at_s for caller in late] == pytest.approx([18, 18])
    assert (work.begun, work.done) == (2, 1)


async def test_a_clean_up_that_does_not_end_holds_the_last_caller_for_its_deadline_only(
    autojump_clock: object,
) -> None:
    work, caller = Work(10, cleans_s=500), Caller()
    async with opened() as transfers, trio.open_nursery() as nursery:
        nursery.start_soon(caller.join, transfers, work)
        await trio.sleep(1)
        caller.scope.cancel()
    assert caller.got == "cancelled"
    assert caller.at_s == pytest.approx(31)


async def test_every_caller_gets_the_refusal_as_an_exception_of_his_own(
    autojump_clock: object,
) -> None:
    class Odd(DigestMismatch):
        """What a plugin may raise: with a constructor of its own."""

        def __init__(self, layer: object) -> None:
            super().__init__(str(layer), "odd", expected="this", actual="that")

    refusal = Odd(LAYER)
    work, callers = Work(10, fails=refusal), [Caller() for _ in range(3)]
    async with opened() as transfers, trio.open_nursery() as nursery:
        for caller in callers:
            nursery.start_soon(caller.join, transfers, work)
    got = [caller.got for caller in callers]
    assert len({id(error) for error in [*got, refusal]}) == 4
    for error in got:
        assert isinstance(error, Odd)
        assert error.to_dict() == refusal.to_dict()
        assert error.__cause__ is refusal
        assert error.args == refusal.args
    assert work.begun == 1


@pytest.mark.parametrize(
    "failure", [ZeroDivisionError("a bug"), ExceptionGroup("both", [OSError("a"), OSError("b")])]
)
async def test_a_bug_in_one_transfer_is_told_and_ends_nothing_else(
    autojump_clock: object, failure: Exception
) -> None:
    work, good, caller = Work(1, fails=failure), Work(5), Caller()
    async with opened() as transfers, trio.open_nursery() as nursery:
        nursery.start_soon(caller.join, transfers, work)
        nursery.start_soon(transfers.join, OTHER, good)
    assert isinstance(caller.got, RuntimeFailed)
    assert caller.got.actual == repr(failure)
    assert caller.got.__cause__ is not None
    assert good.done == 1


async def test_after_a_failure_the_next_caller_begins_anew(autojump_clock: object) -> None:
    work = Work(1, fails=Conflict("layer", "not now"))
    async with opened() as transfers:
        with pytest.raises(Conflict, match="not now"):
            await transfers.join(LAYER, work)
        work.fails = None
        await transfers.join(LAYER, work)
    assert (work.begun, work.done) == (2, 1)


async def test_at_shutdown_transfers_end_and_callers_are_told(autojump_clock: object) -> None:
    transfers, work, caller = SharedTransfers(), Work(10, cleans_s=1), Caller()
    with pytest.raises(Conflict, match="shutting down"):
        await transfers.join(LAYER, work)
    async with trio.open_nursery() as outside:
        async with trio.open_nursery() as nursery:
            await nursery.start(transfers.run)
            outside.start_soon(caller.join, transfers, work)
            await trio.sleep(2)
            nursery.cancel_scope.cancel()
        assert work.running == 0
        with pytest.raises(Conflict, match="shutting down"):
            await transfers.join(LAYER, work)
    assert isinstance(caller.got, Conflict)
    assert "shutting down" in caller.got.rule
    assert (work.begun, work.done) == (1, 0)


def test_a_caller_cancelled_at_every_step_leaves_nothing_and_takes_nothing_from_the_other() -> None:
    async def one_round(cancelling: Callable[[Operation], Awaitable[bool]]) -> None:
        work, other = Work(0.5, cleans_s=0.1), Caller()
        async with opened() as transfers:

            async def operation() -> None:
                await transfers.join(LAYER, work)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(other.join, transfers, work, 0.2)
                finished = await cancelling(operation)
                # The last one out waits for the end; who leaves another behind does not.
                assert work.running == 0 or not finished
            assert other.got == "layer"
            assert work.running == 0
            assert not transfers.is_running(LAYER)

    assert sweep(one_round) >= 4


@settings(max_examples=150, deadline=None)
@given(
    plan=st.lists(
        st.tuples(
            st.integers(0, 30),  # when the caller comes
            st.one_of(st.none(), st.integers(0, 30)),  # after how long it leaves
        ),
        min_size=1,
        max_size=6,
    ),
    takes_s=st.integers(1, 12),
    cleans_s=st.integers(0, 4),
    fails=st.booleans(),
    _schedule=st.random_module(),
)
def test_whoever_comes_and_goes_there_is_one_transfer_and_it_ends_with_the_last(
    plan: list[tuple[int, int | None]],
    takes_s: int,
    cleans_s: int,
    fails: bool,
    _schedule: object,
) -> None:
    async def main() -> None:
        failure = Conflict("layer", "wrong") if fails else None
        work = Work(takes_s, cleans_s=cleans_s, fails=failure)
        callers = [Caller() for _ in plan]

        async def leave(caller: Caller, after_s: int) -> None:
            await trio.sleep(after_s)
            caller.scope.cancel()

        async with opened() as transfers:
            async with trio.open_nursery() as nursery:
                for caller, (comes_s, stays_s) in zip(callers, plan, strict=True):
                    nursery.start_soon(caller.join, transfers, work, comes_s)
                    if stays_s is not None:
                        nursery.start_soon(leave, caller, comes_s + stays_s)
            assert work.running == 0
            assert not transfers.is_running(LAYER)
        for caller, (_, stays_s) in zip(callers, plan, strict=True):
            if stays_s is None:
                assert isinstance(caller.got, Conflict) if fails else caller.got == "layer"
            else:
                assert caller.got is not None
        # Nobody waits longer than for those that others give up, and for a whole one.
        longest_s = takes_s + cleans_s * len(plan)
        for caller, (comes_s, stays_s) in zip(callers, plan, strict=True):
            given_up_s = 0 if stays_s is None else stays_s + cleans_s
            assert caller.at_s <= comes_s + max(longest_s, given_up_s) + 1e-6

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
