"""Our own management API: every call, every kind of refusal, strict bodies."""

from __future__ import annotations

import base64
import os
import stat
from pathlib import Path

import msgspec
import pytest
import structlog
import trio
from http_fakes import (
    IMAGE_ID,
    FakeOperations,
    ask,
    ask_json,
    refusal_named,
    served,
)

from supervisor import (
    Busy,
    ConfigError,
    Conflict,
    DeadlineExceeded,
    Denied,
    DigestMismatch,
    FileBlob,
    ManifestUpload,
    MeasurementHalted,
    PluginContractError,
    PolicyDenied,
    Refusal,
    RuntimeFailed,
    UnknownItem,
)
from supervisor.formats.digest import digest_of
from supervisor.formats.status import decode_status

LAYER = f"/api/v2/layers/sha384/{'0' * 96}"


def image_json(manifest: bytes) -> dict[str, str]:
    return {
        "manifest": base64.b64encode(manifest).decode(),
        "signature": base64.b64encode(b"\x00\xff").decode(),
        "certificate": base64.b64encode(b"\x30").decode(),
    }


async def test_a_group_is_admitted_in_one_request(tmp_path: Path) -> None:
    operations = FakeOperations()
    group = {"images": [image_json(b"one"), image_json(b"two")]}
    async with served(operations, tmp_path) as socket:
        answer = await ask_json(socket, "POST", "/api/v2/images", group)
    assert operations.groups == [
        tuple(
            ManifestUpload(manifest=manifest, signature=b"\x00\xff", certificate_der=b"\x30")
            for manifest in (b"one", b"two")
        )
    ]
    assert answer.json == {
        "image_ids": [
            f"sha384/{'a' * 96}/{digest_of('sha384', manifest).hex}"
            for manifest in (b"one", b"two")
        ],
        "missing_layers": ["x"],
        "already_admitted": [],
    }


async def test_images_and_status_are_shown(tmp_path: Path) -> None:
    operations = FakeOperations()
    async with served(operations, tmp_path) as socket:
        images = await ask(socket, "GET", "/api/v2/images")
        status = await ask(socket, "GET", "/api/v2/status")
    assert images.json == {
        "images": [
            {
                "image_id": IMAGE_ID,
                "names": ["app:1"],
                "executable": True,
                "missing_layers": ["x"],
            }
        ]
    }
    assert status.body == operations.status()
    assert not decode_status(status.body).sealed


async def test_seal_fetch_and_evidence_reach_the_supervisor(tmp_path: Path) -> None:
    operations = FakeOperations()
    blob = FileBlob(file="/oci/blob", blob_digest="sha256:00", media_type="tar", size_bytes=3)
    async with served(operations, tmp_path) as socket:
        seal = await ask(socket, "POST", "/api/v2/seal", body=b"")
        fetch = await ask_json(socket, "POST", f"{LAYER}/fetch", {"source": blob})
        layer = await ask(socket, "GET", LAYER)
        evidence = await ask_json(socket, "POST", "/api/v2/evidence", {"nonce": "0f" * 16})
    assert (seal.json, operations.sealed) == ({}, True)
    assert (fetch.json, operations.fetched) == ({"state": "verified"}, [blob])
    assert layer.json == {"state": "verified", "received_bytes": None, "total_bytes": None}
    assert (evidence.body, operations.nonces) == (b'{"evidence":1}', [b"\x0f" * 16])
    assert evidence.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (DigestMismatch, 400),
        (PolicyDenied, 400),
        (Denied, 403),
        (UnknownItem, 404),
        (DeadlineExceeded, 408),
        (Conflict, 409),
        (Busy, 503),
        (MeasurementHalted, 503),
        (RuntimeFailed, 500),
        (ConfigError, 500),
        (PluginContractError, 500),
        (Refusal, 500),
    ],
)
async def test_each_kind_of_refusal_has_its_status_and_says_everything(
    tmp_path: Path, kind: type[Refusal], status: int
) -> None:
    operations = FakeOperations()
    operations.refusal = refusal_named(kind)
    async with served(operations, tmp_path) as socket:
        answer = await ask(socket, "POST", "/api/v2/seal", body=b"")
    assert answer.status == status
    assert answer.json == {"error": refusal_named(kind).to_dict()}
    assert answer.headers.get("retry-after") == ("1" if kind is Busy else None)


async def test_a_fault_of_ours_is_logged_and_never_shown(tmp_path: Path) -> None:
    operations = FakeOperations()
    operations.refusal = ZeroDivisionError("secret detail")
    with structlog.testing.capture_logs() as logs:
        async with served(operations, tmp_path) as socket:
            answer = await ask(socket, "POST", "/api/v2/seal", body=b"")
            operations.refusal = None
            after = await ask(socket, "POST", "/api/v2/seal", body=b"")
    assert (answer.status, answer.kind, after.status) == (500, "runtime", 200)
    assert b"secret" not in answer.body
    assert b"Traceback" not in answer.body
    [failed] = [entry for entry in logs if entry["log_level"] == "error"]
    assert failed["path"] == "/api/v2/seal"


async def test_each_request_is_in_the_access_log_at_debug(tmp_path: Path) -> None:
    with structlog.testing.capture_logs() as logs:
        async with served(FakeOperations(), tmp_path) as socket:
            await ask(socket, "GET", "/api/v2/nothing?secret=1")
    [entry] = [entry for entry in logs if entry["event"] == "request"]
    assert entry.pop("duration_ms") >= 0
    assert entry == {
        "event": "request",
        "log_level": "debug",
        "method": "GET",
        "path": "/api/v2/nothing",
        "status": 404,
    }


