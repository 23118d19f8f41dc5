"""ACON's API, with what its real client sends."""

from __future__ import annotations

from pathlib import Path

import pytest
from http_fakes import (
    IMAGE_ID,
    Answer,
    FakeOperations,
    ask,
    raw_client,
    refusal_named,
    served,
)

from supervisor import (
    Busy,
    Conflict,
    DeadlineExceeded,
    Denied,
    FormatError,
    Invocation,
    MeasurementHalted,
    PolicyDenied,
    Refusal,
    RuntimeFailed,
    SignatureInvalid,
    UnknownItem,
)
from supervisor.formats.digest import digest_of


def recorded(vectors: Path, name: str) -> bytes:
    return (vectors / "acon" / "aconcli_wire" / f"{name}.http").read_bytes()


async def replay(socket: Path, request: bytes) -> Answer:
    method = request.split(b" ", 1)[0].decode()
    async with raw_client(socket) as client:
        await client.send(request)
        return await client.answer(method)


def chunked(body: bytes, size: int = 32 * 1024) -> bytes:
    pieces = (body[at : at + size] for at in range(0, len(body), size))
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


@pytest.mark.parametrize(
    ("request_name", "manifest_folder"),
    [
        ("run-01-post-manifest", "ac3152d6"),
        ("run-all-01-post-manifest-vendor", "ac3152d6"),
        ("run-all-04-post-manifest-app", "b1c8b25c"),
    ],
)
async def test_a_recorded_manifest_arrives_with_the_bytes_that_were_signed(
    vectors: Path, tmp_path: Path, request_name: str, manifest_folder: str
) -> None:
    operations = FakeOperations()
    async with served(operations, tmp_path) as socket:
        answer = await replay(socket, recorded(vectors, request_name))
    assert answer.status == 200
    [[image]] = operations.groups
    digest = digest_of("sha384", image.manifest).hex
    assert digest.startswith(manifest_folder)
    assert answer.json == {"image_id": f"sha384/{'a' * 96}/{digest}", "missing_layers": ["x"]}
    repository = vectors / "acon" / "aconcli_repo" / "manifests" / "sha384" / digest
    assert image.signature == (repository / "signature").read_bytes()
    assert image.certificate_der == (repository / "signer.cer").read_bytes()


@pytest.mark.parametrize(
    "request_name", ["run-02-put-blob", "run-all-02-put-blob", "run-all-05-put-blob"]
)
async def test_a_recorded_blob_upload_becomes_a_verified_layer(
    vectors: Path, tmp_path: Path, request_name: str
) -> None:
    head = recorded(vectors, request_name)
    name = head.split(b"/api/v1/blob/")[1].split(b"?")[0].decode()
    tar = (vectors / "acon" / "aconcli_repo" / "blobs" / "sha384" / name).read_bytes()
    operations = FakeOperations()
    async with served(operations, tmp_path) as socket:
        answer = await replay(socket, head + chunked(tar))
        assert (answer.status, answer.body) == (200, b"")
        size = await ask(socket, "GET", f"/api/v1/blob/{name}?alg=2")
    assert operations.layers == {digest_of("sha384", tar): tar}
    assert size.json == len(tar)


async def test_recorded_finalize_start_and_report_requests_are_understood(
    vectors: Path, tmp_path: Path
) -> None:
    operations = FakeOperations()
    async with served(operations, tmp_path) as socket:
        finalized = await replay(socket, recorded(vectors, "run-03-post-finalize"))
        one = await replay(socket, recorded(vectors, "run-04-post-start"))
        two = await replay(socket, recorded(vectors, "run-all-06-post-start-app"))
        report = await replay(socket, recorded(vectors, "report"))
        quote = await replay(socket, recorded(vectors, "report-quote"))
    assert (finalized.status, finalized.body, operations.sealed) == (200, b"", True)
    assert (one.json, two.json) == ({"container_id": 1}, {"container_id": 2})
    assert [environment for _, environment in operations.starts] == [("A=1",), ("A=1", "B=x")]
    vendor, app = (image_id.split("/") for image_id, _ in operations.starts)
    assert [text[:8] for text in vendor] == ["sha384", "e8304c38", "ac3152d6"]
    assert [text[:8] for text in app] == ["sha384", "3ffc836f", "b1c8b25c"]
    # nonce_lo=11, nonce_hi=22: one little-endian u128.
    assert operations.nonces == [(22 << 64 | 11).to_bytes(16, "little")] * 2
    no_logs: dict[str, list[str]] = {"logs": []}
    logs = {"0": no_logs, "1": no_logs, "2": no_logs, "3": {"logs": ["line one", "line two"]}}
    assert report.json == {
        "data": [2],
        "mrlog": logs,
        "attestation_data": "{}",
        "attestationData": "{}",
    }
    assert isinstance(quote.json, dict)
    assert quote.json["data"] == [1, 255]


