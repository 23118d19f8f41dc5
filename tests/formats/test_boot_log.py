"""CCEL parsing: real logs to their registers, and logs that lie about their sizes."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.formats.boot_log import (
    EV_NO_ACTION,
    BootEvent,
    parse_boot_log,
    replay_rtmrs,
    sha384_only_header,
)
from supervisor.formats.errors import FormatError

CCELS = ["CCEL_AAEL_alibabacloud", "CCEL_data_gcp", "CCEL_data_grub", "CCEL_data_ovmf"]
SPEC_ID = b"Spec ID Event03\x00"


def header(
    algorithms: list[tuple[int, int]],
    *,
    signature: bytes = SPEC_ID,
    vendor: bytes = b"",
    count: int | None = None,
    major: int = 2,
) -> bytes:
    data = signature + struct.pack("<IBBBB", 0, 0, major, 0, 2)
    data += struct.pack("<I", len(algorithms) if count is None else count)
    data += b"".join(struct.pack("<HH", *pair) for pair in algorithms)
    data += bytes([len(vendor)]) + vendor
    return struct.pack("<II20sI", 1, EV_NO_ACTION, bytes(20), len(data)) + data


def event(
    mr_index: int, event_type: int, digests: list[tuple[int, bytes]], data: bytes = b""
) -> bytes:
    packed = struct.pack("<III", mr_index, event_type, len(digests))
    for algorithm, digest in digests:
        packed += struct.pack("<H", algorithm) + digest
    return packed + struct.pack("<I", len(data)) + data


SHA384_EVENT = event(2, 4, [(0xC, b"\x22" * 48)], b"data")


@pytest.mark.parametrize("name", CCELS)
def test_a_real_log_replays_to_its_registers(vectors: Path, name: str) -> None:
    expected = json.loads((vectors / "expected.json").read_text())["ccel"][name]
    log = parse_boot_log((vectors / "ccel" / name).read_bytes())
    assert log.end_offset == expected["log_end"]
    assert len(log.events) + 1 == expected["events"]
    registers = replay_rtmrs(log.events)
    assert sorted(registers) == [0, 1, 2, 3]
    for index, value in registers.items():
        assert value.hex() == expected["rtmr"].get(str(index), "00" * 48)


@pytest.mark.parametrize("name", ["CCEL_AAEL_alibabacloud", "CCEL_data_grub", "CCEL_data_ovmf"])
def test_a_real_log_has_the_digests_that_another_parser_saw(vectors: Path, name: str) -> None:
    seen = json.loads((vectors / "ccel" / f"{name}_out.json").read_text())["uefi_event_logs"]
    log = parse_boot_log((vectors / "ccel" / name).read_bytes())
    extended = [event for event in log.events if event.event_type != EV_NO_ACTION]
    wanted = [other for other in seen if other["type_name"] != "EV_NO_ACTION"]
    assert len(extended) == len(wanted) > 0
    for ours, other in zip(extended, wanted, strict=True):
        assert ours.mr_index == other["index"]
        assert ours.digest_sha384 is not None
        assert ours.digest_sha384.hex() == other["digests"][0]["digest"]
        assert ours.data_matches_digest == (
            hashlib.sha384(ours.data).hexdigest() == other["digests"][0]["digest"]
        )


def test_foreign_aael_records_are_events_whose_data_their_digest_vouches_for(
    vectors: Path,
) -> None:
    log = parse_boot_log((vectors / "ccel" / "CCEL_AAEL_alibabacloud").read_bytes())
    tagged = [event for event in log.events if event.mr_index == 4]
    assert [event.offset for event in tagged] == [11447, 11557]
    assert all(event.data_matches_digest for event in tagged)
    assert tagged[0].data[8:] == b"coco.com some-operation some-content"


def test_the_made_header_has_65_bytes_and_parses() -> None:
    raw = sha384_only_header()
    assert raw == header([(0xC, 48)])
    assert len(raw) == 65
    assert parse_boot_log(raw).events == ()
    assert parse_boot_log(raw).end_offset == 65


@pytest.mark.parametrize("filler", [bytes(8), b"\xff" * 8, bytes(3), b"\xff" * 7, b""])
def test_the_log_ends_where_filler_begins_whatever_lies_behind(filler: bytes) -> None:
    start = header([(0xC, 48)]) + SHA384_EVENT
    log = parse_boot_log(start + filler + (b"anything" if len(filler) == 8 else b""))
    assert log.end_offset == len(start)
    (only,) = log.events
    assert only == BootEvent(2, 4, b"\x22" * 48, b"data", 65)
    assert replay_rtmrs(log.events)[1] == hashlib.sha384(bytes(48) + b"\x22" * 48).digest()


def test_zeros_inside_the_header_and_inside_an_event_are_not_its_end() -> None:
    inside = event(1, 4, [(0xC, bytes(48))], bytes(64))
    log = parse_boot_log(header([(0xC, 48)]) + inside + SHA384_EVENT + bytes(8))
    assert [one.mr_index for one in log.events] == [1, 2]


def test_no_action_events_and_mrtd_are_not_extended() -> None:
    raw = header([(0xC, 48)])
    raw += event(1, EV_NO_ACTION, [(0xC, b"\x01" * 48)]) + event(0, 4, [(0xC, b"\x01" * 48)])
    log = parse_boot_log(raw)
    assert len(log.events) == 2
    assert set(replay_rtmrs(log.events).values()) == {bytes(48)}


def test_of_several_digests_the_sha384_one_counts() -> None:
    raw = header([(0xB, 32), (0xC, 48)], vendor=b"abc")
    raw += event(1, 4, [(0xB, b"\x0b" * 32), (0xC, b"\x0c" * 48)])
    raw += event(1, 4, [(0xB, b"\x0b" * 32)])
    both, one = parse_boot_log(raw).events
    assert both.digest_sha384 == b"\x0c" * 48
    assert one.digest_sha384 is None
    assert not one.data_matches_digest
    with pytest.raises(FormatError, match="SHA-384"):
        replay_rtmrs([both, one])


GOOD_HEADER = header([(0xC, 48)])
BAD_LOGS = {
    "empty": b"",
    "header cut short": GOOD_HEADER[:-1],
    "header of another type": struct.pack("<II", 1, 4) + GOOD_HEADER[8:],
    "header with a digest": GOOD_HEADER[:8] + b"\x01" + GOOD_HEADER[9:],
    "header larger than the log": GOOD_HEADER[:28]
    + struct.pack("<I", 2**32 - 1)
    + GOOD_HEADER[32:],
    "other signature": header([(0xC, 48)], signature=bytes(16)),
    "version 1": header([(0xC, 48)], major=1),
    "no algorithm": header([]),
    "algorithms beyond the event": header([(0xC, 48)], count=2),
    "very many algorithms": header([(0xC, 48)], count=2**32 - 1),
    "an algorithm twice": header([(0xC, 48), (0xC, 48)]),
    "SHA-384 of 32 bytes": header([(0xC, 32)]),
    "digest of no size": header([(0xB, 0), (0xC, 48)]),
    "register 5": GOOD_HEADER + event(5, 4, [(0xC, bytes(48))]),
    "no digest": GOOD_HEADER + event(1, 4, []),
    "more digests than algorithms": GOOD_HEADER + event(1, 4, [(0xC, bytes(48))] * 2),
    "unknown algorithm": GOOD_HEADER + event(1, 4, [(0xB, bytes(32))]),
    "a digest twice": header([(0xB, 32), (0xC, 48)]) + event(1, 4, [(0xC, bytes(48))] * 2),
    "data beyond the log": GOOD_HEADER + SHA384_EVENT[:-1],
    "cut inside the digest": GOOD_HEADER + SHA384_EVENT[:20],
    "cut inside the sizes": GOOD_HEADER + SHA384_EVENT[:9],
    "half a filler": GOOD_HEADER + SHA384_EVENT + bytes(4) + b"\xff" * 4,
}


@pytest.mark.parametrize("raw", BAD_LOGS.values(), ids=BAD_LOGS.keys())
def test_a_malformed_log_is_refused(raw: bytes) -> None:
    with pytest.raises(FormatError):
        parse_boot_log(raw)


def test_a_log_beyond_the_bounds_is_refused() -> None:
    tiny = event(1, 4, [(0xB, b"\x01")])
    start = header([(0xB, 1)])
    assert len(parse_boot_log(start + tiny * 65_536).events) == 65_536
    with pytest.raises(FormatError, match="too many"):
        parse_boot_log(start + tiny * 65_537)
    with pytest.raises(FormatError, match="too long"):
        parse_boot_log(start + bytes(8 * 1024 * 1024))


@given(st.binary(max_size=200), st.integers(0, 200), st.integers(0, 255))
def test_no_input_makes_the_parser_raise_anything_else(tail: bytes, at: int, value: int) -> None:
    raw = bytearray(GOOD_HEADER + SHA384_EVENT * 2 + tail)
    raw[at % len(raw)] = value
    try:
        log = parse_boot_log(bytes(raw))
        replay_rtmrs(log.events)
    except FormatError:
        return
    assert 65 <= log.end_offset <= len(raw)
