"""The firmware's event log (CCEL): TCG2 crypto agile, with CC measurement register indices.

Sources: TCG PC Client Platform Firmware Profile, "Crypto Agile Log Entry Format"; UEFI 2.10
§38.4.1 for the register indices (0 MRTD, 1 to 4 RTMR 0 to 3). All integers little-endian.

What an event's data says is authenticated only where its digest is the hash of that data
(`BootEvent.data_matches_digest`); of all others only the digest is.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Iterable, Iterator

import msgspec

from supervisor.formats.errors import FormatError

MAX_BOOT_LOG_BYTES = 8 * 1024 * 1024
MAX_BOOT_EVENTS = 65_536
MAX_ALGORITHMS = 16
EV_NO_ACTION = 3
EV_EVENT_TAG = 6
ALGORITHM_SHA384 = 0x000C
SHA384_BYTES = 48
REGISTER_COUNT = 4
END_FILLER_BYTES = 8
# The largest digest that TCG's algorithm registry has.
_MAX_DIGEST_BYTES = 64
_SPEC_ID_SIGNATURE = b"Spec ID Event03\x00"
_FILLERS = (bytes(END_FILLER_BYTES), b"\xff" * END_FILLER_BYTES)

_SHA1_HEADER = struct.Struct("<II20sI")
_SPEC_ID_FIXED = struct.Struct("<16sIBBBBI")
_EVENT_HEADER = struct.Struct("<III")
_U16_PAIR = struct.Struct("<HH")
_U16 = struct.Struct("<H")
_U32 = struct.Struct("<I")


class BootEvent(msgspec.Struct, frozen=True):
    """One event. `mr_index` is 0 for MRTD, 1 to 4 for RTMR 0 to 3; `offset` is in the log.

    `digest_sha384` is what the log says (48 bytes), or None where it has none of that kind.
    """

    mr_index: int
    event_type: int
    digest_sha384: bytes | None
    data: bytes
    offset: int

    @property
    def data_matches_digest(self) -> bool:
        """Whether the digest is that of the data, so that a register vouches for the data."""
        if self.digest_sha384 is None:
            return False
        return hmac.compare_digest(hashlib.sha384(self.data).digest(), self.digest_sha384)


class BootLog(msgspec.Struct, frozen=True):
    """`events` without the header event; the log's bytes proper are `raw[:end_offset]`."""

    events: tuple[BootEvent, ...]
    end_offset: int


class LogHeader(msgspec.Struct, frozen=True):
    """The first event: which digest algorithms (TCG ids and sizes in bytes) events may have."""

    digest_sizes: dict[int, int]
    end_offset: int


def sha384_only_header() -> bytes:
    """A header event of 65 bytes: Spec ID Event03, version 2.0, SHA-384 alone, no vendor data.

    It has TCG's signature text: other parsers refuse a header without it.
    """
    spec_id = _SPEC_ID_FIXED.pack(_SPEC_ID_SIGNATURE, 0, 0, 2, 0, 2, 1)
    spec_id += _U16_PAIR.pack(ALGORITHM_SHA384, SHA384_BYTES) + b"\x00"
    return _SHA1_HEADER.pack(1, EV_NO_ACTION, bytes(20), len(spec_id)) + spec_id


def parse_boot_log(raw: bytes) -> BootLog:
    """Parse a CCEL up to its end, which is an event boundary where filler begins.

    Filler is 8 bytes of 00 or of FF (fewer where the area ends sooner); what lies behind it
    is not looked at. Raises `FormatError` only.
    """
    if len(raw) > MAX_BOOT_LOG_BYTES:
        raise FormatError(
            "boot log", "too long", expected=f"at most {MAX_BOOT_LOG_BYTES} bytes", actual=len(raw)
        )
    header = parse_log_header(raw)
    events: list[BootEvent] = []
    end_offset = header.end_offset
    for event, next_offset in walk_events(raw, header):
        if len(events) == MAX_BOOT_EVENTS:
            raise FormatError("boot log", "too many events", expected=f"at most {MAX_BOOT_EVENTS}")
        events.append(event)
        end_offset = next_offset
    return BootLog(tuple(events), end_offset)