@pytest.mark.parametrize(("request_name", "signum"), [("kill-10", 10), ("kill-minus-15", -15)])
async def test_a_recorded_kill_without_content_type_is_understood(
    vectors: Path, tmp_path: Path, request_name: str, signum: int
) -> None:
    operations = FakeOperations()
    async with served(operations, tmp_path) as socket:
        answer = await replay(socket, recorded(vectors, request_name))
    assert (answer.status, answer.body) == (200, b"")
    assert operations.signals == [(2, signum)]


async def test_a_recorded_restart_is_understood(vectors: Path, tmp_path: Path) -> None:
    operations = FakeOperations()
    async with served(operations, tmp_path) as socket:
        answer = await replay(socket, recorded(vectors, "restart"))
        default = await ask(socket, "POST", "/api/v1/container/1/restart", body=b"")
    assert (answer.status, answer.body) == (200, b"")
    assert default.status == 200
    assert operations.restarts == [(2, 7), (1, 30)]


async def test_a_recorded_call_brings_back_its_outputs_as_numbers(
    vectors: Path, tmp_path: Path
) -> None:
    operations = FakeOperations()
    async with served(operations, tmp_path) as socket:
        answer = await replay(socket, recorded(vectors, "invoke-post-exec"))
    assert answer.json == {"stdout": list(b"out\xff"), "stderr": []}
    assert operations.invocations == [
        (
            2,
            Invocation(
                entry_point="Hello",
                arguments=("bob", "two words"),
                stdin=b"stdin data\n",
                timeout_s=5,
                capture_bytes=1000,
            ),
        )
    ]


async def test_a_call_has_the_defaults_of_acon_and_passes_on_its_environment(
    tmp_path: Path,
) -> None:
    operations = FakeOperations()
    header = "Content-Type: multipart/form-data; boundary=B"
    body = part("cmd", b"Hello\n") + part("env", b"A=1\nB=\n") + b"--B--\r\n"
    async with served(operations, tmp_path) as socket:
        answer = await ask(socket, "POST", "/api/v1/container/1/exec", header, body=body)
    assert answer.status == 200
    assert operations.invocations == [
        (
            1,
            Invocation(
                entry_point="Hello",
                environment=("A=1", "B="),
                timeout_s=30,
                capture_bytes=0x20000,
            ),
        )
    ]


@pytest.mark.parametrize(
    ("query", "form", "words"),
    [
        ("?timeout=0", b"", b"timeout"),
        ("?timeout=3601", b"", b"timeout"),
        ("?timeout=", b"", b"timeout"),
        ("?capture_size=1048577", b"", b"capture_size"),
        ("?capture_size=1e3", b"", b"capture_size"),
        ("", b"", b"cmd"),
        ("", b"cmd=\n\n", b"cmd"),
        ("", b"cmd=\xff", b"cmd"),
        ("", b"cmd=Hello\nA\0B", b"arguments"),
        ("", b"cmd=Hello env=A", b"environment"),
        ("", b"cmd=Hello more=A", b"more"),
    ],
)
async def test_a_wrong_call_is_refused_before_anything_runs(
    tmp_path: Path, query: str, form: bytes, words: bytes
) -> None:
    operations = FakeOperations()
    fields = [field.split(b"=", 1) for field in (form or b"cmd=Hello").split(b" ")]
    if not query and not form:
        fields = []
    body = b"".join(part(name.decode(), value) for name, value in fields) + b"--B--\r\n"
    header = "Content-Type: multipart/form-data; boundary=B"
    async with served(operations, tmp_path) as socket:
        target = f"/api/v1/container/1/exec{query}"
        answer = await ask(socket, "POST", target, header, body=body)
    assert answer.status == 400
    assert answer.headers["content-type"].startswith("text/plain")
    assert words in answer.body
    assert not operations.invocations


