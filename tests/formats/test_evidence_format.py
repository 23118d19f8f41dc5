"""Evidence requests, REPORTDATA and the evidence file."""

from __future__ import annotations

import base64
import hashlib
import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.formats import merkle
from supervisor.formats.base64_text import to_base64
from supervisor.formats.errors import FormatError
from supervisor.formats.evidence import (
    MAX_EVIDENCE_BYTES,
    Evidence,
    EvidenceImage,
    EvidenceRequest,
    Proof,
    RequestContainer,
    decode_evidence,
    decode_request,
    encode_evidence,
    encode_request,
    report_data_for,
    request_leaf,
)

IMAGE = f"sha384/{'a' * 96}/{'b' * 96}"
STATUS = '{"containers":[],"images":[],"measurement":"ok","notes":[],"sealed":true}'
LONE = EvidenceRequest(nonce="00" * 16, status_digest_sha384="5" * 96)
CONTAINER = RequestContainer(container_id=7, image_id=IMAGE, start_event_digest_sha384="d" * 96)
OWN = EvidenceRequest(
    nonce="0f" * 64,
    status_digest_sha384="5" * 96,
    container=CONTAINER,
    public_key_sha384="e" * 96,
    user_data=base64.b64encode(b"x" * 4096).decode(),
)
EVIDENCE = Evidence(
    request=OWN,
    proof=Proof(index=1, size=2, path=("f" * 96,)),
    quote=to_base64(b"quote"),
    cc_eventlog=to_base64(b"log"),
    rtmr_index=3,
    config='{"plugins":{"order":["tdx_sim"]}}',
    images=(
        EvidenceImage(
            manifest=to_base64(b"{}"), signature=to_base64(b"s"), certificate=to_base64(b"c")
        ),
    ),
    status=STATUS,
)


def canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def test_report_data_is_what_the_bytes_spelt_out_give() -> None:
    # Nothing of the code under test makes the expected value.
    request = (
        b'{"nonce":"00000000000000000000000000000000","status_digest_sha384":"'
        + b"5" * 96
        + b'","version":1}'
    )
    root = hashlib.sha384(b"\x00" + request).digest()
    expected = root + bytes.fromhex("61636f6e2d65766964656e63652d7631")
    assert request_leaf(LONE) == encode_request(LONE) == request
    report_data = report_data_for(merkle.root([request_leaf(LONE)]))
    assert report_data == expected
    assert len(report_data) == 64
    assert report_data[48:] == b"acon-evidence-v1"


def test_two_requests_share_report_data_spelt_out() -> None:
    other = (
        b'{"container":{"container_id":7,"image_id":"sha384/' + b"a" * 96 + b"/" + b"b" * 96 + b'",'
        b'"start_event_digest_sha384":"' + b"d" * 96 + b'"},"nonce":"' + b"0f" * 64 + b'",'
        b'"public_key_sha384":"' + b"e" * 96 + b'","status_digest_sha384":"' + b"5" * 96 + b'",'
        b'"user_data":"' + base64.b64encode(b"x" * 4096) + b'","version":1}'
    )
    assert encode_request(OWN) == other
    left = hashlib.sha384(b"\x00" + encode_request(LONE)).digest()
    right = hashlib.sha384(b"\x00" + other).digest()
    root = hashlib.sha384(b"\x01" + left + right).digest()
    leaves = [request_leaf(LONE), request_leaf(OWN)]
    assert report_data_for(merkle.root(leaves)) == root + b"acon-evidence-v1"
    assert merkle.verify_inclusion(request_leaf(OWN), 1, 2, [left], root)


@pytest.mark.parametrize("root", [b"", bytes(47), bytes(49), bytes(64)])
def test_report_data_needs_a_root_of_48_bytes(root: bytes) -> None:
    with pytest.raises(FormatError):
        report_data_for(root)


@pytest.mark.parametrize(
    "request_", [LONE, OWN, msgspec.structs.replace(LONE, container=CONTAINER)]
)
def test_a_request_survives_encoding(request_: EvidenceRequest) -> None:
    assert decode_request(encode_request(request_)) == request_


