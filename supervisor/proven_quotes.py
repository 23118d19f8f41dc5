"""A quote or a TDREPORT, and the part of the log that replays to the register it carries.

No lock is held while a quote is made: the quote carries the register, and the log sent
is the prefix that replays to that value. Without such a prefix there is no evidence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from supervisor.config import EvidenceConfig
from supervisor.errors import Busy, MeasurementHalted, RuntimeFailed
from supervisor.formats.errors import FormatError
from supervisor.formats.quote import parse_quote
from supervisor.formats.td_body import TdBody
from supervisor.formats.td_report import body_of_report, parse_td_report
from supervisor.journal import JournalEntry
from supervisor.measurement import Measurement
from supervisor.seam_guard import deadline, require_type, seam
from supervisor.seams import QuoteSource


class Proven(NamedTuple):
    """`raw` as the hardware gave it; `prefix` is the log up to what it says."""

    raw: bytes
    prefix: tuple[JournalEntry, ...]


class ProvenQuotes:
    """Asks the hardware, for at most `max_waiting` askers at a time."""

    def __init__(
        self, *, measurement: Measurement, quotes: QuoteSource, config: EvidenceConfig
    ) -> None:
        self._measurement = measurement
        self._quotes = quotes
        self._config = config
        self._waiting = 0
        self._containers_waiting = 0

    @contextmanager
    def asking(self, *, is_container: bool) -> Iterator[None]:
        """Around everything that one asker waits for. Raises `Busy`.

        Containers together have half of the places: hostile ones could keep relying parties
        outside from ever getting evidence.
        """
        most = self._config.max_waiting
        mine = (most + 1) // 2 if is_container else most
        if self._waiting >= most or (is_container and self._containers_waiting >= mine):
            raise Busy(
                "evidence",
                "too many requests wait for a quote (evidence.max_waiting)",
                expected=f"at most {mine}",
            )
        self._waiting += 1
        self._containers_waiting += is_container
        try:
            yield
        finally:
            self._waiting -= 1
            self._containers_waiting -= is_container

    async def quote(self, report_data: bytes) -> Proven:
        """Raises `DeadlineExceeded`, `RuntimeFailed` when the hardware fails,
        `MeasurementHalted` when the log cannot be proven.
        """
        with self._deadline("quote"), seam("quote", "the quote source"):
            raw = await self._quotes.quote(report_data)
        require_type(raw, bytes, item="quote")
        try:
            body = parse_quote(raw).body
        except FormatError as error:
            raise RuntimeFailed("quote", "must be a TDX quote", actual=error) from error
        return Proven(raw, await self._prefix_of("quote", body, report_data))

    async def td_report(self, report_data: bytes) -> Proven:
        """Raises as `quote` does."""
        with self._deadline("TDREPORT"), seam("TDREPORT", "the quote source"):
            raw = await self._quotes.td_report(report_data)
        require_type(raw, bytes, item="TDREPORT")
        try:
            body = body_of_report(parse_td_report(raw), td15=False)
        except FormatError as error:
            raise RuntimeFailed("TDREPORT", "must be one", actual=error) from error
        return Proven(raw, await self._prefix_of("TDREPORT", body, report_data))

    async def _prefix_of(
        self, item: str, body: TdBody, report_data: bytes
    ) -> tuple[JournalEntry, ...]:
        """The log that replays to this body's register; refuses another request's body."""
        if body.report_data != report_data:
            raise RuntimeFailed(
                item,
                "must carry the REPORTDATA that was asked for",
                expected=report_data.hex(),
                actual=body.report_data.hex(),
            )
        register = body.rtmrs[self._measurement.rtmr_index]
        prefix = self._measurement.prefix_for(register)
        if prefix is None:
            # Taken between an extension and its entry in memory: that entry is on its way.
            await self._measurement.settled()
            prefix = self._measurement.prefix_for(register)
        self._measurement.require_running()
        if prefix is None:
            raise MeasurementHalted(
                f"RTMR[{self._measurement.rtmr_index}]",
                "the log has no prefix that replays to the quoted register",
                expected=self._measurement.register.hex(),
                actual=register.hex(),
            )
        return prefix

    @contextmanager
    def _deadline(self, item: str) -> Iterator[None]:
        with deadline(item, "must arrive in time", self._config.quote_timeout_s):
            yield
