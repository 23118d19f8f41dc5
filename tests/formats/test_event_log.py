"""AAEL records: the layout byte by byte, strictness, and the log as evidence carries it."""

from __future__ import annotations

import hashlib
import json
import struct
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.formats.boot_log import parse_boot_log, replay_rtmrs, sha384_only_header
from supervisor.formats.errors import FormatError
from supervisor.formats.event_log import (
    DOMAIN,
    MAX_CONTENT_BYTES,
    ZERO_REGISTER,
    assemble_log,
    encode_record,
    extend,
    parse_records,
    replay,
    split_log,
)

CONTENT = b'{"critical":true,"text":"with  two spaces, \xc3\xa4"}'
OPERATIONS = st.from_regex(r"[A-Za-z][A-Za-z0-9]{0,10}", fullmatch=True)
CONTENTS = (
    st.text(st.characters(exclude_characters="\x00\n", exclude_categories=["Cs"]), min_size=1)
    .filter(lambda text: not text.startswith(" "))
    .map(str.encode)
)


def by_hand(
    text: bytes,
    *,
    register: int = 4,
    event_type: int = 6,
    digests: int = 1,
    algorithm: int = 0xC,
    digest: bytes | None = None,
    tag: bytes = b"LEAA",
    size: int | None = None,
    text_bytes: int | None = None,
) -> bytes:
    n = len(text) if text_bytes is None else text_bytes
    tagged = tag + struct.pack("<I", n) + text
    if digest is None:
        digest = hashlib.sha384(tagged).digest()
    head = struct.pack("<IIIH", register, event_type, digests, algorithm) + digest
    return head + struct.pack("<I", len(tagged) if size is None else size) + tagged


OWN = b"attested-containers Seal " + CONTENT


def test_a_record_is_laid_out_as_coco_does() -> None:
    record = encode_record(3, "Seal", CONTENT)
    assert record.raw == by_hand(OWN)
    assert record.raw[:4] == b"\x04\x00\x00\x00"
    assert record.raw[66:70] == b"\x4c\x45\x41\x41"
    assert record.digest_sha384 == record.raw[14:62] == hashlib.sha384(record.raw[66:]).digest()
    assert parse_records(record.raw) == (record,)


def test_the_digest_of_cocos_own_test_entry_comes_out() -> None:
    # guest-components, attestation-agent eventlog tests: domain, operation, content.
    record = encode_record(3, "operation", b"content", domain="domain")
    assert record.digest_sha384.hex() == (
        "dad5f0e226318ffa9839b75a472c6aa7fdb5834949d0a0a22990cf04d5692440"
        "fb00f3aa0609db7e49cd8d793f670d02"
    )
    event = parse_boot_log(assemble_log(None, [record.raw])).events[0]
    assert event.data == b"LEAA" + struct.pack("<I", 24) + b"domain operation content"
    assert replay_rtmrs([event])[3] == replay([record.digest_sha384])


def test_the_records_of_a_real_log_extend_its_register(vectors: Path) -> None:
    raw = (vectors / "ccel" / "CCEL_AAEL_alibabacloud").read_bytes()
    expected = json.loads((vectors / "expected.json").read_text())["ccel"]
    split = split_log(raw)
    assert split.records == ()
    assert split.boot_log == raw[:-8]
    digests = [event.digest_sha384 for event in split.boot_events if event.mr_index == 4]
    assert (
        replay([digest for digest in digests if digest]).hex()
        == (expected["CCEL_AAEL_alibabacloud"]["rtmr"]["3"])
    )


def test_extend_and_replay_are_the_hardwares() -> None:
    one, two = b"\x01" * 48, b"\x02" * 48
    first = hashlib.sha384(bytes(48) + one).digest()
    assert extend(ZERO_REGISTER, one) == first
    assert replay([one, two]) == hashlib.sha384(first + two).digest()
    assert replay([two], first) == replay([one, two])
    assert replay([]) == bytes(48)
    for register, digest in ((bytes(47), one), (bytes(48), one[:-1]), (bytes(48), one + b"\x00")):
        with pytest.raises(FormatError):
            extend(register, digest)


@given(st.lists(st.tuples(OPERATIONS, CONTENTS), max_size=5), st.integers(0, 3))
def test_records_survive_the_way_through_an_evidence_log(
    events: list[tuple[str, bytes]], rtmr_index: int
) -> None:
    records = tuple(encode_record(rtmr_index, *event) for event in events)
    raw = assemble_log(None, [record.raw for record in records])
    assert raw.startswith(sha384_only_header())
    assert raw.endswith(b"\xff" * 8)
    split = split_log(raw, rtmr_index=rtmr_index)
    assert split.records == records
    assert split.boot_events == ()
    assert assemble_log(split.boot_log, [record.raw for record in split.records]) == raw
    everything = parse_boot_log(raw)
    assert replay_rtmrs(everything.events)[rtmr_index] == replay(
        record.digest_sha384 for record in records
    )


