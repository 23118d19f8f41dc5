"""The supervisor's log, taken apart once: what every other check reads it through."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import msgspec

from supervisor.formats.boot_log import BootEvent
from supervisor.formats.errors import FormatError
from supervisor.formats.event_log import ZERO_REGISTER, LogRecord, split_log
from supervisor.formats.log_events import (
    AdmitImagesEvent,
    LogEvent,
    SealEvent,
    StartContainerEvent,
    StartEvent,
    UnknownEvent,
    decode_event,
)

_E = TypeVar("_E", bound=LogEvent | UnknownEvent)


class LogEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One record at its `position` (from 0), with what it says."""

    position: int
    record: LogRecord
    event: LogEvent | UnknownEvent

    @property
    def digest_sha384(self) -> str:
        """Hex, recomputed from the record's bytes."""
        return self.record.digest_sha384.hex()


class SupervisorLog(msgspec.Struct, frozen=True, kw_only=True):
    """All entries in order. Their digests were recomputed from their bytes."""

    boot_events: tuple[BootEvent, ...]
    entries: tuple[LogEntry, ...]

    def of(self, kind: type[_E]) -> Iterator[tuple[LogEntry, _E]]:
        """The entries whose event is of this kind, in order."""
        for entry in self.entries:
            if isinstance(entry.event, kind):
                yield entry, entry.event

    @property
    def starts(self) -> tuple[tuple[LogEntry, StartEvent], ...]:
        return tuple(self.of(StartEvent))

    @property
    def containers(self) -> tuple[tuple[LogEntry, StartContainerEvent], ...]:
        return tuple(self.of(StartContainerEvent))

    @property
    def unknown(self) -> tuple[tuple[LogEntry, UnknownEvent], ...]:
        return tuple(self.of(UnknownEvent))

    @property
    def sealed(self) -> bool:
        return any(True for _ in self.of(SealEvent))

    @property
    def at_start(self) -> bytes:
        """What the first supervisor found in the register: 48 bytes, zero on a fresh TD."""
        first = self.entries[0].event if self.entries else None
        if isinstance(first, StartEvent) and first.register_at_start is not None:
            return bytes.fromhex(first.register_at_start)
        return ZERO_REGISTER

    def admitted(self, before: int | None = None) -> tuple[str, ...]:
        """Ids of the images admitted by entries before this position (None: all), in order."""
        return tuple(
            image_id
            for entry, event in self.of(AdmitImagesEvent)
            if before is None or entry.position < before
            for image_id in event.image_ids
        )


def read_log(raw: bytes, *, rtmr_index: int) -> SupervisorLog:
    """Parse the evidence's log. Raises `FormatError` naming the offset or the record."""
    split = split_log(raw, rtmr_index=rtmr_index)
    entries = []
    for position, record in enumerate(split.records):
        try:
            event = decode_event(record.operation, record.content)
        except FormatError as error:
            raise FormatError(
                f"log record {position}, {error.item}",
                error.rule,
                expected=error.expected,
                actual=error.actual,
            ) from None
        entries.append(LogEntry(position=position, record=record, event=event))
    return SupervisorLog(boot_events=split.boot_events, entries=tuple(entries))
