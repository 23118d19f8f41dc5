"""Quotes: real ones field by field, made ones of every shape, and damaged ones."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.formats.errors import FormatError
from supervisor.formats.quote import (
    BODY_TYPE_TD10,
    BODY_TYPE_TD15,
    BODY_TYPE_TD15_EXTENDED,
    MAX_QUOTE_BYTES,
    QE_VENDOR_INTEL,
    QeReport,
    QuoteAuth,
    QuoteHeader,
    TdBody,
    TdBodyExtension,
    build_header,
    build_td10_body,
    pack_auth,
    pack_header,
    pack_qe_report,
    pack_quote,
    pack_signed_part,
    parse_qe_report,
    parse_quote,
    qe_report_data,
)

BODY_FIELDS = [
    "tee_tcb_svn",
    "mr_seam",
    "mr_signer_seam",
    "seam_attributes",
    "td_attributes",
    "xfam",
    "mr_td",
    "mr_config_id",
    "mr_owner",
    "mr_owner_config",
    "report_data",
]
TDX_QUOTES = [
    "dstack_quote_report_v4.bin",
    "gtg_v5_td15.bin",
    "qvl_near_v4.bin",
    "qvl_tappd_v4.bin",
    "qvl_v4.bin",
    "trustee_v4_debug.bin",
]


def exact(size: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=size, max_size=size)


headers = st.builds(
    QuoteHeader, version=st.sampled_from([4, 5]), reserved=exact(4), user_data=exact(20)
)
td10_bodies = st.builds(
    TdBody,
    tee_tcb_svn=exact(16),
    mr_seam=exact(48),
    mr_signer_seam=exact(48),
    seam_attributes=exact(8),
    td_attributes=exact(8),
    xfam=exact(8),
    mr_td=exact(48),
    mr_config_id=exact(48),
    mr_owner=exact(48),
    mr_owner_config=exact(48),
    rtmrs=st.tuples(exact(48), exact(48), exact(48), exact(48)),
    report_data=exact(64),
    tee_tcb_svn2=st.none(),
    mr_service_td=st.none(),
    extended=st.none(),
)
extensions = st.builds(
    TdBodyExtension,
    vm_id=st.integers(0, 255),
    td_id=exact(32),
    dev_info=exact(48),
    init_servtd_hash=exact(48),
    init_servtd_attributes=exact(8),
    init_cpu_svn=exact(16),
    init_tee_tcb_svn=exact(16),
    init_tee_fmspc=exact(12),
    current_servtd_hash=exact(48),
    current_servtd_attributes=exact(8),
)


@st.composite
def bodies(draw: st.DrawFn) -> TdBody:
    body = draw(td10_bodies)
    if draw(st.booleans()):
        body = msgspec.structs.replace(
            body,
            tee_tcb_svn2=draw(exact(16)),
            mr_service_td=draw(exact(48)),
            extended=draw(st.none() | extensions),
        )
    return body


auths = st.builds(
    QuoteAuth,
    signature=exact(64),
    attestation_public_key=exact(64),
    qe_report=exact(384),
    qe_report_signature=exact(64),
    qe_auth_data=exact(32),
    certificate_chain_pem=st.binary(max_size=300),
)
AUTH = QuoteAuth(
    signature=b"\x01" * 64,
    attestation_public_key=b"\x02" * 64,
    qe_report=b"\x03" * 384,
    qe_report_signature=b"\x04" * 64,
    qe_auth_data=b"\x05" * 32,
    certificate_chain_pem=b"-----BEGIN CERTIFICATE-----\n\x00",
)
BODY = build_td10_body(
    tee_tcb_svn=b"\x10" * 16,
    mr_td=b"\x11" * 48,
    rtmrs=(b"\x20" * 48, b"\x21" * 48, b"\x22" * 48, b"\x23" * 48),
    report_data=b"\x30" * 64,
    td_attributes=b"\x00\x00\x00\x10" + bytes(4),
    xfam=b"\xe7\x02\x06" + bytes(5),
)
BODY15 = msgspec.structs.replace(BODY, tee_tcb_svn2=b"\x40" * 16, mr_service_td=b"\x41" * 48)


@pytest.mark.parametrize("name", TDX_QUOTES)
def test_a_real_quote_has_the_fields_that_another_parser_saw(vectors: Path, name: str) -> None:
    expected = json.loads((vectors / "expected.json").read_text())["quotes"][name]
    raw = (vectors / "quotes" / name).read_bytes()
    quote = parse_quote(raw)
    assert quote.header.version == expected["version"]
    assert quote.header.tee_type == expected["tee_type"]
    assert {field: getattr(quote.body, field).hex() for field in BODY_FIELDS} == {
        field: expected[field] for field in BODY_FIELDS
    }
    assert [rtmr.hex() for rtmr in quote.body.rtmrs] == [expected[f"rt_mr{at}"] for at in range(4)]
    if expected["body"] == "TdReport15":
        assert quote.body.body_type == BODY_TYPE_TD15
        assert quote.body.tee_tcb_svn2 is not None
        assert quote.body.tee_tcb_svn2.hex() == expected["tee_tcb_svn2"]
        assert quote.body.mr_service_td is not None
        assert quote.body.mr_service_td.hex() == expected["mr_service_td"]
    else:
        assert quote.body.body_type == BODY_TYPE_TD10
        assert quote.body.tee_tcb_svn2 is quote.body.mr_service_td is None
    assert quote.body.extended is None
    assert quote.signed_bytes == raw[: expected["signed_len"]]
    assert quote.trailing_bytes == expected["trailing"]
    assert len(pack_auth(quote.auth)) == expected["auth_len"]
    assert quote.auth.certificate_chain_pem.startswith(b"-----BEGIN CERTIFICATE-----")
    assert pack_quote(
        quote.header, quote.body, quote.auth, trailing_bytes=expected["trailing"]
    ) == (raw)


@pytest.mark.parametrize("name", TDX_QUOTES)
def test_a_real_quoting_enclave_binds_the_attestation_key(vectors: Path, name: str) -> None:
    auth = parse_quote((vectors / "quotes" / name).read_bytes()).auth
    report = parse_qe_report(auth.qe_report)
    assert report.report_data == qe_report_data(auth.attestation_public_key, auth.qe_auth_data)
    assert pack_qe_report(report) == auth.qe_report
    assert report.isv_prod_id == 2


def test_an_sgx_quote_is_refused_by_name(vectors: Path) -> None:
    with pytest.raises(FormatError, match="SGX quote, no TDX quote"):
        parse_quote((vectors / "quotes" / "neg_sgx_v3.bin").read_bytes())
    sgx = msgspec.structs.replace(build_header(version=4), tee_type=0)
    with pytest.raises(FormatError, match="SGX quote, no TDX quote"):
        parse_quote(pack_header(sgx) + bytes(1000))
    descriptor = struct.pack("<HI", 1, 384)
    with pytest.raises(FormatError, match="SGX quote, no TDX quote"):
        parse_quote(pack_header(build_header(version=5)) + descriptor + bytes(1000))


def test_the_layout_is_the_one_of_the_documents() -> None:
    header = build_header(version=5, user_data=b"\x77" * 20)
    raw = pack_quote(header, BODY15, AUTH, trailing_bytes=3)
    assert raw[:12] == bytes.fromhex("050002008100000000000000")
    assert raw[12:28] == QE_VENDOR_INTEL
    assert raw[28:48] == b"\x77" * 20
    assert raw[48:54] == bytes.fromhex("030088020000")
    body = raw[54:702]
    assert body[:16] == b"\x10" * 16
    assert body[120:128] == b"\x00\x00\x00\x10" + bytes(4)
    assert body[128:136] == b"\xe7\x02\x06" + bytes(5)
    assert body[136:184] == b"\x11" * 48
    assert body[328:520] == b"".join(BODY15.rtmrs)
    assert body[520:584] == b"\x30" * 64
    assert body[584:600] == b"\x40" * 16
    assert body[600:648] == b"\x41" * 48
    (auth_bytes,) = struct.unpack_from("<I", raw, 702)
    assert len(raw) == 706 + auth_bytes + 3
    auth = raw[706 : 706 + auth_bytes]
    assert auth[:128] == b"\x01" * 64 + b"\x02" * 64
    assert struct.unpack_from("<HI", auth, 128) == (6, auth_bytes - 134)
    assert auth[134:518] == b"\x03" * 384
    assert auth[518:582] == b"\x04" * 64
    assert struct.unpack_from("<H", auth, 582) == (32,)
    assert auth[584:616] == b"\x05" * 32
    assert struct.unpack_from("<HI", auth, 616) == (5, len(AUTH.certificate_chain_pem))
    assert auth[622:] == AUTH.certificate_chain_pem
    quote = parse_quote(raw)
    assert quote.signed_bytes == raw[:702] == pack_signed_part(header, BODY15)
    assert quote.trailing_bytes == 3
    v4 = pack_quote(build_header(version=4), BODY, AUTH)
    assert v4[48 : 48 + 584] == pack_signed_part(build_header(version=5), BODY)[54:]
    assert parse_quote(v4).signed_bytes == v4[:632]


@given(headers, bodies(), auths, st.integers(0, 100))
def test_what_is_packed_is_what_is_parsed(
    header: QuoteHeader, body: TdBody, auth: QuoteAuth, trailing_bytes: int
) -> None:
    if header.version == 4 and body.body_type != BODY_TYPE_TD10:
        with pytest.raises(FormatError):
            pack_quote(header, body, auth)
        return
    raw = pack_quote(header, body, auth, trailing_bytes=trailing_bytes)
    quote = parse_quote(raw)
    assert (quote.header, quote.body, quote.auth) == (header, body, auth)
    assert quote.trailing_bytes == trailing_bytes
    assert quote.signed_bytes == pack_signed_part(header, body)
    sizes = {BODY_TYPE_TD10: 584, BODY_TYPE_TD15: 648, BODY_TYPE_TD15_EXTENDED: 885}
    head = 48 if header.version == 4 else 54
    assert len(quote.signed_bytes) == head + sizes[body.body_type]


@given(
    st.builds(
        QeReport,
        cpu_svn=exact(16),
        misc_select=st.integers(0, 2**32 - 1),
        reserved1=exact(28),
        attributes=exact(16),
        mr_enclave=exact(32),
        reserved2=exact(32),
        mr_signer=exact(32),
        reserved3=exact(96),
        isv_prod_id=st.integers(0, 2**16 - 1),
        isv_svn=st.integers(0, 2**16 - 1),
        reserved4=exact(60),
        report_data=exact(64),
    )
)
def test_a_qe_report_survives_packing(report: QeReport) -> None:
    raw = pack_qe_report(report)
    assert parse_qe_report(raw) == report
    assert raw[64:96] == report.mr_enclave
    assert raw[128:160] == report.mr_signer
    assert struct.unpack_from("<HH", raw, 256) == (report.isv_prod_id, report.isv_svn)
    assert raw[320:] == report.report_data
    for wrong in (raw[:-1], raw + b"\x00", b""):
        with pytest.raises(FormatError):
            parse_qe_report(wrong)


V4 = pack_quote(build_header(version=4), BODY, AUTH)
V5 = pack_quote(build_header(version=5), BODY15, AUTH)


def patched(raw: bytes, at: int, patch: bytes) -> bytes:
    return raw[:at] + patch + raw[at + len(patch) :]


DAMAGED = {
    "empty": b"",
    "version 6": patched(V4, 0, b"\x06\x00"),
    "version 3": patched(V4, 0, b"\x03\x00"),
    "ECDSA P-384": patched(V4, 2, b"\x03\x00"),
    "another TEE": patched(V4, 4, b"\x82"),
    "another vendor": patched(V4, 12, b"\x00"),
    "a body of an unknown type": patched(V5, 48, b"\x05\x00"),
    "a body of another type's size": patched(V5, 48, b"\x02\x00"),
    "a body of another size": patched(V5, 50, struct.pack("<I", 649)),
    "a body of a huge size": patched(V5, 50, b"\xff" * 4),
    "authentication data beyond the quote": patched(V4, 632, b"\xff" * 4),
    "authentication data too short": patched(V4, 632, bytes(4)),
    "another certification type": patched(V4, 636 + 128, b"\x05\x00"),
    "certification data too long": patched(V4, 636 + 130, b"\xff" * 4),
    "certification data too short": patched(V4, 636 + 130, bytes(4)),
    "QE auth data of no size": patched(V4, 636 + 582, b"\x00\x00"),
    "QE auth data of a huge size": patched(V4, 636 + 582, b"\xff\xff"),
    "another kind of chain": patched(V4, 636 + 616, b"\x04\x00"),
    "a chain too long": patched(V4, 636 + 618, b"\xff" * 4),
    "a chain too short": patched(V4, 636 + 618, bytes(4)),
    "a one behind the quote": V4 + bytes(69) + b"\x01",
    "too many zeros": V4 + bytes(MAX_QUOTE_BYTES),
}


@pytest.mark.parametrize("raw", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_quote_is_refused(raw: bytes) -> None:
    with pytest.raises(FormatError):
        parse_quote(raw)


@pytest.mark.parametrize("raw", [V4, V5], ids=["v4", "v5"])
def test_a_quote_cut_anywhere_is_refused(raw: bytes) -> None:
    parse_quote(raw)
    for size in range(len(raw)):
        with pytest.raises(FormatError):
            parse_quote(raw[:size])


@given(st.sampled_from([V4, V5]), st.integers(0, 2000), st.binary(min_size=1, max_size=8))
def test_no_mutation_is_lost_or_makes_the_parser_raise_anything_else(
    raw: bytes, at: int, patch: bytes
) -> None:
    mutated = patched(raw, at % len(raw), patch)
    try:
        quote = parse_quote(mutated)
    except FormatError:
        return
    again = pack_quote(quote.header, quote.body, quote.auth, trailing_bytes=quote.trailing_bytes)
    assert again == mutated


@given(st.binary(max_size=100))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(FormatError):
        parse_quote(noise)


def test_fields_of_wrong_lengths_are_not_packed() -> None:
    header = build_header(version=4)
    with pytest.raises(FormatError):
        pack_header(msgspec.structs.replace(header, user_data=bytes(19)))
    with pytest.raises(FormatError):
        pack_header(msgspec.structs.replace(header, version=65_536))
    with pytest.raises(FormatError):
        pack_signed_part(msgspec.structs.replace(header, version=6), BODY)
    for field, size in (
        ("signature", 64),
        ("attestation_public_key", 64),
        ("qe_report", 384),
        ("qe_report_signature", 64),
        ("qe_auth_data", 32),
    ):
        for wrong in (size - 1, size + 1):
            with pytest.raises(FormatError):
                pack_auth(msgspec.structs.replace(AUTH, **{field: bytes(wrong)}))
