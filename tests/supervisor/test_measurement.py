"""Log, register and memory agree after everything that can happen to a measurement."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from supervisor.errors import Conflict, MeasurementHalted, RuntimeFailed
from supervisor.formats.event_log import ZERO_REGISTER, encode_record, extend, replay
from supervisor.formats.log_events import (
    AdmitImagesEvent,
    Component,
    SealEvent,
    StartContainerEvent,
    StartEvent,
    encode_event,
)
from supervisor.journal import Attachment, Journal, JournalEntry
from supervisor.measurement import Measurement, in_worker_thread
from supervisor.proofs import StartReceipt
from supervisor.testing import MemoryRegisters, run_at_once

START = StartEvent(
    components=(
        Component(
            name="supervisor",
            version="1",
            digest_sha384="ab" * 48,
            role="supervisor",
            distribution="attested-containers",
        ),
    ),
    config_digest_sha384="cd" * 48,
)


def image(number: int) -> str:
    return f"sha384/{'a' * 96}/{number:096x}"


def admit(number: int) -> AdmitImagesEvent:
    return AdmitImagesEvent(image_ids=(image(number),))


def start_of(number: int) -> StartContainerEvent:
    return StartContainerEvent(
        image_id=image(number),
        layers=("sha384/" + "b" * 96,),
        delegations=(),
        argv=("/bin/true",),
        environment=(),
    )


@contextmanager
def measuring(
    path: Path, registers: MemoryRegisters, *, log_limit_bytes: int = 1 << 20
) -> Iterator[Measurement]:
    measurement = Measurement(
        [("memory", registers)],
        Journal.open(path / "journal"),
        rtmr_index=3,
        run_blocking=run_at_once,
        log_limit_bytes=log_limit_bytes,
    )
    try:
        yield measurement
    finally:
        measurement.close()


async def begin(measurement: Measurement) -> None:
    async with measurement.writing() as log:
        await log.record_start(START)


def agree(measurement: Measurement, registers: MemoryRegisters) -> bool:
    digests = [record.digest_sha384 for record in measurement.records]
    return registers.value == replay(digests, measurement.start_value) == measurement.register


async def test_a_receipt_means_that_log_and_register_hold_the_event(tmp_path: Path) -> None:
    registers = MemoryRegisters()
    with measuring(tmp_path, registers) as measurement:
        await measurement.recover()
        async with measurement.writing() as log:
            await log.record_start(START)
            receipt = await log.record_container(start_of(1))
        assert receipt.digest_sha384 == measurement.records[-1].digest_sha384.hex()
        assert receipt.event == start_of(1)
        assert agree(measurement, registers)


def test_nobody_but_the_measurement_can_make_a_receipt() -> None:
    with pytest.raises(TypeError, match="made by the stage that verifies it"):
        StartReceipt("00" * 48, start_of(1))


async def test_what_says_nothing_new_is_not_extended_again(tmp_path: Path) -> None:
    registers = MemoryRegisters()
    with measuring(tmp_path, registers) as measurement:
        await measurement.recover()
        async with measurement.writing() as log:
            await log.record_start(START)
            first = await log.record_container(start_of(1))
            await log.record_container(start_of(2))
            again = await log.record_container(start_of(1))
            await log.record_start(START)
            await log.record_seal(SealEvent())
            await log.record_seal(SealEvent())
        assert first.digest_sha384 == again.digest_sha384
        assert registers.extensions == 4


async def test_another_supervisor_is_measured_and_the_first_again_after_it(tmp_path: Path) -> None:
    registers = MemoryRegisters()
    other = StartEvent(components=START.components, config_digest_sha384="ee" * 48)
    with measuring(tmp_path, registers) as measurement:
        await measurement.recover()
        async with measurement.writing() as log:
            for event in (START, other, other, START):
                await log.record_start(event)
        assert registers.extensions == 3


async def test_after_a_clean_restart_log_and_attachments_are_there_again(tmp_path: Path) -> None:
    registers = MemoryRegisters()
    attachment = Attachment(b"m", b"s", b"c")
    with measuring(tmp_path, registers) as measurement:
        await measurement.recover()
        async with measurement.writing() as log:
            await log.record_start(START)
            await log.record_admission(admit(1), [attachment])
    with measuring(tmp_path, registers) as again:
        await again.recover()
        assert again.halted is None and again.notes == ()
        assert again.entries()[1].attachments == (attachment,)
        async with again.writing() as log:
            await log.record_start(START)
            await log.record_container(start_of(1))
        assert registers.extensions == 3
        assert agree(again, registers)


async def test_an_entry_that_was_never_extended_is_dropped(tmp_path: Path) -> None:
    registers = MemoryRegisters()
    with measuring(tmp_path, registers) as measurement:
        await measurement.recover()
        async with measurement.writing() as log:
            await log.record_start(START)
            registers.fail_before = True
            with pytest.raises(MeasurementHalted, match="an extension failed"):
                await log.record_admission(admit(1), [])
        assert measurement.halted is not None
    registers.fail_before = False
    with measuring(tmp_path, registers) as again:
        await again.recover()
        assert again.halted is None
        assert again.notes == ("the last journal entry (AdmitImages) was never extended",)
        assert agree(again, registers)


async def test_an_extension_that_failed_after_it_happened_is_kept(tmp_path: Path) -> None:
    registers = MemoryRegisters()
    with measuring(tmp_path, registers) as measurement:
        await measurement.recover()
        async with measurement.writing() as log:
            await log.record_start(START)
            registers.fail_after = True
            with pytest.raises(MeasurementHalted):
                await log.record_admission(admit(1), [])
    registers.fail_after = False
    with measuring(tmp_path, registers) as again:
        await again.recover()
        assert again.halted is None and len(again.records) == 2
        assert agree(again, registers)


async def test_a_new_boot_puts_the_old_journal_aside(tmp_path: Path) -> None:
    registers = MemoryRegisters()
    with measuring(tmp_path, registers) as measurement:
        await measurement.recover()
        async with measurement.writing() as log:
            await log.record_start(START)
            await log.record_container(start_of(1))
    booted = MemoryRegisters()
    with measuring(tmp_path, booted) as again:
        await again.recover()
        assert again.halted is None and len(again.records) == 0
        assert again.notes[0].startswith("a new boot: the journal of 2 entries")
        async with again.writing() as log:
            await log.record_start(START)
        assert agree(again, booted)
    assert len(list(tmp_path.glob("journal.old-*"))) == 1


async def test_a_register_that_fits_nothing_halts_and_admits_nothing(tmp_path: Path) -> None:
    registers = MemoryRegisters()
    with measuring(tmp_path, registers) as measurement:
        await measurement.recover()
        async with measurement.writing() as log:
            await log.record_start(START)
    registers.extend(bytes(48))
    registers.extend(bytes(48))
    with measuring(tmp_path, registers) as again:
        await again.recover()
        assert again.halted is not None and "must be what the journal replays to" in again.halted
        with pytest.raises(MeasurementHalted):
            async with again.writing():
                raise AssertionError("the lock must not be had")


async def test_a_register_extended_behind_our_back_halts_at_the_next_record(
    tmp_path: Path,
) -> None:
    registers = MemoryRegisters()
    with measuring(tmp_path, registers) as measurement:
        await measurement.recover()
        async with measurement.writing() as log:
            await log.record_start(START)
            registers.extend(bytes(48))
            with pytest.raises(MeasurementHalted, match="somebody else writes it"):
                await log.record_container(start_of(1))
        with pytest.raises(MeasurementHalted):
            measurement.require_running()


async def test_a_register_not_at_zero_at_first_is_where_the_replay_begins(tmp_path: Path) -> None:
    registers = MemoryRegisters()
    registers.extend(b"\1" * 48)
    found = registers.value
    with measuring(tmp_path, registers) as measurement:
        await measurement.recover()
        assert measurement.start_value == found
        event = StartEvent(
            register_at_start=found.hex(),
            components=START.components,
            config_digest_sha384=START.config_digest_sha384,
        )
        async with measurement.writing() as log:
            await log.record_start(event)
    with measuring(tmp_path, registers) as again:
        await again.recover()
        assert again.halted is None and again.start_value == found
        assert agree(again, registers)


async def test_a_full_log_refuses_what_would_add_to_it_and_takes_known_starts(
    tmp_path: Path,
) -> None:
    registers = MemoryRegisters()
    with measuring(tmp_path, registers, log_limit_bytes=2048) as measurement:
        await measurement.recover()
        async with measurement.writing() as log:
            await log.record_start(START)
            await log.record_container(start_of(1))
            with pytest.raises(Conflict, match="has reached its configured maximum"):
                for number in range(2, 20):
                    await log.record_container(start_of(number))
            await log.record_container(start_of(1))
        assert measurement.halted is None
        assert agree(measurement, registers)
        assert sum(len(record.raw) for record in measurement.records) <= 2048


async def test_a_journal_that_takes_nothing_refuses_without_halting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registers = MemoryRegisters()
    with measuring(tmp_path, registers) as measurement:
        await measurement.recover()
        await begin(measurement)

        def full(self: Journal, entry: JournalEntry) -> None:
            raise RuntimeFailed("journal", "no space")

        monkeypatch.setattr(Journal, "append", full)
        async with measurement.writing() as log:
            with pytest.raises(RuntimeFailed, match="no space"):
                await log.record_container(start_of(1))
            assert registers.extensions == 1
            monkeypatch.undo()
            await log.record_container(start_of(1))
        assert agree(measurement, registers)


async def test_a_register_that_hangs_halts_measurement_and_abandons_the_thread(
    tmp_path: Path,
) -> None:
    release = threading.Event()

    class Hanging(MemoryRegisters):
        def extend(self, digest_sha384: bytes) -> None:
            release.wait(10)

    measurement = Measurement(
        [("hanging", Hanging())],
        Journal.open(tmp_path / "journal"),
        rtmr_index=3,
        extend_timeout_s=0.05,
        run_blocking=in_worker_thread,
    )
    await measurement.recover()
    with pytest.raises(MeasurementHalted, match=r"no answer from the register within 0\.05 s"):
        async with measurement.writing() as log:
            await log.record_start(START)
    release.set()
    assert measurement.halted is not None
    measurement.close()


async def test_a_cancelled_caller_cannot_cut_a_measurement_in_two(tmp_path: Path) -> None:
    class Slow(MemoryRegisters):
        def extend(self, digest_sha384: bytes) -> None:
            time.sleep(0.1)
            super().extend(digest_sha384)

    registers = Slow()
    measurement = Measurement(
        [("slow", registers)], Journal.open(tmp_path / "journal"), rtmr_index=3
    )
    await measurement.recover()
    with trio.move_on_after(0.02) as scope:
        async with measurement.writing() as log:
            await log.record_start(START)
            await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught
    assert len(measurement.records) == 1 and registers.extensions == 1
    assert agree(measurement, registers)
    measurement.close()


async def test_fifty_measurements_at_once_replay_to_the_register(tmp_path: Path) -> None:
    registers = MemoryRegisters()
    with measuring(tmp_path, registers) as measurement:
        await measurement.recover()
        await begin(measurement)

        async def one(number: int) -> None:
            async with measurement.writing() as log:
                await log.record_container(start_of(number))

        async with trio.open_nursery() as nursery:
            for number in range(50):
                nursery.start_soon(one, number)
        assert len(measurement.records) == 51
        assert agree(measurement, registers)


async def test_every_register_value_of_this_boot_has_its_log_prefix(tmp_path: Path) -> None:
    registers = MemoryRegisters()
    with measuring(tmp_path, registers) as measurement:
        await measurement.recover()
        await begin(measurement)
        values = [ZERO_REGISTER, registers.value]
        for number in range(5):
            async with measurement.writing() as log:
                await log.record_container(start_of(number))
            values.append(registers.value)
        for length, value in enumerate(values):
            prefix = measurement.prefix_for(value)
            assert prefix is not None and len(prefix) == length
        assert measurement.prefix_for(extend(registers.value, bytes(48))) is None


async def test_all_registers_are_extended_and_must_agree(tmp_path: Path) -> None:
    first, second = MemoryRegisters(), MemoryRegisters()
    measurement = Measurement(
        [("first", first), ("second", second)],
        Journal.open(tmp_path / "journal"),
        rtmr_index=3,
        run_blocking=run_at_once,
    )
    await measurement.recover()
    await begin(measurement)
    assert first.value == second.value == measurement.register != ZERO_REGISTER
    second.extend(bytes(48))
    async with measurement.writing() as log:
        with pytest.raises(MeasurementHalted, match="all configured registers must agree"):
            await log.record_container(start_of(1))
    measurement.close()


async def test_a_writer_that_holds_the_lock_records_nothing_after_a_halt(tmp_path: Path) -> None:
    registers = MemoryRegisters()
    with measuring(tmp_path, registers) as measurement:
        await measurement.recover()
        async with measurement.writing() as log:
            await log.record_start(START)
            measurement.halt("for a test")
            measurement.halt("later")
            assert measurement.halted == "for a test"
            with pytest.raises(MeasurementHalted, match="for a test"):
                await log.record_container(start_of(1))
        assert registers.extensions == 1


async def test_nothing_is_measured_before_the_supervisor_itself(tmp_path: Path) -> None:
    registers = MemoryRegisters()
    with measuring(tmp_path, registers) as measurement:
        await measurement.recover()
        async with measurement.writing() as log:
            with pytest.raises(RuntimeError, match="before anything else"):
                await log.record_container(start_of(1))
        assert registers.extensions == 0


async def test_a_journal_that_does_not_begin_with_the_supervisor_halts(tmp_path: Path) -> None:
    registers = MemoryRegisters()
    operation, content = encode_event(start_of(1))
    record = encode_record(3, operation, content)
    journal = Journal.open(tmp_path / "journal")
    journal.append(JournalEntry(record=record.raw))
    journal.close()
    registers.extend(record.digest_sha384)
    with measuring(tmp_path, registers) as measurement:
        await measurement.recover()
        assert measurement.halted is not None and "must begin with Start" in measurement.halted


async def test_a_fault_that_nobody_foresaw_halts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registers = MemoryRegisters()
    with measuring(tmp_path, registers) as measurement:
        await measurement.recover()
        await begin(measurement)

        def bug(self: Journal, entry: JournalEntry) -> None:
            raise ValueError("a bug")

        monkeypatch.setattr(Journal, "append", bug)
        with pytest.raises(MeasurementHalted):
            async with measurement.writing() as log:
                await log.record_container(start_of(1))
        assert measurement.halted is not None and "a bug" in measurement.halted


class CrashingMachine(RuleBasedStateMachine):
    """A supervisor that is killed anywhere against a register that survives: the model is
    the list of events whose extension took place."""

    measurement: Measurement

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.registers = MemoryRegisters()
        self.extended: list[int] = []
        self.restart()

    def restart(self) -> None:
        if hasattr(self, "measurement"):
            self.measurement.close()
        self.measurement = Measurement(
            [("memory", self.registers)],
            Journal.open(Path(self.folder.name, "journal")),
            rtmr_index=3,
            run_blocking=run_at_once,
        )
        trio.run(self.measurement.recover)
        trio.run(self.begin_log)

    async def begin_log(self) -> None:
        async with self.measurement.writing() as log:
            await log.record_start(START)

    async def record(self, number: int) -> None:
        async with self.measurement.writing() as log:
            await log.record_container(start_of(number))

    @rule(number=st.integers(0, 6))
    def start(self, number: int) -> None:
        trio.run(self.record, number)
        if number not in self.extended:
            self.extended.append(number)

    @rule(number=st.integers(0, 6), after=st.booleans())
    def start_and_be_killed_while_extending(self, number: int, after: bool) -> None:
        known = number in self.extended
        self.registers.fail_after, self.registers.fail_before = after, not after
        try:
            trio.run(self.record, number)
        except MeasurementHalted:
            assert not known
        finally:
            self.registers.fail_after = self.registers.fail_before = False
        if after and not known:
            self.extended.append(number)
        self.restart()

    @rule()
    def be_killed_while_idle(self) -> None:
        self.restart()

    @rule()
    def boot_anew(self) -> None:
        self.registers = MemoryRegisters()
        self.extended = []
        self.restart()

    @invariant()
    def log_and_register_agree(self) -> None:
        if not hasattr(self, "measurement"):
            return
        assert self.measurement.halted is None
        assert agree(self.measurement, self.registers)
        assert len(self.measurement.records) == 1 + len(self.extended)

    def teardown(self) -> None:
        if hasattr(self, "measurement"):
            self.measurement.close()
            self.folder.cleanup()


CrashingMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
TestCrashingMachine = CrashingMachine.TestCase