def parse_log_header(raw: bytes) -> LogHeader:
    """Parse the header event (TCG_PCClientPCREvent holding TCG_EfiSpecIDEvent)."""
    item = "event log header"
    if len(raw) < _SHA1_HEADER.size + _SPEC_ID_FIXED.size:
        raise FormatError(item, "the log ends inside its header event", actual=f"{len(raw)} bytes")
    _, event_type, digest, size = _SHA1_HEADER.unpack_from(raw)
    if event_type != EV_NO_ACTION or any(digest):
        raise FormatError(
            item,
            "the first event must be EV_NO_ACTION with a digest of zeros",
            expected=EV_NO_ACTION,
            actual=event_type,
        )
    end_offset = _SHA1_HEADER.size + size
    if end_offset > len(raw):
        raise FormatError(
            item,
            "the header event must lie inside the log",
            expected=f"at most {len(raw) - _SHA1_HEADER.size} bytes",
            actual=size,
        )
    data = raw[_SHA1_HEADER.size : end_offset]
    if len(data) < _SPEC_ID_FIXED.size:
        raise FormatError(item, "the Spec ID event is cut short", actual=f"{len(data)} bytes")
    signature, _, _, major, _, _, algorithms = _SPEC_ID_FIXED.unpack_from(data)
    if signature != _SPEC_ID_SIGNATURE or major != 2:
        raise FormatError(
            item,
            "the log must be in TCG's crypto agile format",
            expected="Spec ID Event03, version 2",
            actual=f"{signature.hex()}, version {major}",
        )
    if not 1 <= algorithms <= MAX_ALGORITHMS:
        raise FormatError(
            item, "number of algorithms", expected=f"1 to {MAX_ALGORITHMS}", actual=algorithms
        )
    vendor_at = _SPEC_ID_FIXED.size + algorithms * _U16_PAIR.size
    if len(data) <= vendor_at or len(data) != vendor_at + 1 + data[vendor_at]:
        raise FormatError(
            item, "the algorithm list and vendor data must fill the event", actual=len(data)
        )
    digest_sizes: dict[int, int] = {}
    for algorithm, digest_bytes in _U16_PAIR.iter_unpack(data[_SPEC_ID_FIXED.size : vendor_at]):
        if algorithm in digest_sizes or not 1 <= digest_bytes <= _MAX_DIGEST_BYTES:
            raise FormatError(
                item, "each algorithm comes once, with a sane size", actual=hex(algorithm)
            )
        digest_sizes[algorithm] = digest_bytes
    if digest_sizes.get(ALGORITHM_SHA384, SHA384_BYTES) != SHA384_BYTES:
        raise FormatError(item, "a SHA-384 digest has 48 bytes")
    return LogHeader(digest_sizes, end_offset)


def is_filler(raw: bytes, offset: int) -> bool:
    """Whether at this event boundary the log has ended and filler (00 or FF) begins."""
    rest = raw[offset : offset + END_FILLER_BYTES]
    return any(filler.startswith(rest) for filler in _FILLERS)


def walk_events(raw: bytes, header: LogHeader) -> Iterator[tuple[BootEvent, int]]:
    """Each event with the offset behind it, until filler or the end. Raises `FormatError`."""
    offset = header.end_offset
    while not is_filler(raw, offset):
        event, offset = parse_event(raw, offset, header)
        yield event, offset


def parse_event(raw: bytes, offset: int, header: LogHeader) -> tuple[BootEvent, int]:
    """One TCG_PCR_EVENT2 at `offset`, and the offset behind it. Raises `FormatError`."""
    item = f"event log, event at {offset}"
    start = offset
    try:
        mr_index, event_type, count = _EVENT_HEADER.unpack_from(raw, offset)
        offset += _EVENT_HEADER.size
        if mr_index > REGISTER_COUNT:
            raise FormatError(
                item, "unknown measurement register", expected="0 to 4", actual=mr_index
            )
        if not 1 <= count <= len(header.digest_sizes):
            raise FormatError(
                item,
                "an event has at most one digest for each of the header's algorithms",
                expected=f"1 to {len(header.digest_sizes)}",
                actual=count,
            )
        digests: dict[int, bytes] = {}
        for _ in range(count):
            (algorithm,) = _U16.unpack_from(raw, offset)
            digest_bytes = header.digest_sizes.get(algorithm)
            if digest_bytes is None or algorithm in digests:
                raise FormatError(
                    item, "a digest's algorithm is in the header, once", actual=hex(algorithm)
                )
            offset += _U16.size
            digests[algorithm] = raw[offset : offset + digest_bytes]
            offset += digest_bytes
        (size,) = _U32.unpack_from(raw, offset)
        offset += _U32.size
    except struct.error:
        raise FormatError(
            item, "the log ends inside an event", actual=f"{len(raw)} bytes"
        ) from None
    if size > len(raw) - offset:
        raise FormatError(
            item,
            "the event's data must lie inside the log",
            expected=f"at most {len(raw) - offset} bytes",
            actual=size,
        )
    data = raw[offset : offset + size]
    event = BootEvent(mr_index, event_type, digests.get(ALGORITHM_SHA384), data, start)
    return event, offset + size


def replay_rtmrs(events: Iterable[BootEvent]) -> dict[int, bytes]:
    """What RTMR 0 to 3 hold after these events: always four entries of 48 bytes.

    A register without an event stays zero and must be compared too. EV_NO_ACTION events and
    MRTD are not extended. Raises `FormatError` for an event without a SHA-384 digest.
    """
    registers = [bytes(SHA384_BYTES)] * REGISTER_COUNT
    for event in events:
        if event.event_type == EV_NO_ACTION or event.mr_index == 0:
            continue
        if event.digest_sha384 is None:
            raise FormatError(
                f"event log, event at {event.offset}", "a TDX event has a SHA-384 digest"
            )
        if not 1 <= event.mr_index <= REGISTER_COUNT:
            raise FormatError(
                f"event log, event at {event.offset}",
                "unknown measurement register",
                expected="0 to 4",
                actual=event.mr_index,
            )
        index = event.mr_index - 1
        registers[index] = hashlib.sha384(registers[index] + event.digest_sha384).digest()
    return dict(enumerate(registers))
