"""Quotes of the software TD under dcap-qvl: good under its own root and under no other."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import dcap_qvl
import msgspec
import pytest
from cryptography import x509
from dcap_qvl import QuoteCollateralV3, QuotePolicy, QuoteVerifier

from plugins.tdx_sim import collateral, firmware
from plugins.tdx_sim import platform_identity as identity
from plugins.tdx_sim.firmware import BaseImage
from plugins.tdx_sim.pki import SimPki, ensure_pki
from plugins.tdx_sim.quoting import QuotingEnclave
from plugins.tdx_sim.software_td import SoftwareTd
from plugins.tdx_sim.wire import QuoteVersion
from supervisor.formats.boot_log import parse_boot_log, replay_rtmrs
from supervisor.formats.errors import FormatError
from supervisor.formats.quote import Quote, parse_qe_report, parse_quote
from supervisor.formats.td_report import TdReport, parse_td_report

ISSUED = datetime(2026, 3, 1, 12, tzinfo=UTC)
NOW = int(ISSUED.timestamp()) + 3600
REPORT_DATA = bytes(range(64))
VERSIONS: tuple[QuoteVersion, ...] = (4, 5)
versions = pytest.mark.parametrize("version", VERSIONS)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> SimPki:
    return ensure_pki(tmp_path_factory.mktemp("sim") / "pki")


@pytest.fixture(scope="module")
def own_collateral(pki: SimPki) -> QuoteCollateralV3:
    return QuoteCollateralV3.from_json(collateral.issue(pki, ISSUED))


@pytest.fixture
def td(pki: SimPki) -> SoftwareTd:
    return SoftwareTd(pki, BaseImage())


def quote_of(td: SoftwareTd, version: QuoteVersion, report_data: bytes = REPORT_DATA) -> bytes:
    return td.finish_quote(td.begin_quote(report_data, version))


def status_under(pki: SimPki, raw: bytes, given: QuoteCollateralV3 | str, *, now: int = NOW) -> str:
    if isinstance(given, str):
        given = QuoteCollateralV3.from_json(given)
    return str(dcap_qvl.verify_with_root_ca(raw, given, pki.root_der, now).status)


# --- good quotes ---------------------------------------------------------------------------


@versions
def test_a_quote_is_up_to_date_under_its_own_root(
    pki: SimPki, own_collateral: QuoteCollateralV3, td: SoftwareTd, version: QuoteVersion
) -> None:
    raw = quote_of(td, version)
    report = dcap_qvl.verify_with_root_ca(raw, own_collateral, pki.root_der, NOW)
    assert (report.status, report.advisory_ids) == ("UpToDate", [])


@versions
def test_it_passes_a_strict_policy_that_knows_platforms_of_many_packages(
    pki: SimPki, own_collateral: QuoteCollateralV3, td: SoftwareTd, version: QuoteVersion
) -> None:
    policy = QuotePolicy.strict(NOW).allow_dynamic_platform(True)
    policy = policy.allow_cached_keys(True).allow_smt(True)
    verifier = QuoteVerifier(pki.root_der)
    claims = verifier.verify_with_policy(quote_of(td, version), own_collateral, NOW, policy)
    assert json.loads(claims.to_json())["tcb"]["status"] == "UpToDate"


@versions
def test_it_fails_under_intels_root_with_the_simulators_collateral(
    own_collateral: QuoteCollateralV3, td: SoftwareTd, version: QuoteVersion
) -> None:
    with pytest.raises(ValueError, match="root CA CRL"):
        dcap_qvl.verify(quote_of(td, version), own_collateral, NOW)


@versions
def test_it_fails_under_intels_root_with_intels_collateral(
    td: SoftwareTd, version: QuoteVersion, vectors: Path
) -> None:
    name = "qvl_B0C06F000000_2025-06.json"
    real = QuoteCollateralV3.from_json((vectors / "collateral" / name).read_text())
    expected = json.loads((vectors / "expected.json").read_bytes())
    now = expected["collateral"][name]["verify_at"]
    real_quote = (vectors / "quotes" / "qvl_v4.bin").read_bytes()
    assert dcap_qvl.verify(real_quote, real, now).status == "UpToDate"
    with pytest.raises(ValueError, match=r"UnknownIssuer|InvalidSignature"):
        dcap_qvl.verify(quote_of(td, version), real, now)


@versions
def test_it_fails_under_another_simulators_root_and_collateral(
    pki: SimPki,
    own_collateral: QuoteCollateralV3,
    td: SoftwareTd,
    version: QuoteVersion,
    tmp_path: Path,
) -> None:
    other = ensure_pki(tmp_path / "other")
    raw = quote_of(td, version)
    others_collateral = collateral.issue(other, ISSUED)
    # Equal values, other keys: what passes for its own TD fails for everybody else's.
    assert status_under(other, quote_of(SoftwareTd(other, BaseImage()), 4), others_collateral)
    for root, given in (
        (other, own_collateral),
        (other, others_collateral),
        (pki, others_collateral),
    ):
        with pytest.raises(ValueError):
            status_under(root, raw, given)


@versions
def test_our_parser_and_dcap_qvl_read_the_same_in_every_field(
    pki: SimPki, own_collateral: QuoteCollateralV3, td: SoftwareTd, version: QuoteVersion
) -> None:
    td.registers.extend(3, bytes(range(48)))
    raw = quote_of(td, version)
    ours = parse_quote(raw)
    verified = dcap_qvl.verify_with_root_ca(raw, own_collateral, pki.root_der, NOW)
    theirs = json.loads(verified.to_json())["report"]
    expected = {
        name: getattr(ours.body, name).hex()
        for name in ours.body.__struct_fields__
        if name not in ("rtmrs", "tee_tcb_svn2", "mr_service_td", "extended")
    }
    expected |= {f"rt_mr{i}": rtmr.hex() for i, rtmr in enumerate(ours.body.rtmrs)}
    if version == 4:
        assert theirs == {"TD10": expected}
        assert (ours.body.tee_tcb_svn2, ours.body.mr_service_td) == (None, None)
    else:
        tail = {"tee_tcb_svn2": identity.TEE_TCB_SVN.hex(), "mr_service_td": bytes(48).hex()}
        assert theirs == {"TD15": {"base": expected, **tail}}
        assert ours.body.tee_tcb_svn2 == identity.TEE_TCB_SVN
    assert ours.body.report_data == REPORT_DATA
    assert ours.body.rtmrs == td.registers.rtmrs
    assert ours.body.mr_td == td.registers.mr_td
    assert (ours.trailing_bytes, ours.header.version) == (0, version)


@versions
def test_its_attributes_are_those_of_an_honest_td(td: SoftwareTd, version: QuoteVersion) -> None:
    body = parse_quote(quote_of(td, version)).body
    assert int.from_bytes(body.td_attributes, "little") == 1 << 28
    xfam = int.from_bytes(body.xfam, "little")
    assert xfam & 0x3 == 0x3
    assert xfam & ~0x6DBE7 == 0
    fields = (body.mr_td, body.mr_seam, body.mr_config_id, body.mr_owner, body.mr_owner_config)
    assert len({*fields, bytes(48)}) == len(fields) + 1
    assert body.mr_signer_seam == bytes(48)


@versions
def test_every_certificate_in_the_quote_says_simulation(
    td: SoftwareTd, version: QuoteVersion
) -> None:
    chain = x509.load_pem_x509_certificates(
        parse_quote(quote_of(td, version)).auth.certificate_chain_pem
    )
    assert len(chain) == 3
    for certificate in chain:
        assert certificate.subject.rfc4514_string().count("SIMULATION") == 2


def test_the_boot_log_replays_to_the_quotes_registers(td: SoftwareTd) -> None:
    td.registers.extend(3, bytes(48))
    rtmrs = parse_quote(quote_of(td, 4)).body.rtmrs
    replayed = replay_rtmrs(parse_boot_log(td.boot_log).events)
    assert [replayed[i] for i in range(3)] == list(rtmrs[:3])
    assert replayed[3] == bytes(48) != rtmrs[3]


def test_a_td_report_says_what_the_quote_says(td: SoftwareTd) -> None:
    report = parse_td_report(td.td_report(REPORT_DATA))
    body = parse_quote(quote_of(td, 5)).body
    assert report.mac != bytes(32)
    assert report.cpu_svn == parse_qe_report(parse_quote(quote_of(td, 5)).auth.qe_report).cpu_svn
    for name in body.__struct_fields__:
        if name not in ("mr_service_td", "extended"):
            assert getattr(report, name) == getattr(body, name), name


@pytest.mark.parametrize("length", [0, 63, 65])
def test_report_data_of_another_length_is_refused(td: SoftwareTd, length: int) -> None:
    with pytest.raises(OSError, match="64 bytes"):
        td.td_report(bytes(length))
    with pytest.raises(OSError, match="64 bytes"):
        td.begin_quote(bytes(length), 4)


# --- boots ---------------------------------------------------------------------------------


def test_a_boot_zeroes_rtmr3_and_certifies_a_new_key(
    pki: SimPki, own_collateral: QuoteCollateralV3, td: SoftwareTd
) -> None:
    td.registers.extend(3, bytes(48))
    before = parse_quote(quote_of(td, 4))
    td.boot()
    raw = quote_of(td, 4)
    after = parse_quote(raw)
    assert before.body.rtmrs[3] != bytes(48) == after.body.rtmrs[3]
    assert before.body.rtmrs[:3] == after.body.rtmrs[:3]
    assert before.auth.attestation_public_key != after.auth.attestation_public_key
    assert before.header.user_data == after.header.user_data != bytes(20)
    assert status_under(pki, raw, own_collateral) == "UpToDate"


def test_a_boot_with_another_base_image_shows_in_the_quote_and_stays(td: SoftwareTd) -> None:
    image = BaseImage(firmware="other firmware", command_line="debug")
    td.boot(image)
    td.boot()
    body = parse_quote(quote_of(td, 4)).body
    assert body.mr_td == firmware.mr_td(image)
    replayed = replay_rtmrs(parse_boot_log(td.boot_log).events)
    assert tuple(replayed.values()) == body.rtmrs
    assert b"kernel_cmdline: debug\0" in td.boot_log
    assert td.describe().boots == 3


def test_a_quote_begun_before_a_boot_is_never_finished(td: SoftwareTd) -> None:
    pending = td.begin_quote(REPORT_DATA, 4)
    td.boot()
    with pytest.raises(OSError, match="booted"):
        td.finish_quote(pending)


# --- changed quotes ------------------------------------------------------------------------


def regions(raw: bytes, quote: Quote) -> dict[str, range]:
    """Every byte of a quote that anything vouches for, by name.

    The root in the chain is left out: the verifier trusts its own, so nobody reads that one.
    """
    signed = len(quote.signed_bytes)
    leaf = raw.index(b"-----BEGIN")
    root = raw.rindex(b"-----BEGIN")
    sizes = {
        "header": 48,
        "body descriptor and body": signed - 48,
        "length of the authentication data": 4,
        "signature": 64,
        "attestation key": 64,
        "certification data's type and length": 6,
        "QE report": 384,
        "QE report's signature": 64,
        "length of QE auth data": 2,
        "QE auth data": 32,
        "chain's type and length": 6,
    }
    found: dict[str, range] = {}
    offset = 0
    for name, size in sizes.items():
        found[name] = range(offset, offset + size)
        offset += size
    assert offset == leaf
    middle = raw.index(b"-----BEGIN", leaf + 1)
    for name, begin, end in (("PCK certificate", leaf, middle), ("CA certificate", middle, root)):
        # Whole lines of base64, first to last but one: there is no slack in them.
        first = raw.index(b"\n", begin) + 1
        found[name] = range(first, first + 64)
        last = raw.rindex(b"\n", begin, raw.index(b"\n-----END", begin))
        assert last - 64 > first
        found[f"{name}, last whole line"] = range(last - 64, last)
        assert last < end
    return found


# Lengths and types that say how to cut the quote: unsigned, and dcap-qvl does not look at all
# of them. Our parser does, so nothing that it took apart differently is ever compared.
FRAMING = {
    "length of the authentication data",
    "certification data's type and length",
    "length of QE auth data",
    "chain's type and length",
}


@versions
def test_a_changed_byte_anywhere_fails(
    pki: SimPki, own_collateral: QuoteCollateralV3, td: SoftwareTd, version: QuoteVersion
) -> None:
    raw = quote_of(td, version)
    survivors = []
    for name, offsets in regions(raw, parse_quote(raw)).items():
        for offset in offsets:
            changed = bytearray(raw)
            changed[offset] ^= 0x01
            try:
                if name in FRAMING:
                    parse_quote(bytes(changed))
                status_under(pki, bytes(changed), own_collateral)
            except (ValueError, FormatError):
                continue
            survivors.append((name, offset))
    assert survivors == []


@versions
def test_a_quote_cut_short_fails(
    pki: SimPki, own_collateral: QuoteCollateralV3, td: SoftwareTd, version: QuoteVersion
) -> None:
    raw = quote_of(td, version)
    for size in (0, 47, 48, 631, 702, 1200, len(raw) - 1):
        with pytest.raises(ValueError):
            status_under(pki, raw[:size], own_collateral)


def quote_with(pki: SimPki, td: SoftwareTd, version: QuoteVersion, **changes: bytes) -> bytes:
    """A well signed quote of a TD that is not as it should be."""
    report: TdReport = parse_td_report(td.td_report(REPORT_DATA))
    return QuotingEnclave(pki).quote(msgspec.structs.replace(report, **changes), version=version)


def attributes(*bits: int) -> bytes:
    return sum(1 << bit for bit in bits).to_bytes(8, "little")


@versions
@pytest.mark.parametrize(
    "changes",
    [
        {"td_attributes": attributes(28, 0)},
        {"td_attributes": attributes(28, 5)},
        {"td_attributes": attributes(28, 29)},
        {"td_attributes": attributes(28, 32)},
        {"td_attributes": attributes()},
        {"mr_signer_seam": bytes([1] * 48)},
        {"seam_attributes": bytes([1] * 8)},
        {"tee_tcb_svn": bytes([5, 9, 2, *bytes(13)])},
    ],
    ids=[
        "debug",
        "profiled",
        "migratable",
        "reserved attribute",
        "no SEPT_VE_DISABLE",
        "another signer of the module",
        "SEAM attributes",
        "unknown module",
    ],
)
def test_a_well_signed_quote_of_a_bad_td_is_refused(
    pki: SimPki,
    own_collateral: QuoteCollateralV3,
    td: SoftwareTd,
    version: QuoteVersion,
    changes: dict[str, bytes],
) -> None:
    with pytest.raises(ValueError):
        status_under(pki, quote_with(pki, td, version, **changes), own_collateral)


def test_a_td_with_a_service_td_is_refused(
    pki: SimPki, own_collateral: QuoteCollateralV3, td: SoftwareTd
) -> None:
    with pytest.raises(ValueError):
        status_under(pki, quote_with(pki, td, 5, servtd_hash=bytes([1] * 48)), own_collateral)


@versions
def test_an_old_module_is_out_of_date(
    pki: SimPki, own_collateral: QuoteCollateralV3, td: SoftwareTd, version: QuoteVersion
) -> None:
    old = bytes([2, *identity.TEE_TCB_SVN[1:]])
    raw = quote_with(pki, td, version, tee_tcb_svn=old, tee_tcb_svn2=old)
    assert status_under(pki, raw, own_collateral) == "OutOfDate"


# --- collateral ----------------------------------------------------------------------------


def test_collateral_is_valid_for_thirty_days_and_not_before(pki: SimPki, td: SoftwareTd) -> None:
    raw, issued = quote_of(td, 4), collateral.issue(pki, ISSUED)
    first = int(ISSUED.timestamp())
    last = first + 30 * 86_400
    assert status_under(pki, raw, issued, now=first) == "UpToDate"
    assert status_under(pki, raw, issued, now=last - 1) == "UpToDate"
    for now in (first - 1, last + 1):
        with pytest.raises(ValueError):
            status_under(pki, raw, issued, now=now)


def test_the_time_of_issue_may_be_given_in_any_zone_but_not_in_none(pki: SimPki) -> None:
    elsewhere = ISSUED.astimezone(timezone(timedelta(hours=5)))
    for issued in (ISSUED, elsewhere):
        document = json.loads(collateral.issue(pki, issued))
        assert json.loads(document["tcb_info"])["issueDate"] == "2026-03-01T12:00:00Z"
    with pytest.raises(ValueError, match="time zone"):
        collateral.issue(pki, ISSUED.replace(tzinfo=None))


@pytest.mark.parametrize("status", ["SWHardeningNeeded", "ConfigurationNeeded", "OutOfDate"])
def test_the_platforms_status_can_be_chosen(
    pki: SimPki, td: SoftwareTd, status: collateral.PlatformStatus
) -> None:
    given = collateral.issue(pki, ISSUED, platform_status=status)
    report = dcap_qvl.verify_with_root_ca(
        quote_of(td, 4), QuoteCollateralV3.from_json(given), pki.root_der, NOW
    )
    assert (report.status, report.advisory_ids) == (status, ["SIMULATED-SA-00001"])


@pytest.mark.parametrize(
    "issue",
    [
        lambda pki: collateral.issue(pki, ISSUED, platform_status="Revoked"),
        lambda pki: collateral.issue(pki, ISSUED, pck_revoked=True),
    ],
    ids=["TCB", "PCK certificate"],
)
def test_what_is_revoked_is_refused(
    pki: SimPki, td: SoftwareTd, issue: Callable[[SimPki], str]
) -> None:
    with pytest.raises(ValueError, match=r"(?i)revoked"):
        status_under(pki, quote_of(td, 4), issue(pki))


@pytest.mark.parametrize("part", ["tcb_info", "qe_identity"])
def test_collateral_with_a_changed_character_is_refused(
    pki: SimPki, td: SoftwareTd, part: str
) -> None:
    document = json.loads(collateral.issue(pki, ISSUED))
    changed = document[part].replace('"tcbEvaluationDataNumber":18', '"tcbEvaluationDataNumber":19')
    assert changed != document[part]
    with pytest.raises(ValueError):
        status_under(pki, quote_of(td, 4), json.dumps({**document, part: changed}))


def test_fields_are_in_intels_order_with_upper_case_hex(pki: SimPki, vectors: Path) -> None:
    def shape(value: object) -> object:
        """Field names in order, one element standing for all of a list."""
        if isinstance(value, dict):
            return [(name, shape(part)) for name, part in value.items()]
        return type(value).__name__ if not isinstance(value, list) else ["list"]

    real = json.loads((vectors / "collateral" / "qvl_B0C06F000000_2025-06.json").read_bytes())
    ours = json.loads(collateral.issue(pki, ISSUED))
    assert list(ours) == list(real)
    for part in ("tcb_info", "qe_identity"):
        assert shape(json.loads(ours[part])) == shape(json.loads(real[part]))
        assert " " not in ours[part].replace("Early Microcode Update", "").replace(
            "SGX Late Microcode Update", ""
        )
    assert json.loads(ours["tcb_info"])["fmspc"] == "53494D000000"
