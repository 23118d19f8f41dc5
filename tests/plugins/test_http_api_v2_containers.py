"""Our management API: containers shown, steered, restarted and called into."""

from __future__ import annotations

import base64
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing
from http_fakes import (
    IMAGE_ID,
    START_DIGEST,
    Answer,
    FakeOperations,
    ask,
    ask_json,
    raw_client,
    refusal_named,
    served,
)

from supervisor import DeadlineExceeded, ExitStatus, Invocation, InvocationResult

CONTAINER = "/api/v2/containers/1"
FORM_TYPE = "Content-Type: multipart/form-data; boundary=B"
FORM = b'--B\r\nContent-Disposition: form-data; name="cmd"\r\n\r\nReport\r\n--B--\r\n'
RUNNING = {
    "container_id": 1,
    "image_id": IMAGE_ID,
    "state": "running",
    "since": "2026-01-02T03:04:05Z",
    "restarts": 2,
    "restartable": True,
    "pid": 77,
    "exit_code": None,
    "signal": None,
    "out_of_memory": False,
    "argv": ["/app", "one"],
    "environment": ["A=1"],
    "signals": [15],
    "log_fds": [1, 2],
    "layers": [f"sha384/{'d' * 96}"],
    "start_event_digest_sha384": START_DIGEST,
    "memory_bytes": None,
}


async def test_containers_are_shown_and_their_memory_only_if_asked_for(tmp_path: Path) -> None:
    operations = FakeOperations()
    async with served(operations, tmp_path) as socket:
        plain = await ask(socket, "GET", "/api/v2/containers")
        zero = await ask(socket, "GET", "/api/v2/containers?memory=0")
        one = await ask(socket, "GET", CONTAINER)
        asked_before = operations.memory_asked
        all_with = await ask(socket, "GET", "/api/v2/containers?memory=1")
        one_with = await ask(socket, "GET", f"{CONTAINER}?memory=1")
        ended = await ask(socket, "GET", "/api/v2/containers/2?memory=1")
    running, exited, killed = msgspec.json.decode(plain.body)["containers"]
    assert running == one.json == RUNNING
    assert (exited["state"], exited["exit_code"], exited["memory_bytes"]) == ("exited", 3, None)
    assert (killed["signal"], killed["exit_code"]) == (9, None)
    assert zero.body == plain.body
    assert asked_before == 0
    assert operations.memory_asked == 3
    shown = msgspec.json.decode(all_with.body)["containers"]
    assert [view["memory_bytes"] for view in shown] == [4096, None, None]
    assert one_with.json == RUNNING | {"memory_bytes": 4096}
    assert msgspec.json.decode(ended.body)["memory_bytes"] is None


@pytest.mark.parametrize(
    ("target", "status", "item"),
    [
        ("/api/v2/containers/9", 404, "container 9"),
        ("/api/v2/containers/0", 400, "container id"),
        ("/api/v2/containers/01", 400, "container id"),
        ("/api/v2/containers/4294967296", 400, "container id"),
        ("/api/v2/containers/1?memory=2", 400, "memory"),
        ("/api/v2/containers?memory=yes", 400, "memory"),
        ("/api/v2/containers?memory=1&memory=1", 400, "query"),
        ("/api/v2/containers?mem=1", 400, "query"),
    ],
)
async def test_a_wrong_question_is_refused_by_name(
    tmp_path: Path, target: str, status: int, item: str
) -> None:
    operations = FakeOperations()
    async with served(operations, tmp_path) as socket:
        answer = await ask(socket, "GET", target)
    assert answer.status == status
    assert msgspec.json.decode(answer.body)["error"]["item"] == item
    assert operations.memory_asked == 0


async def test_start_and_signal_reach_the_supervisor(tmp_path: Path) -> None:
    operations = FakeOperations()
    start = {"image_id": IMAGE_ID, "environment": ["A=1", "B="]}
    async with served(operations, tmp_path) as socket:
        started = await ask_json(socket, "POST", "/api/v2/containers", start)
        bare = await ask_json(socket, "POST", "/api/v2/containers", {"image_id": IMAGE_ID})
        signal = await ask_json(socket, "POST", "/api/v2/containers/7/signal", {"signal": -15})
    assert (started.json, bare.json) == ({"container_id": 1}, {"container_id": 2})
    assert operations.starts == [(IMAGE_ID, ("A=1", "B=")), (IMAGE_ID, ())]
    assert (signal.json, operations.signals) == ({}, [(7, -15)])