BAD_REQUESTS = {
    "another version": msgspec.structs.replace(LONE, version=2),
    "a nonce of 15 bytes": msgspec.structs.replace(LONE, nonce="00" * 15),
    "a nonce of 65 bytes": msgspec.structs.replace(LONE, nonce="00" * 65),
    "half a byte": msgspec.structs.replace(LONE, nonce="0" * 33),
    "an upper-case nonce": msgspec.structs.replace(LONE, nonce="AB" * 16),
    "a nonce that is no hex": msgspec.structs.replace(LONE, nonce="zz" * 16),
    "Arabic digits": msgspec.structs.replace(LONE, nonce="\u0660" * 32),
    "no status": msgspec.structs.replace(LONE, status_digest_sha384=""),
    "a key without a container": msgspec.structs.replace(LONE, public_key_sha384="e" * 96),
    "user data without a container": msgspec.structs.replace(LONE, user_data="eA=="),
    "a short key hash": msgspec.structs.replace(OWN, public_key_sha384="e" * 95),
    "an upper-case key hash": msgspec.structs.replace(OWN, public_key_sha384="E" * 96),
    "user data too long": msgspec.structs.replace(OWN, user_data=to_base64(bytes(4097))),
    "user data without padding": msgspec.structs.replace(OWN, user_data="eA"),
    "a container of no image": msgspec.structs.replace(
        OWN, container=msgspec.structs.replace(CONTAINER, image_id="image")
    ),
    "container 0": msgspec.structs.replace(
        OWN, container=msgspec.structs.replace(CONTAINER, container_id=0)
    ),
    "a container without start": msgspec.structs.replace(
        OWN, container=msgspec.structs.replace(CONTAINER, start_event_digest_sha384="")
    ),
}


@pytest.mark.parametrize("request_", BAD_REQUESTS.values(), ids=BAD_REQUESTS.keys())
def test_a_request_outside_its_bounds_is_refused_both_ways(request_: EvidenceRequest) -> None:
    with pytest.raises(FormatError):
        encode_request(request_)
    value = {
        name: field for name, field in msgspec.to_builtins(request_).items() if field is not None
    }
    with pytest.raises(FormatError):
        decode_request(canonical(value))
    with pytest.raises(FormatError):
        encode_evidence(msgspec.structs.replace(EVIDENCE, request=request_))


def test_a_request_has_one_form() -> None:
    value = json.loads(encode_request(LONE))
    assert decode_request(canonical(value)) == LONE
    without_version = {name: value[name] for name in value if name != "version"}
    for other in (
        canonical(without_version),
        canonical({**value, "user_data": None}),
        canonical({**value, "container": None}),
        canonical({**value, "more": 1}),
        canonical({**value, "version": "1"}),
        canonical({**value, "version": True}),
        encode_request(LONE) + b" ",
        json.dumps(value).encode(),
    ):
        with pytest.raises(FormatError):
            decode_request(other)


def test_evidence_survives_encoding_and_reformatting() -> None:
    raw = encode_evidence(EVIDENCE)
    assert decode_evidence(raw) == EVIDENCE
    value = json.loads(raw)
    assert canonical(value) == raw
    assert decode_evidence(json.dumps(value, indent=2, sort_keys=False).encode()) == EVIDENCE
    assert value["format"] == "acon-evidence-v1"
    assert value["request"] == json.loads(encode_request(OWN))


def test_each_field_of_evidence_must_be_there_and_none_else() -> None:
    value = json.loads(encode_evidence(EVIDENCE))
    for name in value:
        with pytest.raises(FormatError):
            decode_evidence(canonical({key: value[key] for key in value if key != name}))
        for wrong in (None, 7.5, [7], {"x": 1}):
            with pytest.raises(FormatError):
                decode_evidence(canonical({**value, name: wrong}))
    with pytest.raises(FormatError):
        decode_evidence(canonical({**value, "more": 1}))
    for name in ("request", "proof"):
        with pytest.raises(FormatError):
            decode_evidence(canonical({**value, name: {**value[name], "more": 1}}))
    with pytest.raises(FormatError):
        decode_evidence(canonical({**value, "images": [{**value["images"][0], "more": 1}]}))
    with pytest.raises(FormatError, match="spelt out"):
        request = {**json.loads(encode_request(LONE)), "container": None}
        decode_evidence(canonical({**value, "request": request}))


