"""From an intent to a receipt: write it down, extend the register, and only then act.

The log is the set of everything that was ever allowed to run. One writer, one lock,
one log per register. An entry is appended to the journal, then extended, in one
worker-thread call that no cancellation can cut in two; whoever acts needs the receipt
that only this module can make. A log that does not replay to its register is worth
nothing for ever: so any doubt halts measurement for good, and a halted supervisor
admits nothing and gives no evidence (design, "Measurement").

After a crash the live register is compared with the journal:

| register equals                     | what happened             | what is done            |
|-------------------------------------|---------------------------|-------------------------|
| the replay of all entries           | nothing was lost          | go on                   |
| the replay of all but the last      | it was never extended     | drop it, go on          |
| zero, and the journal is not empty  | a new boot                | put the journal aside   |
| anything else                       | log and register parted   | halt                    |
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Protocol, TypeVar

import structlog
import trio

from supervisor.errors import Conflict, MeasurementHalted, Refusal, RuntimeFailed
from supervisor.formats.errors import FormatError
from supervisor.formats.event_log import (
    ZERO_REGISTER,
    LogRecord,
    encode_record,
    extend,
    parse_records,
)
from supervisor.formats.log_events import (
    AdmitImagesEvent,
    LogEvent,
    SealEvent,
    StartContainerEvent,
    StartEvent,
    decode_event,
    encode_event,
)
from supervisor.journal import Attachment, Journal, JournalEntry
from supervisor.proofs import AdmissionReceipt, Receipt, SealReceipt, StartReceipt
from supervisor.seams import Registers

T = TypeVar("T")
# RTMR[0] to RTMR[2] are firmware's, the boot loader's and the kernel's.
RTMR_INDEX = 3
log = structlog.stdlib.get_logger("supervisor.measurement")


class RunBlocking(Protocol):
    """How blocking work is run: in a worker thread, or at once where a test drives the clock."""

    def __call__(
        self, function: Callable[[], T], limiter: trio.CapacityLimiter
    ) -> Awaitable[T]: ...


async def in_worker_thread(function: Callable[[], T], limiter: trio.CapacityLimiter) -> T:
    """Run it in a thread that a deadline may abandon."""
    return await trio.to_thread.run_sync(function, abandon_on_cancel=True, limiter=limiter)


class Measurement:
    """The one log of one register, and the only way to write it.

    `recover` must be awaited once before anything else. `close` releases the journal.
    """

    def __init__(
        self,
        registers: Sequence[tuple[str, Registers]],
        journal: Journal,
        *,
        rtmr_index: int,
        extend_timeout_s: float = 10,
        log_limit_bytes: int = 8 * 1024 * 1024,
        run_blocking: RunBlocking = in_worker_thread,
        on_halt: Callable[[str], None] = lambda reason: None,
    ) -> None:
        if not registers:
            raise RuntimeFailed("measurement", "at least one plugin must offer a register")
        self._registers = tuple(registers)
        self._journal = journal
        self.rtmr_index = rtmr_index
        self._extend_timeout_s = extend_timeout_s
        self._log_limit_bytes = log_limit_bytes
        self._run_blocking = run_blocking
        self._on_halt = on_halt
        self._lock = trio.Lock()
        # One thread at a time, ever: a hung extend must not be overtaken.
        self._limiter = trio.CapacityLimiter(1)
        self.halted: str | None = None
        self.notes: tuple[str, ...] = ()
        self._replay([], ZERO_REGISTER)

    # --- after a crash, and at first start -----------------------------------------------

    async def recover(self) -> None:
        """Compare journal and register as the table above; halts rather than raises."""
        try:
            await self._in_thread(self._recover)
        except Refusal as error:
            self.halt(str(error))

    def _recover(self) -> None:
        live = self._read_registers()
        records = [self._parse(entry) for entry in self._journal.entries]
        self._replay(records, _start_value(records[0]) if records else live)
        if live == self._register:
            return
        if records and live == self._value_before_last(records):
            self._journal.drop_last()
            self._replay(records[:-1], self._start_value)
            self._note(f"the last journal entry ({records[-1].operation}) was never extended")
            return
        if records and live == ZERO_REGISTER:
            aside = self._journal.put_aside()
            self._replay([], ZERO_REGISTER)
            self._note(f"a new boot: the journal of {len(records)} entries lies in {aside.name}")
            return
        raise MeasurementHalted(
            f"RTMR[{self.rtmr_index}]",
            "must be what the journal replays to",
            expected=self._register.hex(),
            actual=live.hex(),
        )

    def _replay(self, records: Sequence[LogRecord], start_value: bytes) -> None:
        self._start_value = start_value
        self._records: list[LogRecord] = []
        self._register = start_value
        self._length_at = {start_value: 0}
        self._log_bytes = 0
        self._by_content: dict[tuple[str, bytes], LogRecord] = {}
        self._last_start: bytes | None = None
        for record in records:
            self._remember(record)

    def _value_before_last(self, records: Sequence[LogRecord]) -> bytes:
        value = self._start_value
        for record in records[:-1]:
            value = extend(value, record.digest_sha384)
        return value

    def _parse(self, entry: JournalEntry) -> LogRecord:
        try:
            (record,) = parse_records(entry.record, rtmr_index=self.rtmr_index)
        except (FormatError, ValueError) as error:
            raise MeasurementHalted("journal", "holds a bad record", actual=error) from error
        return record

    def _read_registers(self) -> bytes:
        values = {name: registers.read() for name, registers in self._registers}
        if len(set(values.values())) != 1:
            raise MeasurementHalted(
                f"RTMR[{self.rtmr_index}]",
                "all configured registers must agree",
                actual=", ".join(f"{name} {value.hex()}" for name, value in values.items()),
            )
        return next(iter(values.values()))

    # --- writing --------------------------------------------------------------------------

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[LogWriter]:
        """Hold the one lock: what is checked inside still holds when it is recorded.

        Raises `MeasurementHalted` if measurement halted. Hold it briefly: no hook, no
        network and no quote inside.
        """
        async with self._lock:
            self.require_running()
            yield LogWriter(self)

    def require_running(self) -> None:
        """Raises `MeasurementHalted` once log and register may have parted."""
        if self.halted is not None:
            raise MeasurementHalted("measurement", "has halted", actual=self.halted)

    async def _record(self, event: LogEvent, attachments: Sequence[Attachment]) -> LogRecord:
        self.require_running()
        if not self._records and not isinstance(event, StartEvent):
            raise RuntimeError("the supervisor itself is measured before anything else")
        operation, content = encode_event(event)
        known = self._known(event, operation, content)
        if known is not None:
            return known
        record = encode_record(self.rtmr_index, operation, content)
        if self._log_bytes + len(record.raw) > self._log_limit_bytes:
            raise Conflict(
                "measurement log",
                "has reached its configured maximum (measurement.log_limit_bytes)",
                expected=f"at most {self._log_limit_bytes} bytes",
                actual=self._log_bytes + len(record.raw),
            )
        entry = JournalEntry(record=record.raw, attachments=tuple(attachments))
        await self._in_thread(lambda: self._commit(entry, record))
        self._remember(record)
        return record

    def _known(self, event: LogEvent, operation: str, content: bytes) -> LogRecord | None:
        if isinstance(event, StartContainerEvent | SealEvent):
            return self._by_content.get((operation, content))
        if isinstance(event, StartEvent) and content == self._last_start:
            return self._by_content[(operation, content)]
        return None

    def _commit(self, entry: JournalEntry, record: LogRecord) -> None:
        expected = extend(self._register, record.digest_sha384)
        self._journal.append(entry)
        try:
            for _, registers in self._registers:
                registers.extend(record.digest_sha384)
            live = self._read_registers()
        except MeasurementHalted:
            raise
        except Exception as error:
            # Whether it was extended is unknown, and extending twice cannot be undone.
            raise MeasurementHalted(
                f"RTMR[{self.rtmr_index}]", "an extension failed", actual=error
            ) from error
        if live != expected:
            raise MeasurementHalted(
                f"RTMR[{self.rtmr_index}]",
                "must hold what was just extended; somebody else writes it",
                expected=expected.hex(),
                actual=live.hex(),
            )

    async def _in_thread(self, function: Callable[[], T]) -> T:
        """Run blocking measuring work to its end, whatever happens to the caller.

        Shielded: a cancellation lands before it or after it, never inside. Past the
        deadline measurement halts and the thread is abandoned, since a synchronous
        hook cannot be timed out.
        """
        with trio.CancelScope(shield=True) as scope:
            scope.deadline = trio.current_time() + self._extend_timeout_s
            try:
                return await self._run_blocking(function, self._limiter)
            except RuntimeFailed:
                raise  # the journal took nothing, so nothing was extended
            except MeasurementHalted as error:
                self.halt(str(error))
                raise
            except Exception as error:
                self.halt(repr(error))
                raise MeasurementHalted("measurement", "failed", actual=repr(error)) from error
        reason = f"no answer from the register within {self._extend_timeout_s:g} s"
        self.halt(reason)
        raise MeasurementHalted("measurement", "has halted", actual=reason)

    def _remember(self, record: LogRecord) -> None:
        self._records.append(record)
        self._register = extend(self._register, record.digest_sha384)
        self._length_at[self._register] = len(self._records)
        self._log_bytes += len(record.raw)
        self._by_content[(record.operation, record.content)] = record
        if record.operation == "Start":
            self._last_start = record.content

    def halt(self, reason: str) -> None:
        """Measure nothing more and give no evidence, for good; the first reason is kept."""
        if self.halted is None:
            self.halted = reason
            log.error("measurement halted", reason=reason)
            self._on_halt(reason)

    def _note(self, text: str) -> None:
        self.notes = (*self.notes, text)
        log.warning("recovered", what=text)

    # --- reading --------------------------------------------------------------------------

    @property
    def register(self) -> bytes:
        """What the register must hold now, 48 bytes."""
        return self._register

    @property
    def start_value(self) -> bytes:
        """What the register held before the first entry, 48 bytes; zero on a fresh TD."""
        return self._start_value

    @property
    def records(self) -> Sequence[LogRecord]:
        """All records so far. Do not change it."""
        return self._records

    def entries(self) -> tuple[JournalEntry, ...]:
        """The journal's entries, with their attachments."""
        return tuple(self._journal.entries)

    async def settled(self) -> None:
        """Until no record is being written: a register may be ahead of the log in between."""
        async with self._lock:
            pass

    def prefix_for(self, register: bytes) -> tuple[JournalEntry, ...] | None:
        """The entries that replay to this register value, or None."""
        length = self._length_at.get(register)
        return None if length is None else tuple(self._journal.entries[:length])

    def close(self) -> None:
        """Release the journal. Idempotent."""
        self._journal.close()