async def test_a_restart_answers_with_the_container_as_it_is_then(tmp_path: Path) -> None:
    operations = FakeOperations()
    async with served(operations, tmp_path) as socket:
        default = await ask_json(socket, "POST", f"{CONTAINER}/restart", {})
        own = await ask_json(socket, "POST", f"{CONTAINER}/restart", {"timeout_s": 3600})
        operations.refusal = refusal_named(DeadlineExceeded)
        late = await ask_json(socket, "POST", f"{CONTAINER}/restart", {"timeout_s": 1})
    assert operations.restarts == [(1, 30), (1, 3600)]
    assert default.json == own.json == RUNNING
    assert (late.status, late.kind) == (408, "deadline")


async def test_a_call_reaches_the_entry_point_and_brings_back_what_it_wrote(
    tmp_path: Path,
) -> None:
    operations = FakeOperations()
    call = {
        "entry_point": "Report",
        "arguments": ["", "two words", "ä"],
        "environment": ["A=", "B=x=y"],
        "stdin": base64.b64encode(b"\x00\xff").decode(),
        "timeout_s": 7,
        "capture_bytes": 0,
    }
    async with served(operations, tmp_path) as socket:
        answer = await ask_json(socket, "POST", f"{CONTAINER}/invoke", call)
        operations.result = InvocationResult(
            status=ExitStatus(signal=9),
            stdout=b"",
            stderr=b"e" * 100_000,
            stdout_cut=False,
            stderr_cut=True,
        )
        killed = await ask_json(socket, "POST", f"{CONTAINER}/invoke", {"entry_point": "Bare"})
    assert operations.invocations == [
        (
            1,
            Invocation(
                entry_point="Report",
                arguments=("", "two words", "ä"),
                environment=("A=", "B=x=y"),
                stdin=b"\x00\xff",
                timeout_s=7,
                capture_bytes=0,
            ),
        ),
        (1, Invocation(entry_point="Bare", timeout_s=30, capture_bytes=65_536)),
    ]
    assert answer.json == {
        "exit_code": 3,
        "signal": None,
        "stdout": base64.b64encode(b"out\xff").decode(),
        "stderr": "",
        "stdout_cut": True,
        "stderr_cut": False,
    }
    shown = msgspec.json.decode(killed.body)
    assert (shown["exit_code"], shown["signal"], shown["stderr_cut"]) == (None, 9, True)
    assert base64.b64decode(shown["stderr"]) == b"e" * 100_000


