"""TD bodies by themselves: types, sizes and the fields that only some of them have."""

from __future__ import annotations

import msgspec
import pytest

from supervisor.formats.errors import FormatError
from supervisor.formats.td_body import (
    BODY_TYPE_TD10,
    BODY_TYPE_TD15,
    BODY_TYPE_TD15_EXTENDED,
    TdBody,
    TdBodyExtension,
    build_td10_body,
    pack_td_body,
    parse_td_body,
)

TD10 = build_td10_body(
    tee_tcb_svn=bytes(range(16)),
    mr_td=b"\x01" * 48,
    rtmrs=(b"\x02" * 48, b"\x03" * 48, b"\x04" * 48, b"\x05" * 48),
    report_data=b"\x06" * 64,
    td_attributes=b"\x07" * 8,
    xfam=b"\x08" * 8,
)
TD15 = msgspec.structs.replace(TD10, tee_tcb_svn2=b"\x09" * 16, mr_service_td=b"\x0a" * 48)
EXTENSION = TdBodyExtension(
    vm_id=0xB0,
    td_id=b"\xb1" * 32,
    dev_info=b"\xb2" * 48,
    init_servtd_hash=b"\xb3" * 48,
    init_servtd_attributes=b"\xb4" * 8,
    init_cpu_svn=b"\xb5" * 16,
    init_tee_tcb_svn=b"\xb6" * 16,
    init_tee_fmspc=b"\xb7" * 12,
    current_servtd_hash=b"\xb8" * 48,
    current_servtd_attributes=b"\xb9" * 8,
)
EXTENDED = msgspec.structs.replace(TD15, extended=EXTENSION)


@pytest.mark.parametrize(
    ("body", "body_type", "size"),
    [
        (TD10, BODY_TYPE_TD10, 584),
        (TD15, BODY_TYPE_TD15, 648),
        (EXTENDED, BODY_TYPE_TD15_EXTENDED, 885),
    ],
)
def test_each_type_has_its_size_and_survives_packing(
    body: TdBody, body_type: int, size: int
) -> None:
    packed = pack_td_body(body)
    assert len(packed) == size
    assert parse_td_body(packed, body_type=body_type) == body
    for other in (BODY_TYPE_TD10, BODY_TYPE_TD15, BODY_TYPE_TD15_EXTENDED, 1, 0, 5):
        if other != body_type:
            with pytest.raises(FormatError):
                parse_td_body(packed, body_type=other)
    for wrong in (packed[:-1], packed + b"\x00"):
        with pytest.raises(FormatError):
            parse_td_body(wrong, body_type=body_type)


def test_the_extension_lies_where_the_documents_say() -> None:
    packed = pack_td_body(EXTENDED)
    places = [(648, 1), (649, 32), (681, 48), (729, 48), (777, 8), (785, 16), (801, 16)]
    places += [(817, 12), (829, 48), (877, 8)]
    for number, (offset, size) in enumerate(places):
        assert packed[offset : offset + size] == bytes([0xB0 + number]) * size


def test_fields_that_contradict_the_type_are_not_packed() -> None:
    for wrong in (
        msgspec.structs.replace(TD10, mr_service_td=bytes(48)),
        msgspec.structs.replace(TD15, mr_service_td=None),
        msgspec.structs.replace(TD10, extended=EXTENSION),
        msgspec.structs.replace(TD10, mr_td=bytes(47)),
        msgspec.structs.replace(TD10, report_data=bytes(65)),
        msgspec.structs.replace(TD10, rtmrs=(bytes(48),) * 3),
        msgspec.structs.replace(TD15, tee_tcb_svn2=bytes(15)),
        msgspec.structs.replace(EXTENDED, extended=msgspec.structs.replace(EXTENSION, vm_id=256)),
    ):
        with pytest.raises(FormatError):
            pack_td_body(wrong)