class LogWriter:
    """The right to record, while the lock is held (`Measurement.writing`)."""

    def __init__(self, measurement: Measurement) -> None:
        self._measurement = measurement

    async def record_start(self, event: StartEvent) -> Receipt:
        """Measure the supervisor itself, unless the last `Start` says the same."""
        record = await self._measurement._record(event, ())
        return Receipt._create(record.digest_sha384.hex())

    async def record_admission(
        self, event: AdmitImagesEvent, images: Sequence[Attachment]
    ) -> AdmissionReceipt:
        """Measure a group, with the bytes that its evidence will need."""
        record = await self._measurement._record(event, images)
        return AdmissionReceipt._create(record.digest_sha384.hex())

    async def record_container(self, event: StartContainerEvent) -> StartReceipt:
        """Measure a container's start, unless the same start is in the log already."""
        record = await self._measurement._record(event, ())
        return StartReceipt._create(record.digest_sha384.hex(), event)

    async def record_seal(self, event: SealEvent) -> SealReceipt:
        """Measure the seal, once."""
        record = await self._measurement._record(event, ())
        return SealReceipt._create(record.digest_sha384.hex())


def _start_value(first: LogRecord) -> bytes:
    event = decode_event(first.operation, first.content)
    if not isinstance(event, StartEvent):
        raise MeasurementHalted("journal", "must begin with Start", actual=first.operation)
    return bytes.fromhex(event.register_at_start) if event.register_at_start else ZERO_REGISTER