@pytest.mark.parametrize(
    ("wrong", "item"),
    [
        ({"timeout_s": 0}, "timeout"),
        ({"timeout_s": 3601}, "timeout"),
        ({"timeout_s": 1.5}, "request"),
        ({"timeout_s": True}, "request.timeout_s"),
        ({"capture_bytes": -1}, "capture size"),
        ({"capture_bytes": (1 << 20) + 1}, "capture size"),
        ({"arguments": ["a"] * 1025}, "arguments"),
        ({"arguments": ["a\0b"]}, "arguments"),
        ({"arguments": ["a" * (128 * 1024)]}, "arguments"),
        ({"arguments": ["ä" * (64 * 1024)]}, "arguments"),
        ({"arguments": ["a" * 65_535] * 17}, "arguments and environment"),
        ({"arguments": "a"}, "request.arguments"),
        ({"environment": ["A=1"] * 1025}, "environment"),
        ({"environment": ["A=\0"]}, "environment"),
        ({"environment": ["A"]}, "environment"),
        ({"environment": ["=A"]}, "environment"),
        ({"environment": [""]}, "environment"),
        ({"stdin": "not base64"}, "request.stdin"),
        ({"stdin": None}, "request.stdin"),
        ({"entry_point": 1}, "request.entry_point"),
        ({"more": 1}, "request"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_a_call_beyond_its_bounds_is_refused_before_anything_runs(
    tmp_path: Path, wrong: dict[str, object], item: str
) -> None:
    operations = FakeOperations()
    async with served(operations, tmp_path) as socket:
        answer = await ask_json(
            socket, "POST", f"{CONTAINER}/invoke", {"entry_point": "Report"} | wrong
        )
    assert (answer.status, answer.kind) == (400, "format")
    assert msgspec.json.decode(answer.body)["error"]["item"].startswith(item)
    assert not operations.invocations


async def test_the_largest_call_within_its_bounds_is_made(tmp_path: Path) -> None:
    operations = FakeOperations()
    call = {
        "entry_point": "Report",
        "arguments": ["a" * (128 * 1024 - 1)] * 7 + [""] * 1017,
        "timeout_s": 3600,
        "capture_bytes": 1 << 20,
        "stdin": base64.b64encode(bytes(2 << 20)).decode(),
    }
    async with served(operations, tmp_path) as socket:
        answer = await ask_json(socket, "POST", f"{CONTAINER}/invoke", call)
    assert answer.status == 200
    [(_, made)] = operations.invocations
    assert (len(made.arguments), len(made.stdin)) == (1024, 2 << 20)


@pytest.mark.parametrize("timeout_s", [-1, 0, 3601, "30"])
async def test_a_restart_with_a_wrong_time_is_refused(tmp_path: Path, timeout_s: object) -> None:
    operations = FakeOperations()
    async with served(operations, tmp_path) as socket:
        answer = await ask_json(socket, "POST", f"{CONTAINER}/restart", {"timeout_s": timeout_s})
    assert (answer.status, answer.kind) == (400, "format")
    assert not operations.restarts


async def test_a_command_is_ended_when_its_client_vanishes(tmp_path: Path) -> None:
    operations = FakeOperations()
    operations.invoke_hold = trio.Event()
    body = b'{"entry_point":"Report","timeout_s":3600}'
    head = b"POST /api/v2/containers/1/invoke HTTP/1.1\r\nHost: td\r\nContent-Length: %d\r\n\r\n"
    async with served(operations, tmp_path) as socket:
        async with raw_client(socket) as client:
            await client.send(head % len(body) + body)
            await operations.wait_for_invocations(1)
        await operations.wait_for_invocations(0)
    assert len(operations.invocations) == 1


async def test_a_command_has_its_own_time_beside_that_of_requests(tmp_path: Path) -> None:
    operations = FakeOperations()
    operations.invoke_hold = trio.Event()

    async def release(seconds: float) -> None:
        await operations.wait_for_invocations(1)
        await trio.sleep(seconds)
        assert operations.invoke_hold is not None
        operations.invoke_hold.set()

    async with (
        served(operations, tmp_path, request_deadline_s=0.2) as socket,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(release, 0.6)
        call = {"entry_point": "Report", "timeout_s": 1}
        slow = await ask_json(socket, "POST", f"{CONTAINER}/invoke", call)
        operations.invoke_hold = trio.Event()
        never = await ask_json(socket, "POST", f"{CONTAINER}/invoke", call)
    assert slow.status == 200
    assert (never.status, never.kind) == (408, "deadline")
    assert operations.invoking == 0


@pytest.mark.parametrize(
    ("target", "body"),
    [
        (f"{CONTAINER}/restart", {"timeout_s": 5}),
        (f"{CONTAINER}/invoke", {"entry_point": "Report", "timeout_s": 5}),
        ("/api/v1/container/1/restart?timeout=5", None),
        ("/api/v1/container/1/exec?timeout=5", FORM),
    ],
)
async def test_what_waits_for_a_container_has_that_time_besides(
    tmp_path: Path, target: str, body: object
) -> None:
    class Slow(FakeOperations):
        async def restart(self, container_id: int, *, timeout_s: float) -> None:
            await trio.sleep(0.4)

        async def invoke(self, container_id: int, invocation: Invocation) -> InvocationResult:
            await trio.sleep(0.4)
            return await super().invoke(container_id, invocation)

    async with served(Slow(), tmp_path, request_deadline_s=0.1) as socket:
        if body is FORM:
            answer = await ask(socket, "POST", target, FORM_TYPE, body=FORM)
        else:
            answer = await ask_json(socket, "POST", target, body)
    assert answer.status == 200


@pytest.mark.parametrize("version", ["v1", "v2"])
async def test_what_commands_may_write_is_taken_from_the_memory_for_requests(
    tmp_path: Path, version: str
) -> None:
    operations = FakeOperations()
    operations.invoke_hold = trio.Event()
    call = {"entry_point": "Report", "capture_bytes": 40_000}
    statuses: list[int] = []

    async def invoke(socket: Path) -> Answer:
        if version == "v2":
            answer = await ask_json(socket, "POST", f"{CONTAINER}/invoke", call)
        else:
            target = "/api/v1/container/1/exec?capture_size=40000"
            answer = await ask(socket, "POST", target, FORM_TYPE, body=FORM)
        statuses.append(answer.status)
        return answer

    async with (
        served(operations, tmp_path, max_buffered_bytes=100_000) as socket,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(invoke, socket)
        await operations.wait_for_invocations(1)
        refused = await invoke(socket)
        operations.invoke_hold.set()
        await operations.wait_for_invocations(0)
        await trio.testing.wait_all_tasks_blocked(0.05)
        await invoke(socket)
    assert statuses == [503, 200, 200]
    assert b"the memory for them is bounded" in refused.body