@pytest.mark.parametrize("call", ["restart", "exec"])
async def test_a_deadline_that_passed_is_told_with_acons_status(
    vectors: Path, tmp_path: Path, call: str
) -> None:
    operations = FakeOperations()
    operations.refusal = refusal_named(DeadlineExceeded)
    request = {"restart": "restart", "exec": "invoke-post-exec"}[call]
    async with served(operations, tmp_path) as socket:
        answer = await replay(socket, recorded(vectors, request))
    assert (answer.status, answer.body) == (
        408,
        b"the item: the rule; expected this, got that\n",
    )


async def test_an_openid_call_is_no_call_and_says_so(tmp_path: Path) -> None:
    async with served(FakeOperations(), tmp_path) as socket:
        answer = await ask(socket, "POST", "/api/v1/oauth2/login", body=b"")
    assert answer.status == 404
    assert answer.headers["content-type"].startswith("text/plain")
    assert b"is no call of this API" in answer.body


async def test_inspect_shows_containers_as_acon_encodes_them(tmp_path: Path) -> None:
    async with served(FakeOperations(), tmp_path) as socket:
        everyone = await ask(socket, "GET", "/api/v1/container/inspect")
        zero = await ask(socket, "GET", "/api/v1/container/0/inspect")
        killed = await ask(socket, "GET", "/api/v1/container/3/inspect")
        unknown = await ask(socket, "GET", "/api/v1/container/9/inspect")
    assert zero.json == everyone.json
    common = {"image_id": IMAGE_ID, "exe_path": "/app"}
    assert everyone.json == {
        "info": [
            {"container_id": 1, "state": ord("R"), "wstatus": 0, **common},
            {"container_id": 2, "state": 0, "wstatus": 3 << 8, **common},
            {"container_id": 3, "state": 0, "wstatus": 9, **common},
        ]
    }
    assert killed.json == {"info": [{"container_id": 3, "state": 0, "wstatus": 9, **common}]}
    assert unknown.status == 400


async def test_a_manifest_comes_back_as_text_with_its_certificate_as_numbers(
    tmp_path: Path,
) -> None:
    async with served(FakeOperations(), tmp_path) as socket:
        answer = await ask(socket, "GET", f"/api/v1/manifest/{IMAGE_ID}")
        unknown = await ask(socket, "GET", "/api/v1/manifest/sha384/a/b")
    assert answer.json == {"manifest": '{"ä":1}', "certificate": [0x30, 0xFF]}
    assert unknown.status == 400


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (FormatError, 400),
        (SignatureInvalid, 400),
        (UnknownItem, 400),
        (PolicyDenied, 401),
        (Denied, 401),
        (Conflict, 401),
        (DeadlineExceeded, 408),
        (MeasurementHalted, 500),
        (RuntimeFailed, 500),
        (Busy, 503),
    ],
)
async def test_errors_are_plain_text_with_acons_status(
    tmp_path: Path, kind: type[Refusal], status: int
) -> None:
    operations = FakeOperations()
    operations.refusal = refusal_named(kind)
    async with served(operations, tmp_path) as socket:
        answer = await ask(socket, "POST", "/api/v1/manifest/finalize", body=b"")
    assert answer.status == status
    assert answer.headers["content-type"].startswith("text/plain")
    assert answer.body == b"the item: the rule; expected this, got that\n"


