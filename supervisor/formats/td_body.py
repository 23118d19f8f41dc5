"""What quotes say of a TD: the bodies TD 1.0, TD 1.5 and TD 1.5 extended.

Source: Intel TDX module ABI, as DCAP's quote format version 5 numbers the bodies. All
integers little-endian; registers and the like stay bytes.
"""

from __future__ import annotations

import struct

import msgspec

from supervisor.formats.errors import FormatError
from supervisor.formats.typed_bytes import pack_exactly

TD10_BODY_BYTES = 584
TD15_BODY_BYTES = 648
TD15_EXTENDED_BODY_BYTES = 885
BODY_TYPE_SGX = 1
BODY_TYPE_TD10 = 2
BODY_TYPE_TD15 = 3
BODY_TYPE_TD15_EXTENDED = 4

_TD10 = struct.Struct("<16s48s48s8s8s8s48s48s48s48s48s48s48s48s64s")
_TD15_TAIL = struct.Struct("<16s48s")
_EXTENDED_TAIL = struct.Struct("<B32s48s48s8s16s16s12s48s8s")
BODY_BYTES = {
    BODY_TYPE_TD10: TD10_BODY_BYTES,
    BODY_TYPE_TD15: TD15_BODY_BYTES,
    BODY_TYPE_TD15_EXTENDED: TD15_EXTENDED_BODY_BYTES,
}


class TdBodyExtension(msgspec.Struct, frozen=True, kw_only=True):
    """What "TD 1.5 extended" adds, 237 bytes; no sample is public."""

    vm_id: int
    td_id: bytes
    dev_info: bytes
    init_servtd_hash: bytes
    init_servtd_attributes: bytes
    init_cpu_svn: bytes
    init_tee_tcb_svn: bytes
    init_tee_fmspc: bytes
    current_servtd_hash: bytes
    current_servtd_attributes: bytes


class TdBody(msgspec.Struct, frozen=True, kw_only=True):
    """What a quote says of a TD. Registers 48 bytes, SVNs 16, attributes and XFAM 8.

    `tee_tcb_svn2` and `mr_service_td` are None in a TD 1.0 body, `extended` in all but the
    extended one; they have no defaults so that no reader of a body forgets them.
    """

    tee_tcb_svn: bytes
    mr_seam: bytes
    mr_signer_seam: bytes
    seam_attributes: bytes
    td_attributes: bytes
    xfam: bytes
    mr_td: bytes
    mr_config_id: bytes
    mr_owner: bytes
    mr_owner_config: bytes
    rtmrs: tuple[bytes, bytes, bytes, bytes]
    report_data: bytes
    tee_tcb_svn2: bytes | None
    mr_service_td: bytes | None
    extended: TdBodyExtension | None

    @property
    def body_type(self) -> int:
        """2 TD 1.0, 3 TD 1.5, 4 TD 1.5 extended."""
        if self.extended is not None:
            return BODY_TYPE_TD15_EXTENDED
        return BODY_TYPE_TD10 if self.tee_tcb_svn2 is None else BODY_TYPE_TD15


def build_td10_body(
    *,
    tee_tcb_svn: bytes,
    mr_td: bytes,
    rtmrs: tuple[bytes, bytes, bytes, bytes],
    report_data: bytes,
    td_attributes: bytes,
    xfam: bytes,
    mr_seam: bytes = bytes(48),
    mr_signer_seam: bytes = bytes(48),
    seam_attributes: bytes = bytes(8),
    mr_config_id: bytes = bytes(48),
    mr_owner: bytes = bytes(48),
    mr_owner_config: bytes = bytes(48),
) -> TdBody:
    """A TD 1.0 body; for TD 1.5 `msgspec.structs.replace` its last fields."""
    return TdBody(
        tee_tcb_svn=tee_tcb_svn,
        mr_seam=mr_seam,
        mr_signer_seam=mr_signer_seam,
        seam_attributes=seam_attributes,
        td_attributes=td_attributes,
        xfam=xfam,
        mr_td=mr_td,
        mr_config_id=mr_config_id,
        mr_owner=mr_owner,
        mr_owner_config=mr_owner_config,
        rtmrs=rtmrs,
        report_data=report_data,
        tee_tcb_svn2=None,
        mr_service_td=None,
        extended=None,
    )


def parse_td_body(raw: bytes, *, body_type: int) -> TdBody:
    """Parse a TD body of exactly its type's size (types as in a v5 descriptor)."""
    if len(raw) != BODY_BYTES.get(body_type):
        raise FormatError(
            "quote body", "a known type and its size", actual=f"{body_type}: {len(raw)} bytes"
        )
    *fields, rtmr0, rtmr1, rtmr2, rtmr3, report_data = _TD10.unpack_from(raw)
    svn2 = service_td = extended = None
    if body_type != BODY_TYPE_TD10:
        svn2, service_td = _TD15_TAIL.unpack_from(raw, TD10_BODY_BYTES)
    if body_type == BODY_TYPE_TD15_EXTENDED:
        tail = _EXTENDED_TAIL.unpack_from(raw, TD15_BODY_BYTES)
        extended = TdBodyExtension(
            **dict(zip(TdBodyExtension.__struct_fields__, tail, strict=True))
        )
    return TdBody(
        **dict(zip(TdBody.__struct_fields__[:10], fields, strict=True)),
        rtmrs=(rtmr0, rtmr1, rtmr2, rtmr3),
        report_data=report_data,
        tee_tcb_svn2=svn2,
        mr_service_td=service_td,
        extended=extended,
    )


def pack_td_body(body: TdBody) -> bytes:
    """584, 648 or 885 bytes, as `body.body_type` says. Raises `FormatError` for wrong lengths."""
    item = "quote body"
    first = msgspec.structs.astuple(body)[:10]
    packed = pack_exactly(_TD10, *first, *body.rtmrs, body.report_data, item=item)
    if body.body_type == BODY_TYPE_TD10:
        if body.mr_service_td is not None:
            raise FormatError(item, "a TD 1.0 body has no service TD register")
        return packed
    if body.tee_tcb_svn2 is None or body.mr_service_td is None:
        raise FormatError(item, "a TD 1.5 body has a second TCB SVN and a service TD register")
    packed += pack_exactly(_TD15_TAIL, body.tee_tcb_svn2, body.mr_service_td, item=item)
    if body.extended is not None:
        packed += pack_exactly(_EXTENDED_TAIL, *msgspec.structs.astuple(body.extended), item=item)
    return packed