BAD_EVIDENCE = {
    "another format": {"format": "acon-evidence-v2"},
    "an index behind the tree": {"proof": Proof(index=2, size=2, path=("f" * 96,))},
    "a negative index": {"proof": Proof(index=-1, size=2, path=("f" * 96,))},
    "an empty tree": {"proof": Proof(index=0, size=0, path=())},
    "a path without end": {"proof": Proof(index=0, size=2, path=("f" * 96,) * 65)},
    "a node of 32 bytes": {"proof": Proof(index=0, size=2, path=("f" * 64,))},
    "a quote that is no base64": {"quote": "%"},
    "a quote too long": {"quote": to_base64(bytes(128 * 1024 + 1))},
    "a log that is no base64": {"cc_eventlog": "e A=="},
    "register 4": {"rtmr_index": 4},
    "register -1": {"rtmr_index": -1},
    "a configuration that is not canonical": {"config": '{"a": 1}'},
    "a configuration that is no object": {"config": "[]"},
    "a configuration that is not there": {"config": ""},
    "a lone surrogate": {"config": '"\ud800"'},
    "a status that is none": {"status": "{}"},
    "a status that is not canonical": {"status": STATUS + " "},
    "a manifest that is no base64": {
        "images": (EvidenceImage(manifest="{}", signature="", certificate=""),)
    },
    "a signature that is no base64": {
        "images": (EvidenceImage(manifest="", signature="x", certificate=""),)
    },
    "a certificate that is no base64": {
        "images": (EvidenceImage(manifest="", signature="", certificate="x"),)
    },
    "too many images": {
        "images": (EvidenceImage(manifest="", signature="", certificate=""),) * 16_385
    },
}


@pytest.mark.parametrize("changes", BAD_EVIDENCE.values(), ids=BAD_EVIDENCE.keys())
def test_evidence_outside_its_bounds_is_refused_both_ways(changes: dict[str, object]) -> None:
    evidence = msgspec.structs.replace(EVIDENCE, **changes)
    with pytest.raises(FormatError):
        encode_evidence(evidence)
    value = json.loads(encode_evidence(EVIDENCE))
    value.update({name: msgspec.to_builtins(field) for name, field in changes.items()})
    with pytest.raises(FormatError):
        decode_evidence(canonical(value))


def test_a_file_too_large_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(FormatError):
        decode_evidence(b" " * (MAX_EVIDENCE_BYTES + 1))


@pytest.mark.parametrize("raw", [b"", b"null", b"{}", b"[" * 100_000, b"\x00", b"\xff\xfe{}"])
def test_what_is_no_evidence_is_refused(raw: bytes) -> None:
    with pytest.raises(FormatError):
        decode_evidence(raw)


def test_a_duplicate_key_is_refused() -> None:
    raw = encode_evidence(EVIDENCE)
    with pytest.raises(FormatError):
        decode_evidence(raw[:-1] + b',"rtmr_index":3}')


@given(st.binary(min_size=1, max_size=4), st.integers(0, 10_000))
def test_no_mutation_makes_the_decoder_raise_anything_else(patch: bytes, at: int) -> None:
    raw = encode_evidence(EVIDENCE)
    at %= len(raw)
    mutated = raw[:at] + patch + raw[at + len(patch) :]
    try:
        evidence = decode_evidence(mutated)
    except FormatError:
        return
    assert json.loads(encode_evidence(evidence)) == json.loads(mutated)


def test_a_proof_gives_its_nodes_as_bytes() -> None:
    assert EVIDENCE.proof.path_nodes == (b"\xff" * 48,)
