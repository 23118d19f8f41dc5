"""TDX quotes, versions 4 and 5: their bytes to fields and back. Nothing is verified here.

Sources: Intel TDX DCAP Quoting Library API, "Quote Format"; Intel TDX module ABI for the
bodies. All integers little-endian but the raw ECDSA signatures and keys (big-endian r‖s, x‖y),
which stay bytes.

    v4: header 48 | body 584                    | u32 n | auth data n | zeros
    v5: header 48 | u16 type | u32 size | body  | u32 n | auth data n | zeros

Signed is everything before `u32 n`, in v5 the body's descriptor too.
"""

from __future__ import annotations

import hashlib
import struct

import msgspec

from supervisor.formats.errors import FormatError
from supervisor.formats.td_body import (
    BODY_BYTES,
    BODY_TYPE_SGX,
    BODY_TYPE_TD10,
    BODY_TYPE_TD15,
    BODY_TYPE_TD15_EXTENDED,
    TdBody,
    TdBodyExtension,
    build_td10_body,
    pack_td_body,
    parse_td_body,
)
from supervisor.formats.typed_bytes import pack_exactly

__all__ = [
    "BODY_TYPE_TD10",
    "BODY_TYPE_TD15",
    "BODY_TYPE_TD15_EXTENDED",
    "MAX_QUOTE_BYTES",
    "QE_VENDOR_INTEL",
    "QeReport",
    "Quote",
    "QuoteAuth",
    "QuoteHeader",
    "TdBody",
    "TdBodyExtension",
    "build_header",
    "build_td10_body",
    "pack_auth",
    "pack_header",
    "pack_qe_report",
    "pack_quote",
    "pack_signed_part",
    "pack_td_body",
    "parse_qe_report",
    "parse_quote",
    "parse_td_body",
    "qe_report_data",
]

MAX_QUOTE_BYTES = 128 * 1024
HEADER_BYTES = 48
QE_REPORT_BYTES = 384
QE_AUTH_DATA_BYTES = 32
TEE_TYPE_SGX = 0x00
TEE_TYPE_TDX = 0x81
KEY_TYPE_ECDSA_P256 = 2
QE_VENDOR_INTEL = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
CERT_TYPE_PEM_CHAIN = 5
CERT_TYPE_QE_REPORT = 6

_HEADER = struct.Struct("<HHI4s16s20s")
_DESCRIPTOR = struct.Struct("<HI")
_CERT_HEAD = struct.Struct("<HI")
_AUTH_HEAD = struct.Struct("<64s64sHI")
_QE_HEAD = struct.Struct("<384s64sH")
_QE_REPORT = struct.Struct("<16sI28s16s32s32s32s96sHH60s64s")
_U32 = struct.Struct("<I")


class QuoteHeader(msgspec.Struct, frozen=True, kw_only=True):
    """48 bytes. The first 16 of `user_data` (20) are the platform's QE ID.

    `reserved` (4) is what some call QE_SVN and PCE_SVN, in either order: never use it.
    """

    version: int
    attestation_key_type: int = KEY_TYPE_ECDSA_P256
    tee_type: int = TEE_TYPE_TDX
    reserved: bytes = bytes(4)
    qe_vendor_id: bytes = QE_VENDOR_INTEL
    user_data: bytes = bytes(20)


class QeReport(msgspec.Struct, frozen=True, kw_only=True):
    """The quoting enclave's SGX report body, 384 bytes; reserved parts are kept."""

    cpu_svn: bytes
    misc_select: int
    reserved1: bytes = bytes(28)
    attributes: bytes
    mr_enclave: bytes
    reserved2: bytes = bytes(32)
    mr_signer: bytes
    reserved3: bytes = bytes(96)
    isv_prod_id: int
    isv_svn: int
    reserved4: bytes = bytes(60)
    report_data: bytes


class QuoteAuth(msgspec.Struct, frozen=True, kw_only=True):
    """Who vouches. Signatures and key are 64 bytes, raw big-endian; QE auth data 32 bytes.

    `certificate_chain_pem`: PCK leaf, its CA, root, as in the quote (perhaps a NUL behind).
    """

    signature: bytes
    attestation_public_key: bytes
    qe_report: bytes
    qe_report_signature: bytes
    qe_auth_data: bytes
    certificate_chain_pem: bytes


class Quote(msgspec.Struct, frozen=True, kw_only=True):
    """A quote. `trailing_bytes` counts the unsigned zeros behind it: cut them off before
    the quote is hashed or stored.
    """

    header: QuoteHeader
    body: TdBody
    signed_bytes: bytes
    auth: QuoteAuth
    trailing_bytes: int


