"""ACON's binary protocol on the container's socket, beside HTTP."""

from __future__ import annotations

import errno
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import trio
import trio.testing
from http_fakes import FakeContainer, ask, container_served, plugin, raw_client
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plugins.http_api import acon_protocol
from plugins.http_api.acon_protocol import (
    MAX_REQUEST_BYTES,
    GetReport,
    ProtocolError,
    SetAttestationData,
    error_answer,
    parse_request,
    parse_size,
    report_answer,
)
from plugins.http_api.settings import Settings
from supervisor import (
    AconReport,
    Busy,
    Conflict,
    DeadlineExceeded,
    Denied,
    FormatError,
    MeasurementHalted,
    Refusal,
    RuntimeFailed,
    UnknownItem,
)
from supervisor.formats.base64_text import to_base64
from supervisor.formats.status import AttestationData

C_CLIENT = Path(__file__).with_name("acon_client.c")
HIGH, LOW = 0x1111111111111111, 0x2222222222222222
NONCE = b"\x22" * 8 + b"\x11" * 8


def report_request(kind: int = 0, said: bytes = b"", *, want: int = 0, size: int = -1) -> bytes:
    size = 40 + len(said) if size < 0 else size
    # The compiler's padding holds anything.
    return struct.pack("<iII4sQQi4s", 0, size, want, b"\xaapad", HIGH, LOW, kind, b"\xbbpad") + said


def set_request(kind: int, said: bytes = b"", *, size: int = -1) -> bytes:
    return struct.pack("<iIi", 2, 12 + len(said) if size < 0 else size, kind) + said


async def converse(socket: Path, said: bytes, *, half_close: bool = False) -> bytes:
    """Everything that is answered, until the other side ends the connection."""
    with trio.fail_after(30):
        async with await trio.open_unix_socket(str(socket)) as stream:
            await stream.send_all(said)
            if half_close:
                await stream.send_eof()
            answer = bytearray()
            async for chunk in stream:
                answer += chunk
            return bytes(answer)


def error_of(answer: bytes) -> tuple[str, int, str]:
    """The errno's name, the request's command, the text."""
    number, size, command = struct.unpack_from("<iIi", answer)
    assert number < 0
    assert size == len(answer)
    return errno.errorcode[-number], command, answer[12:].decode()


# --- what is asked and answered ------------------------------------------------------------------


async def test_a_container_gets_acons_report_with_its_data_in_it(tmp_path: Path) -> None:
    container = FakeContainer()
    async with container_served(container, tmp_path) as socket:
        answer = await converse(socket, report_request(2, b"Hello", want=1))
        await converse(socket, report_request(1, b"\0\xff\0"))
        await converse(socket, report_request())
    command, size, log_at, text_at, data_at = struct.unpack_from("<iIiii", answer)
    assert (command, size) == (1, len(answer))
    assert answer[log_at:text_at] == b"\0\0\0line one\0line two\0"
    assert answer[text_at:data_at] == b'{"api_version":"1.0.0"}'
    assert answer[data_at:] == b"\x01\x00\xff"
    assert container.reports == [
        (NONCE, AttestationData(kind="text", data=to_base64(b"Hello")), True),
        (NONCE, AttestationData(kind="binary", data=to_base64(b"\0\xff\0")), False),
        (NONCE, None, False),
    ]


async def test_a_container_sets_and_forgets_its_attestation_data(tmp_path: Path) -> None:
    container = FakeContainer()
    async with container_served(container, tmp_path) as socket:
        answers = [
            await converse(socket, set_request(2, b"caf\xc3\xa9")),
            await converse(socket, set_request(1, b"\0\xff\0")),
            await converse(socket, set_request(2, b"C string\0\0")),
            await converse(socket, set_request(0)),
        ]
    assert answers == [struct.pack("<iI", 3, 8)] * 4
    assert container.said == [
        AttestationData(kind="text", data=to_base64(b"caf\xc3\xa9")),
        AttestationData(kind="binary", data=to_base64(b"\0\xff\0")),
        AttestationData(kind="text", data=to_base64(b"C string")),
        None,
    ]


