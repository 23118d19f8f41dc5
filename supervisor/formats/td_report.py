"""TDREPORT, 1,024 bytes: what the TDX module says of a TD to others on the same host.

Source: Intel TDX module ABI, TDREPORT_STRUCT. All integers little-endian. Its MAC can be
checked on that host only: a report proves nothing to anybody else, a quote does.
"""

from __future__ import annotations

import hashlib
import hmac
import struct

import msgspec

from supervisor.formats.errors import FormatError
from supervisor.formats.td_body import TdBody
from supervisor.formats.typed_bytes import pack_exactly

TD_REPORT_BYTES = 1024
REPORT_TYPE_TDX = 0x81
_REPORT_HEAD = struct.Struct("<BBBB12s16s48s48s64s32s32s")
_TCB_INFO = struct.Struct("<8s16s48s48s8s16s95s")
_TD_INFO = struct.Struct("<8s8s48s48s48s48s48s48s48s48s48s64s")
_TCB_INFO_AT = 256
_TCB_INFO_END = _TCB_INFO_AT + _TCB_INFO.size
_TD_INFO_AT = 512


class TdReport(msgspec.Struct, frozen=True, kw_only=True):
    """The fields; registers 48 bytes, SVNs 16, attributes, XFAM and `valid` 8, `mac` 32.

    The two inner hashes are not here: parsing compares them, packing computes them.
    `tee_tcb_svn2` and `servtd_hash` are zero in a report of a TDX 1.0 module (version 0).
    """

    version: int
    cpu_svn: bytes
    report_data: bytes
    mac: bytes
    valid: bytes
    tee_tcb_svn: bytes
    mr_seam: bytes
    mr_signer_seam: bytes
    seam_attributes: bytes
    tee_tcb_svn2: bytes
    td_attributes: bytes
    xfam: bytes
    mr_td: bytes
    mr_config_id: bytes
    mr_owner: bytes
    mr_owner_config: bytes
    rtmrs: tuple[bytes, bytes, bytes, bytes]
    servtd_hash: bytes


def parse_td_report(raw: bytes) -> TdReport:
    """Parse exactly 1,024 bytes. Both inner hashes must be right, reserved bytes zero.

    Raises `FormatError` only.
    """
    if len(raw) != TD_REPORT_BYTES:
        raise FormatError("TDREPORT", "size", expected=TD_REPORT_BYTES, actual=len(raw))
    (
        report_type,
        subtype,
        version,
        reserved1,
        reserved2,
        cpu_svn,
        tcb_info_hash,
        td_info_hash,
        report_data,
        reserved3,
        mac,
    ) = _REPORT_HEAD.unpack_from(raw)
    if (report_type, subtype) != (REPORT_TYPE_TDX, 0) or version > 1:
        raise FormatError(
            "TDREPORT",
            "type, subtype and version",
            expected=f"{REPORT_TYPE_TDX:#x}, 0, 0 or 1",
            actual=f"{report_type:#x}, {subtype}, {version}",
        )
    valid, tee_tcb_svn, mr_seam, mr_signer_seam, seam_attributes, svn2, reserved4 = (
        _TCB_INFO.unpack_from(raw, _TCB_INFO_AT)
    )
    *td_info, rtmr0, rtmr1, rtmr2, rtmr3, servtd_hash, reserved5 = _TD_INFO.unpack_from(
        raw, _TD_INFO_AT
    )
    reserved = (reserved2, reserved3, reserved4, raw[_TCB_INFO_END:_TD_INFO_AT], reserved5)
    if reserved1 or any(any(part) for part in reserved):
        raise FormatError("TDREPORT", "reserved bytes are zero")
    for name, stated, start, end in (
        ("TEE_TCB_INFO_HASH", tcb_info_hash, _TCB_INFO_AT, _TCB_INFO_END),
        ("TEE_INFO_HASH", td_info_hash, _TD_INFO_AT, TD_REPORT_BYTES),
    ):
        computed = hashlib.sha384(raw[start:end]).digest()
        if not hmac.compare_digest(computed, stated):
            raise FormatError(
                f"TDREPORT {name}",
                "the hash of the part that it covers",
                expected=computed.hex(),
                actual=stated.hex(),
            )
    attributes, xfam, mr_td, mr_config_id, mr_owner, mr_owner_config = td_info
    return TdReport(
        version=version,
        cpu_svn=cpu_svn,
        report_data=report_data,
        mac=mac,
        valid=valid,
        tee_tcb_svn=tee_tcb_svn,
        mr_seam=mr_seam,
        mr_signer_seam=mr_signer_seam,
        seam_attributes=seam_attributes,
        tee_tcb_svn2=svn2,
        td_attributes=attributes,
        xfam=xfam,
        mr_td=mr_td,
        mr_config_id=mr_config_id,
        mr_owner=mr_owner,
        mr_owner_config=mr_owner_config,
        rtmrs=(rtmr0, rtmr1, rtmr2, rtmr3),
        servtd_hash=servtd_hash,
    )


def pack_td_report(report: TdReport) -> bytes:
    """1,024 bytes: `parse_td_report`'s inverse; the inner hashes are computed.

    The MAC is taken as given. Raises `FormatError` for wrong lengths.
    """
    item = "TDREPORT"
    if report.version not in (0, 1):
        raise FormatError(item, "known version", expected="0 or 1", actual=report.version)
    tcb_info = pack_exactly(
        _TCB_INFO,
        report.valid,
        report.tee_tcb_svn,
        report.mr_seam,
        report.mr_signer_seam,
        report.seam_attributes,
        report.tee_tcb_svn2,
        bytes(95),
        item=item,
    )
    td_info = pack_exactly(
        _TD_INFO,
        report.td_attributes,
        report.xfam,
        report.mr_td,
        report.mr_config_id,
        report.mr_owner,
        report.mr_owner_config,
        *report.rtmrs,
        report.servtd_hash,
        bytes(64),
        item=item,
    )
    head = pack_exactly(
        _REPORT_HEAD,
        REPORT_TYPE_TDX,
        0,
        report.version,
        0,
        bytes(12),
        report.cpu_svn,
        hashlib.sha384(tcb_info).digest(),
        hashlib.sha384(td_info).digest(),
        report.report_data,
        bytes(32),
        report.mac,
        item=item,
    )
    return head + tcb_info + bytes(_TD_INFO_AT - _TCB_INFO_END) + td_info


def body_of_report(report: TdReport, *, td15: bool) -> TdBody:
    """The quote body that a quoting enclave makes of this report (TD 1.5, or TD 1.0)."""
    return TdBody(
        tee_tcb_svn=report.tee_tcb_svn,
        mr_seam=report.mr_seam,
        mr_signer_seam=report.mr_signer_seam,
        seam_attributes=report.seam_attributes,
        td_attributes=report.td_attributes,
        xfam=report.xfam,
        mr_td=report.mr_td,
        mr_config_id=report.mr_config_id,
        mr_owner=report.mr_owner,
        mr_owner_config=report.mr_owner_config,
        rtmrs=report.rtmrs,
        report_data=report.report_data,
        tee_tcb_svn2=report.tee_tcb_svn2 if td15 else None,
        mr_service_td=report.servtd_hash if td15 else None,
        extended=None,
    )