def build_header(*, version: int, user_data: bytes = bytes(20)) -> QuoteHeader:
    """A TDX header (version 4 or 5) as Intel's quoting enclave writes it."""
    return QuoteHeader(version=version, user_data=user_data)


def parse_quote(raw: bytes) -> Quote:
    """Parse a TDX quote of version 4 or 5. Raises `FormatError` only.

    Refused: SGX quotes, other key types and vendors than ECDSA P-256 and Intel, sizes that do
    not fill what holds them, anything but zeros behind the authentication data.
    """
    if len(raw) > MAX_QUOTE_BYTES:
        raise FormatError(
            "quote", "too long", expected=f"at most {MAX_QUOTE_BYTES} bytes", actual=len(raw)
        )
    header = _parse_header(raw)
    body_type, body_at = BODY_TYPE_TD10, HEADER_BYTES
    if header.version == 5:
        _need(raw, HEADER_BYTES + _DESCRIPTOR.size, item="quote body descriptor")
        body_type, size = _DESCRIPTOR.unpack_from(raw, HEADER_BYTES)
        body_at += _DESCRIPTOR.size
        if body_type == BODY_TYPE_SGX:
            raise FormatError("quote body type", "this is an SGX quote, no TDX quote", actual=1)
        if BODY_BYTES.get(body_type) != size:
            raise FormatError(
                "quote body descriptor",
                "a known TD body with its size",
                expected=", ".join(f"{kind}: {length}" for kind, length in BODY_BYTES.items()),
                actual=f"{body_type}: {size}",
            )
    auth_size_at = body_at + BODY_BYTES[body_type]
    auth_at = auth_size_at + _U32.size
    _need(raw, auth_at, item="quote body")
    body = parse_td_body(raw[body_at:auth_size_at], body_type=body_type)
    (auth_size,) = _U32.unpack_from(raw, auth_size_at)
    _need(raw, auth_at + auth_size, item="quote authentication data")
    auth = _parse_auth(raw[auth_at : auth_at + auth_size])
    trailing = raw[auth_at + auth_size :]
    if any(trailing):
        raise FormatError(
            "quote", "only zeros may follow the signed parts", actual=f"{len(trailing)} bytes"
        )
    return Quote(
        header=header,
        body=body,
        signed_bytes=raw[:auth_size_at],
        auth=auth,
        trailing_bytes=len(trailing),
    )


def _need(raw: bytes, size: int, *, item: str) -> None:
    if len(raw) < size:
        raise FormatError(
            item, "the quote is cut short", expected=f"at least {size} bytes", actual=len(raw)
        )


def _parse_header(raw: bytes) -> QuoteHeader:
    _need(raw, HEADER_BYTES, item="quote header")
    version, key_type, tee_type, reserved, vendor, user_data = _HEADER.unpack_from(raw)
    if version == 3 or (version in (4, 5) and tee_type == TEE_TYPE_SGX):
        raise FormatError(
            "quote header",
            "this is an SGX quote, no TDX quote",
            expected=f"version 4 or 5, TEE type {TEE_TYPE_TDX:#x}",
            actual=f"version {version}, TEE type {tee_type:#x}",
        )
    if version not in (4, 5):
        raise FormatError("quote header", "known version", expected="4 or 5", actual=version)
    if tee_type != TEE_TYPE_TDX:
        raise FormatError(
            "quote header", "the TEE is TDX", expected=hex(TEE_TYPE_TDX), actual=hex(tee_type)
        )
    if key_type != KEY_TYPE_ECDSA_P256:
        raise FormatError(
            "quote header", "the key is ECDSA P-256", expected=KEY_TYPE_ECDSA_P256, actual=key_type
        )
    if vendor != QE_VENDOR_INTEL:
        raise FormatError(
            "quote header",
            "the quoting enclave is Intel's",
            expected=QE_VENDOR_INTEL.hex(),
            actual=vendor.hex(),
        )
    return QuoteHeader(
        version=version,
        attestation_key_type=key_type,
        tee_type=tee_type,
        reserved=reserved,
        qe_vendor_id=vendor,
        user_data=user_data,
    )


