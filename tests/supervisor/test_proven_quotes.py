"""Quotes and TDREPORTs with the log that replays to them: what is bounded, proven and refused."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from supervisor import Busy, DeadlineExceeded, MeasurementHalted, RuntimeFailed
from supervisor.config import EvidenceConfig
from supervisor.proven_quotes import ProvenQuotes
from supervisor.service import Supervisor
from supervisor.testing import InMemory, Owner, in_memory_plugin, manifest, running

if TYPE_CHECKING:
    from supervisor.measurement import Measurement
    from supervisor.seams import QuoteSource

NONCE = bytes(16)
ASK: dict[str, Callable[[Supervisor], Awaitable[object]]] = {
    "quote": lambda supervisor: supervisor.evidence(NONCE),
    "TDREPORT": lambda supervisor: supervisor.acon_report(NONCE, want_quote=False),
}


@asynccontextmanager
async def asked(tmp_path: Path) -> AsyncIterator[tuple[Supervisor, InMemory]]:
    """One may wait for a quote at a time."""
    loaded = in_memory_plugin(tmp_path)
    assert isinstance(loaded.plugin, InMemory)
    toml = "[evidence]\nmax_waiting = 1\nquote_timeout_s = 5\n"
    async with running([loaded], tmp_path, toml) as supervisor:
        yield supervisor, loaded.plugin


def method(what: str) -> str:
    return {"quote": "quote", "TDREPORT": "td_report"}[what]


@pytest.mark.parametrize("first", ASK)
@pytest.mark.parametrize("second", ASK)
async def test_all_who_wait_for_the_hardware_are_bounded_together(
    tmp_path: Path, autojump_clock: object, first: str, second: str
) -> None:
    async with asked(tmp_path) as (supervisor, machine), trio.open_nursery() as nursery:
        machine.quotes.delay_s = 1
        nursery.start_soon(ASK[first], supervisor)
        await wait_all_tasks_blocked()
        with pytest.raises(Busy, match=r"evidence\.max_waiting"):
            await ASK[second](supervisor)


def test_containers_that_ask_for_ever_leave_places_for_relying_parties_outside() -> None:
    never = cast("QuoteSource", object())
    quotes = ProvenQuotes(
        measurement=cast("Measurement", object()),
        quotes=never,
        config=EvidenceConfig(max_waiting=5),
    )
    with ExitStack() as asking:
        for _ in range(3):
            asking.enter_context(quotes.asking(is_container=True))
        with pytest.raises(Busy, match=r"evidence\.max_waiting.*at most 3"):
            asking.enter_context(quotes.asking(is_container=True))
        for _ in range(2):
            asking.enter_context(quotes.asking(is_container=False))
        with pytest.raises(Busy, match="at most 5"):
            asking.enter_context(quotes.asking(is_container=False))
    with ExitStack() as asking:
        for _ in range(5):
            asking.enter_context(quotes.asking(is_container=False))
        with pytest.raises(Busy):
            asking.enter_context(quotes.asking(is_container=True))


@pytest.mark.parametrize("what", ASK)
async def test_hardware_that_fails_uses_up_nobodys_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: object, what: str
) -> None:
    async def fail(_: bytes) -> bytes:
        raise KeyError("a bug of the quote source")

    async def hang(_: bytes) -> bytes:
        await trio.sleep_forever()
        raise AssertionError("unreachable")

    async with asked(tmp_path) as (supervisor, machine):
        with monkeypatch.context() as patch:
            for _ in range(2):
                patch.setattr(machine.quotes, method(what), fail)
                with pytest.raises(RuntimeFailed, match=what):
                    await ASK[what](supervisor)
                patch.setattr(machine.quotes, method(what), hang)
                with pytest.raises(DeadlineExceeded, match=what):
                    await ASK[what](supervisor)
        await ASK[what](supervisor)


@pytest.mark.parametrize("what", ASK)
async def test_what_was_quoted_is_not_given_out_once_measurement_has_halted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    async with asked(tmp_path) as (supervisor, machine):
        genuine = getattr(machine.quotes, method(what))

        async def halting(report_data: bytes) -> bytes:
            raw: bytes = await genuine(report_data)
            supervisor._measurement.halt("doubt")
            return raw

        monkeypatch.setattr(machine.quotes, method(what), halting)
        with pytest.raises(MeasurementHalted):
            await ASK[what](supervisor)


async def test_a_report_comes_with_the_log_as_it_was_when_the_hardware_made_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = Owner("owner").sign(manifest(name="later:1"))
    async with asked(tmp_path) as (supervisor, machine):
        genuine = machine.quotes.td_report

        async def slow(report_data: bytes) -> bytes:
            raw = await genuine(report_data)
            await supervisor.admit([image])
            return raw

        monkeypatch.setattr(machine.quotes, "td_report", slow)
        before = await supervisor.acon_report(NONCE, want_quote=False)
        monkeypatch.setattr(machine.quotes, "td_report", genuine)
        after = await supervisor.acon_report(NONCE, want_quote=False)
    assert after.log_lines[:-1] == before.log_lines
