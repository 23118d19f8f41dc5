"""Our measurement log: CoCo AAEL records in TCG2 crypto agile form, RTMR[3] by default.

A record (formats: confidential-containers guest-components, AAEL; TCG_PCR_EVENT2), all
integers little-endian:

    0   u32  measurement register = RTMR index + 1        14  48 B  SHA-384 of bytes 66 to the end
    4   u32  event type 6, EV_EVENT_TAG                   62  u32   8 + n
    8   u32  number of digests, 1                         66  u32   tag 0x4141454C
    12  u16  digest algorithm 0x000C, SHA-384             70  u32   n
                                                          74  n B   `<domain> <operation> <content>`

A digest that a log supplies is never believed: it is recomputed and must be equal.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterable

import msgspec

from supervisor.formats.boot_log import (
    ALGORITHM_SHA384,
    END_FILLER_BYTES,
    EV_EVENT_TAG,
    MAX_BOOT_EVENTS,
    MAX_BOOT_LOG_BYTES,
    REGISTER_COUNT,
    BootEvent,
    is_filler,
    parse_boot_log,
    parse_event,
    parse_log_header,
    sha384_only_header,
)
from supervisor.formats.errors import FormatError

DOMAIN = "attested-containers"
LOG_RTMR_INDEX = 3
ZERO_REGISTER = bytes(48)
MAX_RECORDS = 262_144
MAX_CONTENT_BYTES = 1024 * 1024
MAX_LOG_BYTES = 40 * 1024 * 1024
END_OF_LOG = b"\xff" * END_FILLER_BYTES

_AAEL_TAG = 0x4141454C
_AAEL_TAG_BYTES = _AAEL_TAG.to_bytes(4, "little")
_HEAD = struct.Struct("<IIIH48sIII")
_TAGGED_AT = 66
_TEXT_AT = _HEAD.size
_MAX_TEXT_BYTES = MAX_CONTENT_BYTES + 256
_DOMAIN_PATTERN = re.compile(r"[!-~]{1,128}")
_OPERATION_PATTERN = re.compile(r"[A-Za-z][A-Za-z0-9]{0,63}")
# A content that begins with a space would make the second separator two spaces.
_TEXT_PATTERN = re.compile(
    rb"([!-~]{1,128}) ([A-Za-z][A-Za-z0-9]{0,63}) ([^ \x00\n][^\x00\n]*)", re.DOTALL
)
_OWN_TEXT_START = DOMAIN.encode() + b" "


class LogRecord(msgspec.Struct, frozen=True):
    """One record; `raw` are its bytes in the log, `content` what follows the second space."""

    rtmr_index: int
    domain: str
    operation: str
    content: bytes
    raw: bytes
    digest_sha384: bytes


class SplitLog(msgspec.Struct, frozen=True):
    """The two parts of an evidence log. `boot_log` are the bytes before our first record.

    `boot_events` leave out the header event; AAEL records of another domain are among them.
    """

    boot_log: bytes
    boot_events: tuple[BootEvent, ...]
    records: tuple[LogRecord, ...]


def encode_record(
    rtmr_index: int, operation: str, content: bytes, *, domain: str = DOMAIN
) -> LogRecord:
    """Make the record of one event. `content` is UTF-8 without NUL, LF or leading space.

    Raises `FormatError` for what `parse_records` would refuse.
    """
    item = f"log record {operation[:64]}"
    if not 0 <= rtmr_index < REGISTER_COUNT:
        raise FormatError(item, "no such register", expected="0 to 3", actual=rtmr_index)
    if _DOMAIN_PATTERN.fullmatch(domain) is None:
        raise FormatError(item, "a domain is printable ASCII without spaces", actual=domain[:128])
    if _OPERATION_PATTERN.fullmatch(operation) is None:
        raise FormatError(
            item, "an operation is a letter followed by letters and digits", actual=operation[:64]
        )
    text = f"{domain} {operation} ".encode() + content
    _check_text(text, item=item)
    tagged = struct.pack("<II", _AAEL_TAG, len(text)) + text
    digest = hashlib.sha384(tagged).digest()
    head = _HEAD.pack(
        rtmr_index + 1,
        EV_EVENT_TAG,
        1,
        ALGORITHM_SHA384,
        digest,
        len(tagged),
        _AAEL_TAG,
        len(text),
    )
    return LogRecord(rtmr_index, domain, operation, content, head + text, digest)


def _check_text(text: bytes, *, item: str) -> re.Match[bytes]:
    if len(text) > _MAX_TEXT_BYTES:
        raise FormatError(
            item,
            "a record's text is bounded",
            expected=f"{_MAX_TEXT_BYTES} bytes",
            actual=len(text),
        )
    match = _TEXT_PATTERN.fullmatch(text)
    if match is None:
        raise FormatError(
            item,
            "a record's text is `<domain> <operation> <content>`, single spaces, no NUL or LF",
            actual=ascii(text[:80]),
        )
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise FormatError(
            item, "a record's text is UTF-8", actual=f"byte {error.start} is not"
        ) from None
    return match


def _parse_record(raw: bytes, offset: int, rtmr_index: int) -> LogRecord:
    item = f"log record at {offset}"
    if len(raw) - offset < _TEXT_AT:
        raise FormatError(item, "the log ends inside a record", actual=f"{len(raw)} bytes")
    register, event_type, digests, algorithm, digest, size, tag, text_bytes = _HEAD.unpack_from(
        raw, offset
    )
    if (register, event_type, digests, algorithm, tag) != (
        rtmr_index + 1,
        EV_EVENT_TAG,
        1,
        ALGORITHM_SHA384,
        _AAEL_TAG,
    ):
        raise FormatError(
            item,
            "register, event type, digests, algorithm and tag of an AAEL record",
            expected=f"{rtmr_index + 1}, {EV_EVENT_TAG}, 1, {ALGORITHM_SHA384}, {_AAEL_TAG:#x}",
            actual=f"{register}, {event_type}, {digests}, {algorithm}, {tag:#x}",
        )
    end = offset + _TEXT_AT + text_bytes
    if size != 8 + text_bytes or end > len(raw):
        raise FormatError(
            item,
            "the text fills its event, which lies inside the log",
            expected=f"{8 + text_bytes} bytes, at most {len(raw) - offset - _TAGGED_AT}",
            actual=size,
        )
    computed = hashlib.sha384(raw[offset + _TAGGED_AT : end]).digest()
    if computed != digest:
        raise FormatError(
            item, "the digest is that of the event", expected=computed.hex(), actual=digest.hex()
        )
    domain, operation, content = _check_text(raw[offset + _TEXT_AT : end], item=item).groups()
    return LogRecord(
        rtmr_index, domain.decode(), operation.decode(), content, raw[offset:end], digest
    )


def parse_records(raw: bytes, *, rtmr_index: int = LOG_RTMR_INDEX) -> tuple[LogRecord, ...]:
    """Parse our records, one behind the other, nothing before, between or after them.

    Each must be of our domain and of register `rtmr_index`. Digests are recomputed.
    Whether contents mean something is for `log_events.decode_event`. Raises `FormatError`.
    """
    return _parse_records_from(raw, 0, len(raw), rtmr_index)


def _parse_records_from(
    raw: bytes, offset: int, end: int, rtmr_index: int
) -> tuple[LogRecord, ...]:
    if len(raw) > MAX_LOG_BYTES:
        raise FormatError(
            "event log", "too long", expected=f"at most {MAX_LOG_BYTES} bytes", actual=len(raw)
        )
    records: list[LogRecord] = []
    while offset < end:
        if len(records) == MAX_RECORDS:
            raise FormatError("event log", "too many records", expected=f"at most {MAX_RECORDS}")
        record = _parse_record(raw, offset, rtmr_index)
        if record.domain != DOMAIN:
            raise FormatError(
                f"log record at {offset}",
                "a record of another domain has no place here",
                expected=DOMAIN,
                actual=record.domain,
            )
        records.append(record)
        offset += len(record.raw)
    if offset != end:
        raise FormatError("event log", "the last record must end with the log", actual=offset)
    return tuple(records)


def extend(register: bytes, digest: bytes) -> bytes:
    """SHA384(register || digest): both 48 bytes, and so is the result."""
    if len(register) != 48 or len(digest) != 48:
        raise FormatError(
            "register",
            "registers and digests have 48 bytes",
            actual=f"{len(register)}, {len(digest)}",
        )
    return hashlib.sha384(register + digest).digest()


def replay(digests: Iterable[bytes], start: bytes = ZERO_REGISTER) -> bytes:
    """What a register that held `start` holds after these digests (48 bytes each)."""
    register = start
    for digest in digests:
        register = extend(register, digest)
    return register


def assemble_log(boot_log: bytes | None, records: Iterable[bytes]) -> bytes:
    """The log as evidence carries it: boot log, records, 8 x FF.

    `boot_log` is a CCEL with or without its filler, which is cut off; without one a header
    event is made. `records` are `LogRecord.raw` values and are not parsed again. Raises
    `FormatError` for a boot log that cannot be parsed, or that holds records of our domain:
    these could not be told from ours.
    """
    if boot_log is None:
        start = sha384_only_header()
    else:
        parsed = parse_boot_log(boot_log)
        for event in parsed.events:
            if _is_own(event):
                raise FormatError(
                    f"boot log, event at {event.offset}", "firmware does not use our domain"
                )
        start = boot_log[: parsed.end_offset]
    return b"".join((start, *records, END_OF_LOG))


def _is_own(event: BootEvent) -> bool:
    # Whatever the event's type says: one of ours must not pass as something else.
    data = event.data
    return data.startswith(_AAEL_TAG_BYTES) and data.startswith(_OWN_TEXT_START, 8)


def split_log(raw: bytes, *, rtmr_index: int = LOG_RTMR_INDEX) -> SplitLog:
    """Take an evidence log apart: `assemble_log`'s inverse.

    From the first record of our domain on there are only such records, all in register
    `rtmr_index`; the log ends with 8 x FF and nothing behind. A boot event in that register
    must have the digest of its data. Raises `FormatError`.
    """
    if len(raw) > MAX_LOG_BYTES:
        raise FormatError(
            "event log", "too long", expected=f"at most {MAX_LOG_BYTES} bytes", actual=len(raw)
        )
    header = parse_log_header(raw)
    end = len(raw) - END_FILLER_BYTES
    if end < header.end_offset or not raw.endswith(END_OF_LOG):
        raise FormatError("event log", "an evidence log ends with 8 bytes of FF")
    boot_events: list[BootEvent] = []
    offset = header.end_offset
    while offset < end:
        if is_filler(raw, offset):
            raise FormatError(
                f"event log at {offset}", "nothing lies behind the end of the log", expected=end
            )
        event, behind = parse_event(raw, offset, header)
        if _is_own(event):
            break
        if event.mr_index == rtmr_index + 1 and not event.data_matches_digest:
            # A record of ours with another text under its old digest would hide here.
            raise FormatError(
                f"event log, event at {offset}",
                "in our register every digest is that of its event's data",
            )
        if len(boot_events) == MAX_BOOT_EVENTS or behind > MAX_BOOT_LOG_BYTES:
            raise FormatError(
                "boot log",
                "too many events",
                expected=f"at most {MAX_BOOT_EVENTS}, {MAX_BOOT_LOG_BYTES} bytes",
            )
        boot_events.append(event)
        offset = behind
    if offset > end:
        raise FormatError("event log", "the last event must end where the log does", actual=offset)
    records = _parse_records_from(raw[:end], offset, end, rtmr_index)
    return SplitLog(raw[:offset], tuple(boot_events), records)