def _parse_auth(raw: bytes) -> QuoteAuth:
    item = "quote authentication data"
    _need(raw, _AUTH_HEAD.size + _QE_HEAD.size, item=item)
    signature, public_key, cert_type, size = _AUTH_HEAD.unpack_from(raw)
    _check_cert(cert_type, CERT_TYPE_QE_REPORT, size, len(raw) - _AUTH_HEAD.size, item=item)
    qe_report, qe_signature, auth_data_size = _QE_HEAD.unpack_from(raw, _AUTH_HEAD.size)
    if auth_data_size != QE_AUTH_DATA_BYTES:
        raise FormatError(
            item, "size of QE auth data", expected=QE_AUTH_DATA_BYTES, actual=auth_data_size
        )
    auth_data_at = _AUTH_HEAD.size + _QE_HEAD.size
    chain_head_at = auth_data_at + auth_data_size
    chain_at = chain_head_at + _CERT_HEAD.size
    _need(raw, chain_at, item=item)
    cert_type, size = _CERT_HEAD.unpack_from(raw, chain_head_at)
    _check_cert(cert_type, CERT_TYPE_PEM_CHAIN, size, len(raw) - chain_at, item=item)
    return QuoteAuth(
        signature=signature,
        attestation_public_key=public_key,
        qe_report=qe_report,
        qe_report_signature=qe_signature,
        qe_auth_data=raw[auth_data_at:chain_head_at],
        certificate_chain_pem=raw[chain_at:],
    )


def _check_cert(cert_type: int, expected: int, size: int, rest: int, *, item: str) -> None:
    if cert_type != expected or size != rest:
        raise FormatError(
            item,
            "certification data of the expected type fills the remainder",
            expected=f"type {expected}, {rest} bytes",
            actual=f"type {cert_type}, {size} bytes",
        )


def parse_qe_report(raw: bytes) -> QeReport:
    """Parse `QuoteAuth.qe_report`: exactly 384 bytes. Raises `FormatError`."""
    if len(raw) != QE_REPORT_BYTES:
        raise FormatError("QE report", "size", expected=QE_REPORT_BYTES, actual=len(raw))
    fields = _QE_REPORT.unpack(raw)
    return QeReport(**dict(zip(QeReport.__struct_fields__, fields, strict=True)))


def qe_report_data(attestation_public_key: bytes, qe_auth_data: bytes) -> bytes:
    """What REPORTDATA of the QE report must be: SHA256(key || auth data) || 32 zeros."""
    return hashlib.sha256(attestation_public_key + qe_auth_data).digest() + bytes(32)


def pack_header(header: QuoteHeader) -> bytes:
    """48 bytes. Raises `FormatError` for wrong lengths."""
    return pack_exactly(_HEADER, *msgspec.structs.astuple(header), item="quote header")


def pack_signed_part(header: QuoteHeader, body: TdBody) -> bytes:
    """What the attestation key signs: in version 5 with the body's descriptor."""
    packed = pack_td_body(body)
    if header.version == 5:
        descriptor = _DESCRIPTOR.pack(body.body_type, len(packed))
        return pack_header(header) + descriptor + packed
    if header.version != 4 or body.body_type != BODY_TYPE_TD10:
        raise FormatError(
            "quote",
            "version 4 holds a TD 1.0 body, version 5 any",
            actual=f"version {header.version}, body type {body.body_type}",
        )
    return pack_header(header) + packed


def pack_qe_report(report: QeReport) -> bytes:
    """384 bytes: `QuoteAuth.qe_report`, which the PCK signs. Raises `FormatError`."""
    return pack_exactly(_QE_REPORT, *msgspec.structs.astuple(report), item="QE report")


def pack_auth(auth: QuoteAuth) -> bytes:
    """The authentication data, without its leading length. Raises `FormatError`."""
    item = "quote authentication data"
    if len(auth.qe_auth_data) != QE_AUTH_DATA_BYTES:
        raise FormatError(item, "size of QE auth data", expected=QE_AUTH_DATA_BYTES)
    chain = auth.certificate_chain_pem
    inner = pack_exactly(
        _QE_HEAD, auth.qe_report, auth.qe_report_signature, QE_AUTH_DATA_BYTES, item=item
    )
    inner += auth.qe_auth_data + _CERT_HEAD.pack(CERT_TYPE_PEM_CHAIN, len(chain)) + chain
    outer = pack_exactly(
        _AUTH_HEAD,
        auth.signature,
        auth.attestation_public_key,
        CERT_TYPE_QE_REPORT,
        len(inner),
        item=item,
    )
    return outer + inner


def pack_quote(
    header: QuoteHeader, body: TdBody, auth: QuoteAuth, *, trailing_bytes: int = 0
) -> bytes:
    """A whole quote: `parse_quote`'s inverse. Raises `FormatError`."""
    packed = pack_auth(auth)
    signed = pack_signed_part(header, body)
    return signed + _U32.pack(len(packed)) + packed + bytes(trailing_bytes)