async def test_a_client_that_ends_its_side_or_speaks_slowly_is_answered(tmp_path: Path) -> None:
    container = FakeContainer()
    async with container_served(container, tmp_path) as socket:
        ended = await converse(socket, set_request(2, b"x"), half_close=True)
        async with raw_client(socket) as client:
            for byte in set_request(2, b"y"):
                await client.send(bytes([byte]))
                await trio.testing.wait_all_tasks_blocked()
            slow = await client.stream.receive_some(64)
    assert ended == slow == struct.pack("<iI", 3, 8)
    assert len(container.said) == 2


@pytest.fixture(scope="module")
def c_client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler (cc)")
    program = tmp_path_factory.mktemp("c") / "acon_client"
    command = [compiler, "-std=c11", "-Wall", "-Werror", "-o", str(program), str(C_CLIENT)]
    subprocess.run(command, check=True, timeout=120)
    return program


async def test_a_program_in_c_is_understood(tmp_path: Path, c_client: Path) -> None:
    container = FakeContainer()

    async def run(*words: str) -> bytes:
        command = [str(c_client), str(socket), *words]
        with trio.fail_after(60):
            done = await trio.run_process(command, capture_stdout=True)
        return done.stdout

    async with container_served(container, tmp_path) as socket:
        quote = await run("quote", "2", "from C")
        report = await run("report", "0")
        said = await run("set", "1", "bytes")
        refused = await run("set", "7")
    assert quote == report == report_answer(container.report)
    assert said == struct.pack("<iI", 3, 8)
    assert error_of(refused)[:2] == ("EINVAL", 2)
    assert container.reports == [
        (NONCE, AttestationData(kind="text", data=to_base64(b"from C")), True),
        (NONCE, None, False),
    ]
    assert container.said == [AttestationData(kind="binary", data=to_base64(b"bytes"))]


def test_the_log_of_register_two_stands_behind_two_empty_lines() -> None:
    report = AconReport(data=b"d", attestation_data="t", rtmr_index=2, log_lines=("one",))
    answer = report_answer(report)
    assert answer == struct.pack("<iIiii", 1, 28, 20, 26, 27) + b"\0\0one\0td"


# --- what is refused -----------------------------------------------------------------------------

LONGEST = b"x" * 4096
WRONG = {
    "a size without the header": (struct.pack("<iI", 0, 7), "EINVAL", 0),
    "no size": (struct.pack("<iI", 2, 0), "EINVAL", 2),
    "a huge size": (struct.pack("<iI", 2, 0xFFFFFFFF), "EMSGSIZE", 2),
    "a size beyond the bound": (struct.pack("<iI", 2, MAX_REQUEST_BYTES + 1), "EMSGSIZE", 2),
    "a header alone as a report": (struct.pack("<iI", 0, 8), "EINVAL", 0),
    "a report cut in its structure": (report_request(size=39)[:39], "EINVAL", 0),
    "a setting cut in its structure": (set_request(2, size=11)[:11], "EINVAL", 2),
    "an unknown command": (struct.pack("<iI", 4, 8), "ENOSYS", 4),
    "an answer": (struct.pack("<iI", 1, 8), "ENOSYS", 1),
    "an error": (struct.pack("<iIi", -22, 12, 0), "ENOSYS", -22),
    "a third type of report": (report_request(want=2), "EINVAL", 0),
    "a third type of data": (report_request(3, b"x"), "EINVAL", 0),
    "a negative type of data": (set_request(-1, b"x"), "EINVAL", 2),
    "data of no type": (set_request(0, b"x"), "EINVAL", 2),
    "too much text": (set_request(2, LONGEST + b"x"), "EMSGSIZE", 2),
    "too much binary": (report_request(1, LONGEST + b"\0"), "EMSGSIZE", 0),
}


