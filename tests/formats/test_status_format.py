"""The status document."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.formats.base64_text import to_base64
from supervisor.formats.errors import FormatError
from supervisor.formats.status import (
    MAX_ATTESTATION_DATA_BYTES,
    AttestationData,
    ContainerStatus,
    ImageStatus,
    Status,
    attestation_data_bytes,
    decode_status,
    encode_status,
)

IMAGE = f"sha384/{'a' * 96}/{'b' * 96}"
RUNNING = ContainerStatus(
    container_id=1, image_id=IMAGE, state="running", start_event_digest_sha384="c" * 96
)
STATUS = Status(
    sealed=True,
    measurement="ok",
    images=(ImageStatus(image_id=IMAGE, names=("model:1",), executable=True, missing_layers=()),),
    containers=(RUNNING,),
    notes=("a new boot",),
)


SAID = AttestationData(kind="text", data=to_base64("caf\u00e9\tat\r\n".encode()))


def saying(kind: str, said: bytes | str) -> Status:
    data = AttestationData(kind=kind, data=said if isinstance(said, str) else to_base64(said))
    container = msgspec.structs.replace(RUNNING, attestation_data=data)
    return msgspec.structs.replace(STATUS, containers=(container,))


def test_a_status_survives_encoding() -> None:
    exited = msgspec.structs.replace(RUNNING, state="exited")
    ends: tuple[dict[str, int], ...] = ({"exit_code": 0}, {"signal": 9}, {})
    status = msgspec.structs.replace(
        STATUS,
        measurement="halted: the register moved",
        containers=tuple(msgspec.structs.replace(exited, **end) for end in ends),
    )
    many = msgspec.structs.replace(
        STATUS,
        containers=(
            msgspec.structs.replace(RUNNING, restarts=7, attestation_data=SAID),
            msgspec.structs.replace(RUNNING, state="starting", attestation_data=SAID),
        ),
    )
    longest = saying("binary", bytes(range(256)) * (MAX_ATTESTATION_DATA_BYTES // 256))
    for one in (STATUS, status, many, longest, saying("text", b""), saying("binary", b"")):
        assert decode_status(encode_status(one)) == one


def test_the_document_is_what_the_format_says() -> None:
    empty = Status(sealed=False, measurement="ok", images=(), containers=(), notes=())
    assert encode_status(empty) == (
        b'{"containers":[],"images":[],"measurement":"ok","notes":[],"sealed":false}'
    )
    (container,) = json.loads(encode_status(STATUS))["containers"]
    assert container == {
        "container_id": 1,
        "image_id": IMAGE,
        "state": "running",
        "exit_code": None,
        "signal": None,
        "restarts": 0,
        "attestation_data": None,
        "start_event_digest_sha384": "c" * 96,
    }
    (container,) = json.loads(encode_status(saying("text", b"hi")))["containers"]
    assert container["attestation_data"] == {"kind": "text", "data": "aGk="}


IMPOSSIBLE = {
    "a measurement of another kind": msgspec.structs.replace(STATUS, measurement="fine"),
    "no image id": msgspec.structs.replace(
        STATUS, images=(msgspec.structs.replace(STATUS.images[0], image_id="x"),)
    ),
    "an unknown state": msgspec.structs.replace(
        STATUS, containers=(msgspec.structs.replace(RUNNING, state="paused"),)
    ),
    "running with an exit code": msgspec.structs.replace(
        STATUS, containers=(msgspec.structs.replace(RUNNING, exit_code=0),)
    ),
    "ended twice": msgspec.structs.replace(
        STATUS,
        containers=(msgspec.structs.replace(RUNNING, state="exited", exit_code=0, signal=9),),
    ),
    "no start event": msgspec.structs.replace(
        STATUS, containers=(msgspec.structs.replace(RUNNING, start_event_digest_sha384=""),)
    ),
    "restarted less than never": msgspec.structs.replace(
        STATUS, containers=(msgspec.structs.replace(RUNNING, restarts=-1),)
    ),
    "words of one that has ended": msgspec.structs.replace(
        STATUS,
        containers=(msgspec.structs.replace(RUNNING, state="exited", attestation_data=SAID),),
    ),
    "words of an unknown kind": saying("json", b"{}"),
    "words that are too long": saying("binary", bytes(MAX_ATTESTATION_DATA_BYTES + 1)),
    "words that are no base64": saying("binary", "a word"),
    "words in another base64": saying("binary", "aGl="),
    "a text that is no UTF-8": saying("text", b"ok\xff"),
    "a text with a NUL": saying("text", b"hi\0"),
    "a text that colours terminals": saying("text", b"\x1b[31mred"),
}


@pytest.mark.parametrize("status", IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_a_status_that_no_supervisor_writes_is_refused_both_ways(status: Status) -> None:
    with pytest.raises(FormatError):
        encode_status(status)
    raw = json.dumps(msgspec.to_builtins(status), sort_keys=True, separators=(",", ":"))
    with pytest.raises(FormatError):
        decode_status(raw.encode())


def test_a_status_that_is_too_large_to_be_read_is_not_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raw = encode_status(STATUS)
    monkeypatch.setattr("supervisor.formats.status.MAX_STATUS_BYTES", len(raw))
    assert encode_status(STATUS) == raw
    with pytest.raises(FormatError, match="larger than its limit"):
        encode_status(msgspec.structs.replace(STATUS, sealed=False))


def canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def test_missing_unknown_and_mistyped_fields_are_refused() -> None:
    value = json.loads(encode_status(STATUS))
    assert decode_status(canonical(value)) == STATUS
    for name in value:
        with pytest.raises(FormatError):
            decode_status(canonical({key: value[key] for key in value if key != name}))
        with pytest.raises(FormatError):
            decode_status(canonical({**value, name: 7}))
    with pytest.raises(FormatError):
        decode_status(canonical({**value, "more": []}))
    for name in ("exit_code", "signal", "restarts", "attestation_data"):
        container = {key: field for key, field in value["containers"][0].items() if key != name}
        with pytest.raises(FormatError, match="spelt out"):
            decode_status(canonical({**value, "containers": [container]}))


@pytest.mark.parametrize("raw", [b"", b"{}", b"[]", b"null", b"{" * 10_000, b"\xff"])
def test_what_is_no_status_is_refused(raw: bytes) -> None:
    with pytest.raises(FormatError):
        decode_status(raw)


def test_a_status_in_another_form_is_refused() -> None:
    with pytest.raises(FormatError):
        decode_status(encode_status(STATUS) + b"\n")


@given(st.binary(max_size=5), st.integers(0, 400))
def test_no_mutation_makes_the_decoder_raise_anything_else(patch: bytes, at: int) -> None:
    raw = encode_status(STATUS)
    mutated = raw[:at] + patch + raw[at + len(patch) :]
    try:
        status = decode_status(mutated)
    except FormatError:
        return
    assert encode_status(status) == mutated


@given(st.sampled_from(["binary", "text"]), st.binary(max_size=64))
def test_attestation_data_is_read_as_it_was_said_or_refused(kind: str, said: bytes) -> None:
    data = AttestationData(kind=kind, data=to_base64(said))
    try:
        assert attestation_data_bytes(data, item="data") == said
    except FormatError as error:
        assert kind == "text"
        assert error.item == "data.data"
