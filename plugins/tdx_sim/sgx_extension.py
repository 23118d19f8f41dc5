"""The SGX extension of a PCK certificate (Intel's "SGX PCK Certificate and CRL
Profile"), in DER. `cryptography` carries unknown extensions as bytes, so these are made here.
"""

from __future__ import annotations

from collections.abc import Sequence

from cryptography import x509

SGX_EXTENSION_OID = x509.ObjectIdentifier("1.2.840.113741.1.13.1")

_OID_BODY = bytes.fromhex("2a864886f84d010d01")  # 1.2.840.113741.1.13.1
_BOOLEAN, _INTEGER, _OCTET_STRING, _OID, _ENUMERATED, _SEQUENCE = 0x01, 0x02, 0x04, 0x06, 0x0A, 0x30
_SGX_TYPE_SCALABLE = 1


def sgx_extension(
    *,
    ppid: bytes,
    tcb_components: bytes,
    pce_svn: int,
    cpu_svn: bytes,
    pce_id: bytes,
    fmspc: bytes,
    platform_instance_id: bytes,
) -> x509.UnrecognizedExtension:
    """The extension's value: PPID 16, 16 component SVNs (one byte each), PCESVN, CPUSVN 16,
    PCEID 2, FMSPC 6, platform instance 16 bytes; the platform is "scalable", and dynamic,
    with cached keys and SMT, as multi-package TDX servers are.
    """
    svns = [_entry((2, i), _integer(svn)) for i, svn in enumerate(tcb_components, start=1)]
    svns.append(_entry((2, 17), _integer(pce_svn)))
    svns.append(_entry((2, 18), _tlv(_OCTET_STRING, cpu_svn)))
    flags = [_entry((7, flag), _tlv(_BOOLEAN, b"\xff")) for flag in (1, 2, 3)]
    value = _sequence(
        [
            _entry((1,), _tlv(_OCTET_STRING, ppid)),
            _entry((2,), _sequence(svns)),
            _entry((3,), _tlv(_OCTET_STRING, pce_id)),
            _entry((4,), _tlv(_OCTET_STRING, fmspc)),
            _entry((5,), _tlv(_ENUMERATED, bytes([_SGX_TYPE_SCALABLE]))),
            _entry((6,), _tlv(_OCTET_STRING, platform_instance_id)),
            _entry((7,), _sequence(flags)),
        ]
    )
    return x509.UnrecognizedExtension(SGX_EXTENSION_OID, value)


def _entry(suffix: Sequence[int], value: bytes) -> bytes:
    """SEQUENCE { OID, value }; every arc of `suffix` is below 128 and thus one byte."""
    return _sequence([_tlv(_OID, _OID_BODY + bytes(suffix)), value])


def _sequence(parts: Sequence[bytes]) -> bytes:
    return _tlv(_SEQUENCE, b"".join(parts))


def _integer(value: int) -> bytes:
    # One more bit than the value needs, because DER integers are signed.
    return _tlv(_INTEGER, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def _tlv(tag: int, content: bytes) -> bytes:
    length = len(content)
    if length < 0x80:
        return bytes([tag, length]) + content
    size = length.to_bytes((length.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(size)]) + size + content