BAD_RECORDS = {
    "another register": by_hand(OWN, register=3),
    "no register": by_hand(OWN, register=0),
    "another event type": by_hand(OWN, event_type=0xD),
    "two digests": by_hand(OWN, digests=2),
    "another algorithm": by_hand(OWN, algorithm=0xB),
    "a digest of other bytes": by_hand(OWN, digest=bytes(48)),
    "another tag": by_hand(OWN, tag=b"AAEL"),
    "bytes behind the text": by_hand(OWN + b"x", text_bytes=len(OWN)),
    "text longer than its event": by_hand(OWN, text_bytes=len(OWN) + 1),
    "event longer than the log": by_hand(OWN, size=len(OWN) + 9),
    "event shorter than its text": by_hand(OWN, size=len(OWN) + 7),
    "another domain": by_hand(b"coco.com Seal {}"),
    "our domain as a prefix": by_hand(b"attested-containers2 Seal {}"),
    "no operation": by_hand(b"attested-containers {}"),
    "two spaces before the operation": by_hand(b"attested-containers  Seal {}"),
    "two spaces before the content": by_hand(b"attested-containers Seal  {}"),
    "no content": by_hand(b"attested-containers Seal "),
    "an operation with a hyphen": by_hand(b"attested-containers Se-al {}"),
    "an operation that begins with a digit": by_hand(b"attested-containers 1Seal {}"),
    "NUL": by_hand(OWN + b"\x00"),
    "LF": by_hand(OWN + b"\n"),
    "not UTF-8": by_hand(OWN + b"\xff"),
    "empty text": by_hand(b""),
    "cut short": by_hand(OWN)[:-1],
    "cut inside the head": by_hand(OWN)[:73],
    "filler behind": by_hand(OWN) + b"\xff" * 8,
}


@pytest.mark.parametrize("raw", BAD_RECORDS.values(), ids=BAD_RECORDS.keys())
def test_a_record_that_is_not_exactly_one_is_refused(raw: bytes) -> None:
    with pytest.raises(FormatError):
        parse_records(raw)
    with pytest.raises(FormatError):
        parse_records(by_hand(OWN) + raw)


def test_a_changed_text_under_a_kept_digest_is_refused() -> None:
    honest = encode_record(3, "Seal", b'{"critical":true}').raw
    forged = honest.replace(b"true", b"True")
    with pytest.raises(FormatError, match="digest"):
        parse_records(forged)
    with pytest.raises(FormatError, match="digest"):
        split_log(sha384_only_header() + forged + b"\xff" * 8)


@pytest.mark.parametrize(
    ("operation", "content", "domain"),
    [
        ("", b"{}", DOMAIN),
        ("two words", b"{}", DOMAIN),
        ("a-b", b"{}", DOMAIN),
        ("Seal\n", b"{}", DOMAIN),
        ("Seal", b"", DOMAIN),
        ("Seal", b" {}", DOMAIN),
        ("Seal", b"a\nb", DOMAIN),
        ("Seal", b"a\x00b", DOMAIN),
        ("Seal", b"\xff", DOMAIN),
        ("Seal", b"x" * (MAX_CONTENT_BYTES + 300), DOMAIN),
        ("Seal", b"{}", "two words"),
        ("Seal", b"{}", ""),
    ],
)
def test_what_could_not_be_parsed_is_not_encoded(
    operation: str, content: bytes, domain: str
) -> None:
    with pytest.raises(FormatError):
        encode_record(3, operation, content, domain=domain)


def test_there_are_four_registers() -> None:
    for index in (-1, 4):
        with pytest.raises(FormatError):
            encode_record(index, "Seal", CONTENT)
    record = encode_record(2, "Seal", CONTENT)
    assert parse_records(record.raw, rtmr_index=2) == (record,)
    with pytest.raises(FormatError):
        parse_records(record.raw)


def boot_event(data: bytes, *, register: int = 1) -> bytes:
    digest = hashlib.sha384(data).digest()
    head = struct.pack("<IIIH", register, 0xD, 1, 0xC) + digest
    return head + struct.pack("<I", len(data)) + data


@pytest.mark.parametrize("filler", [b"", bytes(8), b"\xff" * 8 + b"old bytes", bytes(1000)])
def test_a_boot_log_is_cut_at_its_end_and_our_records_follow(filler: bytes) -> None:
    boot = sha384_only_header() + boot_event(bytes(32)) + boot_event(b"\xff" * 32)
    record = encode_record(3, "Seal", CONTENT)
    raw = assemble_log(boot + filler, [record.raw])
    assert raw == boot + record.raw + b"\xff" * 8
    split = split_log(raw)
    assert split.boot_log == boot
    assert [event.data for event in split.boot_events] == [bytes(32), b"\xff" * 32]
    assert split.records == (record,)