@pytest.mark.parametrize(
    ("target", "body", "item"),
    [
        ("/api/v2/images", b"", "request"),
        ("/api/v2/images", b"[]", "request"),
        ("/api/v2/images", b'{"images":[{}]}', "request.images[0]"),
        ("/api/v2/images", b'{"images":[],"more":1}', "request"),
        ("/api/v2/images", b'{"images":[],"images":[]}', "request"),
        ("/api/v2/images", b'{"images":[{"manifest":"=","signature":"","certificate":""}]}', ""),
        ("/api/v2/containers", b'{"image_id":1}', "request.image_id"),
        ("/api/v2/containers", b'{"image_id":"x","environment":"A"}', "request.environment"),
        ("/api/v2/containers", b'{"image_id":"x"}\xff', "request"),
        ("/api/v2/containers/7/signal", b'{"signal":1.5}', "request"),
        ("/api/v2/containers/7/signal", b'{"signal":true}', "request.signal"),
        ("/api/v2/containers/07/signal", b'{"signal":1}', "container id"),
        ("/api/v2/containers/0/signal", b'{"signal":1}', "container id"),
        (f"{LAYER}/fetch", b'{"source":{"type":"file"}}', "request.source"),
        (f"{LAYER}/fetch", b'{"source":{"type":"oci","directory":"/"}}', "request.source"),
        (f"{LAYER}/fetch", b'{"file":"/x","media_type":"tar","size_bytes":1}', "request"),
        ("/api/v2/evidence", b'{"nonce":"00"}', "request.nonce"),
        ("/api/v2/evidence", b'{"nonce":"%s"}' % (b"0F" * 16), "request.nonce"),
        ("/api/v2/evidence", b'{"nonce":"%s"}' % (b"00" * 65), "request.nonce"),
        ("/api/v2/evidence", b'{"nonce":"%s "}' % (b"00" * 16), "request.nonce"),
        (
            "/api/v2/evidence",
            b'{"nonce":"%s","public_key_sha384":"%s"}' % (b"00" * 16, b"00" * 48),
            "request",
        ),
        ("/api/v2/evidence", b'{"nonce":"%s","user_data":""}' % (b"00" * 16), "request"),
    ],
)
async def test_a_wrong_body_is_refused_with_the_path_of_the_field(
    tmp_path: Path, target: str, body: bytes, item: str
) -> None:
    operations = FakeOperations()
    async with served(operations, tmp_path) as socket:
        answer = await ask(socket, "POST", target, body=body)
    assert (answer.status, answer.kind) == (400, "format")
    error = msgspec.json.decode(answer.body)["error"]
    assert error["item"].startswith(item)
    assert not operations.groups
    assert not operations.starts
    assert not operations.signals
    assert not operations.nonces


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("GET", "/"),
        ("GET", "/api/v2"),
        ("GET", "/api/v2/images/"),
        ("DELETE", "/api/v2/images"),
        ("GET", "/api/v2/seal"),
        ("POST", "/evidence"),
        ("GET", "/self"),
        ("GET", "/api/v2/../v2/images"),
    ],
)
async def test_an_unknown_call_is_named(tmp_path: Path, method: str, target: str) -> None:
    async with served(FakeOperations(), tmp_path) as socket:
        answer = await ask(socket, method, target)
    assert (answer.status, answer.kind) == (404, "unknown")
    assert target in msgspec.json.decode(answer.body)["error"]["item"]


@pytest.mark.parametrize("hex_digits", ["00", "0" * 95 + "G", "A" * 96, "0" * 97])
async def test_a_layer_that_no_digest_names_is_refused(tmp_path: Path, hex_digits: str) -> None:
    async with served(FakeOperations(), tmp_path) as socket:
        answer = await ask(socket, "GET", f"/api/v2/layers/sha384/{hex_digits}")
        unknown = await ask(socket, "GET", f"/api/v2/layers/md5/{hex_digits}")
    assert (answer.status, answer.kind) == (400, "format")
    assert (unknown.status, unknown.kind) == (400, "format")


async def test_the_socket_is_roots_alone_and_vanishes_with_the_server(tmp_path: Path) -> None:
    async with served(FakeOperations(), tmp_path) as socket:
        mode = stat.S_IMODE(socket.stat().st_mode)
        left = os.listdir(tmp_path)
    assert mode == 0o600
    assert left == ["api.sock"]
    assert not socket.exists()
    async with served(FakeOperations(), tmp_path, socket_mode="0660") as socket:
        assert stat.S_IMODE(socket.stat().st_mode) == 0o660


async def test_a_dead_daemons_socket_is_replaced_but_a_living_ones_is_not(tmp_path: Path) -> None:
    dead = trio.socket.socket(trio.socket.AF_UNIX)
    await dead.bind(str(tmp_path / "api.sock"))
    dead.close()
    async with served(FakeOperations(), tmp_path) as socket:
        assert (await ask(socket, "GET", "/api/v2/images")).status == 200
        with pytest.RaisesGroup(ConfigError, flatten_subgroups=True) as caught:
            async with served(FakeOperations(), tmp_path):
                raise RuntimeError("served beside another")
        [error] = caught.value.exceptions
        assert isinstance(error, ConfigError)
        assert error.item == "plugin.http_api.socket"
        assert (await ask(socket, "GET", "/api/v2/images")).status == 200


async def test_a_file_in_the_sockets_place_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "api.sock").write_text("precious")
    with pytest.RaisesGroup(ConfigError, flatten_subgroups=True):
        async with served(FakeOperations(), tmp_path):
            raise RuntimeError("served over a file")
    assert (tmp_path / "api.sock").read_text() == "precious"
