"""TDREPORT: a real one, its inner hashes, its reserved bytes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.formats.errors import FormatError
from supervisor.formats.td_body import BODY_TYPE_TD10, BODY_TYPE_TD15
from supervisor.formats.td_report import (
    TdReport,
    body_of_report,
    pack_td_report,
    parse_td_report,
)


def exact(size: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=size, max_size=size)


reports = st.builds(
    TdReport,
    version=st.sampled_from([0, 1]),
    cpu_svn=exact(16),
    report_data=exact(64),
    mac=exact(32),
    valid=exact(8),
    tee_tcb_svn=exact(16),
    mr_seam=exact(48),
    mr_signer_seam=exact(48),
    seam_attributes=exact(8),
    tee_tcb_svn2=exact(16),
    td_attributes=exact(8),
    xfam=exact(8),
    mr_td=exact(48),
    mr_config_id=exact(48),
    mr_owner=exact(48),
    mr_owner_config=exact(48),
    rtmrs=st.tuples(exact(48), exact(48), exact(48), exact(48)),
    servtd_hash=exact(48),
)
REPORT = TdReport(
    version=1,
    cpu_svn=b"\x01" * 16,
    report_data=b"\x02" * 64,
    mac=b"\x03" * 32,
    valid=b"\x04" * 8,
    tee_tcb_svn=b"\x05" * 16,
    mr_seam=b"\x06" * 48,
    mr_signer_seam=b"\x07" * 48,
    seam_attributes=b"\x08" * 8,
    tee_tcb_svn2=b"\x09" * 16,
    td_attributes=b"\x0a" * 8,
    xfam=b"\x0b" * 8,
    mr_td=b"\x0c" * 48,
    mr_config_id=b"\x0d" * 48,
    mr_owner=b"\x0e" * 48,
    mr_owner_config=b"\x0f" * 48,
    rtmrs=(b"\x10" * 48, b"\x11" * 48, b"\x12" * 48, b"\x13" * 48),
    servtd_hash=b"\x14" * 48,
)
RAW = pack_td_report(REPORT)


def test_a_real_report_parses_and_packs_to_the_same_bytes(vectors: Path) -> None:
    raw = (vectors / "quotes" / "tdreport.bin").read_bytes()
    report = parse_td_report(raw)
    assert report.version == raw[2]
    assert report.mr_td == raw[528:576]
    assert report.rtmrs[3] == raw[864:912]
    assert report.report_data == raw[128:192]
    assert pack_td_report(report) == raw


def test_the_layout_is_the_one_of_the_documents() -> None:
    assert len(RAW) == 1024
    assert RAW[:16] == bytes([0x81, 0, 1, 0]) + bytes(12)
    assert RAW[32:80] == hashlib.sha384(RAW[256 : 256 + 239]).digest()
    assert RAW[80:128] == hashlib.sha384(RAW[512:1024]).digest()
    places = [(16, 16), (128, 64), (224, 32), (256, 8), (264, 16), (280, 48), (328, 48), (376, 8)]
    places += [(384, 16), (512, 8), (520, 8), (528, 48), (576, 48), (624, 48), (672, 48)]
    places += [(720, 48), (768, 48), (816, 48), (864, 48), (912, 48)]
    for number, (offset, size) in enumerate(places, start=1):
        assert RAW[offset : offset + size] == bytes([number]) * size


@given(reports)
def test_what_is_packed_is_what_is_parsed(report: TdReport) -> None:
    assert parse_td_report(pack_td_report(report)) == report


# Whoever changes a field must know the hash over it: 495 to 511 are in neither hash.
@pytest.mark.parametrize("at", [0, 1, 2, 3, 4, 15, 32, 79, 80, 127, 192, 223, 256, 399, 400, 494])
def test_a_changed_type_hash_or_hashed_byte_is_refused(at: int) -> None:
    changed = bytearray(RAW)
    changed[at] ^= 0x80
    with pytest.raises(FormatError):
        parse_td_report(bytes(changed))


@pytest.mark.parametrize("at", [495, 511, 512, 528, 700, 911, 959, 960, 1023])
def test_a_changed_td_info_or_reserved_byte_is_refused(at: int) -> None:
    changed = bytearray(RAW)
    changed[at] ^= 0x01
    with pytest.raises(FormatError):
        parse_td_report(bytes(changed))


@pytest.mark.parametrize(("start", "end", "hash_at"), [(400, 401, 32), (960, 961, 80)])
def test_reserved_bytes_are_zero_even_under_a_right_hash(
    start: int, end: int, hash_at: int
) -> None:
    changed = bytearray(RAW)
    changed[start:end] = b"\x01"
    covered = changed[256:495] if hash_at == 32 else changed[512:1024]
    changed[hash_at : hash_at + 48] = hashlib.sha384(covered).digest()
    with pytest.raises(FormatError, match="reserved"):
        parse_td_report(bytes(changed))


@pytest.mark.parametrize("size", [0, 1023, 1025])
def test_a_report_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(FormatError):
        parse_td_report((RAW + b"\x00")[:size])


@given(st.binary(min_size=1024, max_size=1024))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(FormatError):
        parse_td_report(noise)


def test_fields_of_wrong_lengths_are_not_packed() -> None:
    for wrong in (
        msgspec.structs.replace(REPORT, mr_td=bytes(47)),
        msgspec.structs.replace(REPORT, mac=bytes(33)),
        msgspec.structs.replace(REPORT, rtmrs=(bytes(48),) * 5),
        msgspec.structs.replace(REPORT, version=2),
    ):
        with pytest.raises(FormatError):
            pack_td_report(wrong)


def test_a_quoting_enclave_takes_its_body_from_the_report() -> None:
    td10, td15 = body_of_report(REPORT, td15=False), body_of_report(REPORT, td15=True)
    assert (td10.body_type, td15.body_type) == (BODY_TYPE_TD10, BODY_TYPE_TD15)
    for name in ("mr_td", "rtmrs", "report_data", "tee_tcb_svn", "xfam", "mr_owner_config"):
        assert getattr(td10, name) == getattr(td15, name) == getattr(REPORT, name)
    assert td15.tee_tcb_svn2 == REPORT.tee_tcb_svn2
    assert td15.mr_service_td == REPORT.servtd_hash
    assert td10.tee_tcb_svn2 is td10.mr_service_td is None