def test_a_real_boot_log_survives_with_our_records(vectors: Path) -> None:
    record = encode_record(3, "Seal", CONTENT)
    for name in ("CCEL_data_ovmf", "CCEL_data_grub", "CCEL_data_gcp", "CCEL_AAEL_alibabacloud"):
        ccel = (vectors / "ccel" / name).read_bytes()
        log = parse_boot_log(ccel)
        split = split_log(assemble_log(ccel, [record.raw]))
        assert split.boot_log == ccel[: log.end_offset]
        assert split.boot_events == log.events
        assert split.records == (record,)


def test_a_boot_log_with_records_of_our_domain_is_refused() -> None:
    boot = sha384_only_header() + encode_record(3, "Seal", CONTENT).raw
    with pytest.raises(FormatError, match="domain"):
        assemble_log(boot, [])
    foreign = sha384_only_header() + encode_record(3, "Seal", CONTENT, domain="coco.com").raw
    (event,) = split_log(assemble_log(foreign, [])).boot_events
    assert event.mr_index == 4
    assert event.data_matches_digest


RECORD = by_hand(OWN)
FOREIGN = by_hand(b"coco.com Seal {}")
HEADER = sha384_only_header()
END = b"\xff" * 8
BAD_LOGS = {
    "no end": HEADER + RECORD,
    "no header": RECORD + END,
    "header cut into the end": HEADER[:60] + END,
    "ended by zeros": HEADER + RECORD + bytes(8),
    "bytes behind the end": HEADER + RECORD + END + b"\x00",
    "two ends": HEADER + RECORD + END + END,
    "an end between": HEADER + RECORD + END + RECORD + END,
    "zeros between": HEADER + bytes(8) + RECORD + END,
    "an event that begins like the end of a log": HEADER
    + struct.pack("<IIIH48sI", 0, 0, 1, 0xC, bytes(48), 4)
    + b"boot"
    + RECORD
    + END,
    "a boot event behind our records": HEADER + RECORD + boot_event(b"late") + END,
    "a foreign record behind ours": HEADER + RECORD + FOREIGN + END,
    "our record in another register": HEADER + by_hand(OWN, register=1) + END,
    "our record with bytes behind": HEADER + by_hand(OWN + b"x", text_bytes=len(OWN)) + END,
    "our first record under its old digest, its domain changed": HEADER
    + RECORD.replace(b"attested-", b"attested_")
    + RECORD
    + END,
    "our first record as an event of another type": HEADER
    + by_hand(OWN, event_type=0xD)
    + RECORD
    + END,
    "our first record as one that is not extended": HEADER
    + by_hand(OWN, event_type=3)
    + RECORD
    + END,
    "an event in our register that only its digest vouches for": HEADER
    + struct.pack("<IIIH48sI", 4, 0xD, 1, 0xC, b"\x01" * 48, 8)
    + b"firmware"
    + RECORD
    + END,
    "a last event that takes in the end": HEADER
    + struct.pack("<IIIH48sI", 1, 4, 1, 0xC, bytes(48), 8)
    + END,
}


@pytest.mark.parametrize("raw", BAD_LOGS.values(), ids=BAD_LOGS.keys())
def test_a_log_that_is_not_exactly_as_assembled_is_refused(raw: bytes) -> None:
    with pytest.raises(FormatError):
        split_log(raw)


@given(st.integers(0, 10_000), st.integers(0, 255), st.integers(0, 30))
def test_no_mutation_is_overlooked_or_raises_anything_else(at: int, value: int, cut: int) -> None:
    records = [encode_record(3, "Seal", b'{"critical":%d}' % number).raw for number in range(3)]
    raw = assemble_log(None, records)
    mutated = bytearray(raw)
    mutated[at % len(raw)] = value
    mutated = mutated[: len(mutated) - cut]
    try:
        split = split_log(bytes(mutated))
    except FormatError:
        return
    # Accepted: then nothing but the header's informative fields can have changed.
    assert [record.raw for record in split.records] == records
    assert bytes(mutated[len(HEADER) :]) == raw[len(HEADER) :]


def test_a_hundred_thousand_events_replay_in_seconds() -> None:
    raw = b"".join(
        encode_record(3, "AdmitImages", b'{"critical":true,"image_ids":["%0200d"]}' % number).raw
        for number in range(100_000)
    )
    began = time.perf_counter()
    records = parse_records(raw)
    replay(record.digest_sha384 for record in records)
    took_s = time.perf_counter() - began
    assert len(records) == 100_000
    # About 0.5 s on one quiet core; the bound leaves room for a machine that is shared.
    assert took_s < 10