@pytest.mark.parametrize(("request_bytes", "name", "command"), WRONG.values(), ids=WRONG.keys())
async def test_a_wrong_request_is_answered_with_an_errno_and_does_nothing(
    tmp_path: Path, request_bytes: bytes, name: str, command: int
) -> None:
    container = FakeContainer()
    async with container_served(container, tmp_path) as socket:
        answer = await converse(socket, request_bytes)
    assert error_of(answer)[:2] == (name, command)
    assert error_of(answer)[2]
    assert container.said == []
    assert container.reports == []


async def test_the_longest_data_passes_padded_or_not(tmp_path: Path) -> None:
    container = FakeContainer()
    async with container_served(container, tmp_path) as socket:
        await converse(socket, set_request(1, LONGEST))
        await converse(socket, set_request(2, LONGEST.ljust(MAX_REQUEST_BYTES - 12, b"\0")))
    assert [data.data if data else "" for data in container.said] == [to_base64(LONGEST)] * 2


async def test_a_client_that_sends_far_too_much_gets_its_answer_all_the_same(
    tmp_path: Path,
) -> None:
    async with container_served(FakeContainer(), tmp_path) as socket:
        answer = await converse(socket, set_request(1, bytes(512 << 10)))
    assert error_of(answer)[:2] == ("EMSGSIZE", 2)


@pytest.mark.parametrize("kept", [0, 1, 4, 7, 8, 9, 39, 44])
async def test_a_request_that_ends_too_early_does_nothing(tmp_path: Path, kept: int) -> None:
    container = FakeContainer()
    async with container_served(container, tmp_path) as socket:
        answer = await converse(socket, report_request(2, b"Hello")[:kept], half_close=True)
        assert (await ask(socket, "GET", "/self")).status == 200
    assert container.reports == []
    assert answer == b"" if kept == 0 else error_of(answer)[0] == "EINVAL"


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (FormatError, "EINVAL"),
        (Denied, "EACCES"),
        (UnknownItem, "ENOENT"),
        (DeadlineExceeded, "ETIMEDOUT"),
        (Conflict, "ESRCH"),
        (Busy, "EBUSY"),
        (MeasurementHalted, "EIO"),
        (RuntimeFailed, "EIO"),
    ],
)
async def test_every_refusal_has_an_errno_and_its_sentence(
    tmp_path: Path, kind: type[Refusal], name: str
) -> None:
    container = FakeContainer()
    container.refusal = kind("the item", "the rule", expected="this")
    async with container_served(container, tmp_path) as socket:
        answers = [await converse(socket, set_request(2)), await converse(socket, report_request())]
    sentence = "the item: the rule; expected this"
    assert [error_of(answer) for answer in answers] == [(name, 2, sentence), (name, 0, sentence)]


async def test_a_fault_of_ours_is_answered_without_its_details(tmp_path: Path) -> None:
    container = FakeContainer()
    container.refusal = RuntimeError("a path of this machine")
    async with container_served(container, tmp_path) as socket:
        name, _, text = error_of(await converse(socket, report_request()))
    assert name == "EIO"
    assert "a path" not in text


async def test_a_report_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    container = FakeContainer()
    container.hold = trio.Event()
    async with container_served(container, tmp_path, request_deadline_s=0.2) as socket:
        assert error_of(await converse(socket, report_request()))[0] == "ETIMEDOUT"


async def test_a_request_that_stops_half_way_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acon_protocol, "_READ_DEADLINE_S", 0.2)
    async with container_served(FakeContainer(), tmp_path) as socket:
        answer = await converse(socket, report_request(2, b"Hello")[:20])
    assert error_of(answer)[0] == "ETIMEDOUT"