@pytest.mark.parametrize(
    ("method", "target", "headers", "body", "words"),
    [
        ("PUT", "/api/v1/blob/00.tar?alg=3", (), b"x", b"alg"),
        ("PUT", "/api/v1/blob/00.tar", (), b"x", b"blob"),
        ("PUT", "/api/v1/blob/..%2f..%2fetc", (), b"x", b"404"),
        ("POST", "/api/v1/container/2/kill", (), b"signal_num=1+1", b"signal_num"),
        ("POST", "/api/v1/container/2/kill", (), b"signal_num=9&signal_num=1", b"once"),
        ("POST", "/api/v1/container/2/kill", (), b"", b"signal_num"),
        ("POST", "/api/v1/container/2/kill", (), b"\xff=1", b"urlencoded"),
        ("POST", "/api/v1/container/-2/kill", (), b"signal_num=9", b"container id"),
        ("POST", "/api/v1/container/0/restart", (), b"", b"container id"),
        ("POST", "/api/v1/container/2/restart?timeout=-1", (), b"", b"timeout"),
        ("POST", "/api/v1/container/2/restart?timeout=3601", (), b"", b"timeout"),
        ("POST", "/api/v1/container/2/restart?timeout=x", (), b"", b"timeout"),
        ("POST", "/api/v1/container/start", (), None, b"image_id"),
        ("GET", "/api/v1/container/report?nonce_hi=1", (), None, b"nonce_lo"),
        (
            "GET",
            "/api/v1/container/report?nonce_hi=1&nonce_lo=18446744073709551616",
            (),
            None,
            b"nonce_lo",
        ),
        (
            "GET",
            "/api/v1/container/report?nonce_hi=1&nonce_lo=1&request_type=2",
            (),
            None,
            b"request_type",
        ),
    ],
)
async def test_wrong_requests_are_refused_by_name(
    tmp_path: Path,
    method: str,
    target: str,
    headers: tuple[str, ...],
    body: bytes | None,
    words: bytes,
) -> None:
    operations = FakeOperations()
    async with served(operations, tmp_path) as socket:
        answer = await ask(socket, method, target, *headers, body=body)
    if words == b"404":
        assert answer.status == 404
    else:
        assert answer.status == 400
        assert words in answer.body
    assert not operations.signals
    assert not operations.starts
    assert not operations.nonces


def part(name: str, value: bytes) -> bytes:
    return b'--B\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (
        name.encode(),
        value,
    )


WHOLE = part("manifest", b"m") + part("sig", b"s") + part("cert", b"c")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--B--\r\n",
        WHOLE,  # the closing boundary is missing
        WHOLE[:-20],
        WHOLE.replace(b'name="sig"', b'name="manifest"') + b"--B--\r\n",
        WHOLE.replace(b'; name="sig"', b"") + b"--B--\r\n",
        WHOLE + part("more", b"") + b"--B--\r\n",
        part("manifest", b"m") + part("sig", b"s") + b"--B--\r\n",
        b"".join(part(f"f{index}", b"") for index in range(9)) + b"--B--\r\n",
        b"junk before any boundary" + WHOLE + b"--B--\r\n",
    ],
)
async def test_malformed_multipart_admits_nothing(tmp_path: Path, body: bytes) -> None:
    operations = FakeOperations()
    header = "Content-Type: multipart/form-data; boundary=B"
    async with served(operations, tmp_path) as socket:
        answer = await ask(socket, "POST", "/api/v1/manifest", header, body=body)
        untyped = await ask(socket, "POST", "/api/v1/manifest", body=WHOLE + b"--B--\r\n")
        good = await ask(socket, "POST", "/api/v1/manifest", header, body=WHOLE + b"--B--\r\n")
    assert answer.status == 400
    assert untyped.status == 400
    assert good.status == 200
    [[image]] = operations.groups
    assert (image.manifest, image.signature, image.certificate_der) == (b"m", b"s", b"c")


async def test_an_environment_that_is_not_utf8_starts_nothing(tmp_path: Path) -> None:
    operations = FakeOperations()
    header = "Content-Type: multipart/form-data; boundary=B"
    target = "/api/v1/container/start?image_id=x"
    async with served(operations, tmp_path) as socket:
        bad = await ask(socket, "POST", target, header, body=part("env", b"A=\xff") + b"--B--\r\n")
        none = await ask(socket, "POST", target, body=b"")
    assert bad.status == 400
    assert none.json == {"container_id": 1}
    assert operations.starts == [("x", ())]