async def test_connections_are_bounded_as_for_http_and_together_with_it(tmp_path: Path) -> None:
    api = plugin(Settings(container_max_connections=2), tmp_path)
    busy, other = FakeContainer(1), FakeContainer(2)
    busy.hold = trio.Event()
    async with (
        container_served(busy, tmp_path, api) as socket,
        container_served(other, tmp_path, api) as others,
        raw_client(socket) as first,
        raw_client(socket),
    ):
        await first.send(report_request())
        await trio.testing.wait_all_tasks_blocked(0.05)
        binary = await converse(socket, report_request())
        http = await ask(socket, "GET", "/self")
        fine = await converse(others, report_request())
        busy.hold.set()
        assert await first.stream.receive_some(4) == struct.pack("<i", 1)
    assert error_of(binary)[:2] == ("EBUSY", 0)
    assert http.status == 503
    assert fine == report_answer(other.report)


def test_an_answer_that_its_numbers_cannot_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    report = FakeContainer().report
    monkeypatch.setattr(acon_protocol, "_MAX_ANSWER_BYTES", len(report_answer(report)))
    report_answer(report)
    monkeypatch.setattr(acon_protocol, "_MAX_ANSWER_BYTES", len(report_answer(report)) - 1)
    with pytest.raises(ProtocolError) as caught:
        report_answer(report)
    assert caught.value.number == errno.EOVERFLOW


def test_an_error_text_is_bounded() -> None:
    answer = error_answer(0, errno.EINVAL, "\u00e9" * 5000)
    assert struct.unpack_from("<iIi", answer) == (-errno.EINVAL, len(answer), 0)
    assert len(answer) == 12 + 1024


# --- garbage -------------------------------------------------------------------------------------


@given(st.binary(min_size=8, max_size=MAX_REQUEST_BYTES))
def test_no_bytes_make_the_parser_raise_anything_else(message: bytes) -> None:
    try:
        assert 8 <= parse_size(message[:8]) <= MAX_REQUEST_BYTES
        request = parse_request(message)
    except ProtocolError as error:
        assert error.number in (errno.EINVAL, errno.EMSGSIZE, errno.ENOSYS)
        return
    assert isinstance(request, GetReport | SetAttestationData)


GARBAGE = st.one_of(
    st.binary(max_size=200),
    st.binary(max_size=100).map(lambda said: set_request(2, said)),
    st.tuples(st.integers(-3, 5), st.integers(0, 2**32 - 1), st.binary(max_size=64)).map(
        lambda parts: struct.pack("<iI", parts[0], parts[1]) + parts[2]
    ),
    st.sampled_from(
        [b"GET /self HTTP/1.1\r\n\r\n", b"\r\n\r\n", b"\x16\x03\x01", b"PRI * HTTP/2.0"]
    ),
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(GARBAGE, min_size=1, max_size=6))
def test_garbage_ends_its_connection_or_is_answered_and_disturbs_nobody(
    tmp_path: Path, said: list[bytes]
) -> None:
    async def main() -> None:
        api = plugin(Settings(shutdown_s=0.1), tmp_path)
        noisy, quiet = FakeContainer(1), FakeContainer(2)
        async with (
            container_served(noisy, tmp_path, api) as socket,
            container_served(quiet, tmp_path, api) as others,
        ):
            async with trio.open_nursery() as nursery:
                for garbage in said:
                    nursery.start_soon(shout, socket, garbage)
            assert await converse(others, set_request(2, b"calm")) == struct.pack("<iI", 3, 8)
            assert (await ask(others, "GET", "/self")).status == 200
            assert (await ask(socket, "GET", "/self")).status == 200
        assert len(quiet.said) == 1

    async def shout(socket: Path, garbage: bytes) -> None:
        answer = await converse(socket, garbage, half_close=True)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 ") or len(answer) >= 8

    for leftover in tmp_path.glob("*.sock"):
        leftover.unlink()
    trio.run(main)
