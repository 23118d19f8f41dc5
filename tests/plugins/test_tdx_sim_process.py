"""The software TD as a process: its registers outlive whatever its clients do."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from plugins.tdx_sim import client, process, wire
from plugins.tdx_sim.client import SimQuoteSource, SimRegisters
from plugins.tdx_sim.firmware import BaseImage
from plugins.tdx_sim.pki import SimPki, ensure_pki
from plugins.tdx_sim.software_td import SoftwareTd
from supervisor import Busy, ConfigError, Conflict, DeadlineExceeded, RuntimeFailed
from supervisor.formats.boot_log import parse_boot_log, replay_rtmrs
from supervisor.formats.event_log import replay
from supervisor.formats.quote import parse_quote
from supervisor.formats.td_report import parse_td_report

DIGEST = bytes(range(48))
REPORT_DATA = bytes(range(64))
SERVER = """
import sys, trio
from functools import partial
from plugins.tdx_sim import pki, process

async def main():
    async with trio.open_nursery() as nursery:
        keys = pki.ensure_pki(sys.argv[2])
        await nursery.start(partial(process.serve, sys.argv[1], keys))
        print("ready", flush=True)

trio.run(main)
"""
# Says whole requests and is killed before it can read an answer.
CRASHING_CLIENT = """
import os, signal, socket, sys
from plugins.tdx_sim import wire

for _ in range(3):
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(sys.argv[1])
    connection.sendall(wire.pack(wire.ExtendRegister(rtmr_index=3, digest_sha384=bytes(range(48)))))
    assert connection.recv(4, socket.MSG_PEEK)
half = socket.socket(socket.AF_UNIX)
half.connect(sys.argv[1])
half.sendall(wire.pack(wire.ExtendRegister(rtmr_index=3, digest_sha384=bytes(48)))[:-5])
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> SimPki:
    return ensure_pki(tmp_path_factory.mktemp("sim") / "pki")


@pytest.fixture
def path() -> Iterator[Path]:
    """Short, because a Unix socket's path has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="sim-") as folder:
        yield Path(folder) / "run" / "td.sock"


@asynccontextmanager
async def booted(
    path: Path, pki: SimPki, *, base_image: BaseImage | None = None, quote_delay_s: float = 0.0
) -> AsyncIterator[SimQuoteSource]:
    serve = partial(process.serve, base_image=base_image, quote_delay_s=quote_delay_s)
    async with trio.open_nursery() as nursery:
        assert await nursery.start(serve, path, pki) == path
        yield quotes(path)
        nursery.cancel_scope.cancel()


def quotes(path: Path, *, quote_timeout_s: float = 10.0) -> SimQuoteSource:
    return SimQuoteSource(path, quote_version=4, timeout_s=5.0, quote_timeout_s=quote_timeout_s)


async def read(path: Path, rtmr_index: int = 3) -> bytes:
    registers = SimRegisters(path, rtmr_index, timeout_s=5.0)
    return await trio.to_thread.run_sync(registers.read)


async def extend(path: Path, digest: bytes = DIGEST, rtmr_index: int = 3) -> None:
    registers = SimRegisters(path, rtmr_index, timeout_s=5.0)
    await trio.to_thread.run_sync(registers.extend, digest)


# --- what a TD does ------------------------------------------------------------------------


async def test_registers_report_quote_and_log_agree(path: Path, pki: SimPki) -> None:
    async with booted(path, pki, base_image=BaseImage(command_line="ro")) as source:
        await extend(path)
        assert await read(path) == replay([DIGEST])
        quote = parse_quote(await source.quote(REPORT_DATA))
        report = parse_td_report(await source.td_report(REPORT_DATA))
        log = await source.boot_event_log()
        description = await trio.to_thread.run_sync(client.describe, path)
        rtmrs = tuple([await read(path, index) for index in range(4)])
    assert quote.body.rtmrs == report.rtmrs == rtmrs
    assert tuple(bytes.fromhex(rtmr) for rtmr in description.rtmrs) == rtmrs
    assert quote.body.report_data == report.report_data == REPORT_DATA
    assert replay_rtmrs(parse_boot_log(log).events) == {
        **dict(enumerate(rtmrs[:3])),
        3: bytes(48),
    }
    assert description.platform == "SIMULATION"
    assert description.base_image.command_line == "ro"


@pytest.mark.parametrize("length", [0, 47, 49])
async def test_an_extend_of_a_wrong_length_is_refused(path: Path, pki: SimPki, length: int) -> None:
    async with booted(path, pki):
        with pytest.raises(RuntimeFailed) as refused:
            await extend(path, bytes(length))
        assert refused.value.actual == "EINVAL"
        assert await read(path) == bytes(48)


@pytest.mark.parametrize("rtmr_index", [0, 1])
async def test_the_firmwares_registers_are_refused_as_hardware_refuses_them(
    path: Path, pki: SimPki, rtmr_index: int
) -> None:
    async with booted(path, pki):
        before = await read(path, rtmr_index)
        with pytest.raises(RuntimeFailed) as refused:
            await extend(path, rtmr_index=rtmr_index)
        assert refused.value.actual == "EPERM"
        assert await read(path, rtmr_index) == before != bytes(48)


async def test_extends_from_many_threads_are_all_counted(path: Path, pki: SimPki) -> None:
    async with booted(path, pki):
        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(extend, path)
        assert await read(path) == replay([DIGEST] * 50)


# --- boots ---------------------------------------------------------------------------------


async def test_a_boot_by_the_owner_zeroes_the_register(path: Path, pki: SimPki) -> None:
    async with booted(path, pki) as source:
        await extend(path)
        before = parse_quote(await source.quote(REPORT_DATA))
        image = BaseImage(command_line="another")
        description = await trio.to_thread.run_sync(client.boot, path, image)
        after = parse_quote(await source.quote(REPORT_DATA))
        assert await read(path) == bytes(48) == after.body.rtmrs[3]
    assert (description.boots, description.base_image) == (2, image)
    assert before.body.rtmrs[2] != after.body.rtmrs[2]
    assert before.auth.attestation_public_key != after.auth.attestation_public_key


async def test_a_guest_cannot_boot_its_td(path: Path, pki: SimPki) -> None:
    async with booted(path, pki):
        await extend(path)
        reply = await exchange(path, wire.pack(wire.Boot()))
        assert isinstance(reply, wire.Failure)
        assert reply.error == "EPERM"
        assert await read(path) == replay([DIGEST])


async def test_both_sockets_are_for_their_owner_only(path: Path, pki: SimPki) -> None:
    async with booted(path, pki):
        for name in (path, wire.owner_socket_path(path)):
            assert stat.S_IMODE(name.lstat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [left.name for left in path.parent.iterdir()] == ["td.sock.lock"]


# --- clients that misbehave ----------------------------------------------------------------


async def exchange(path: Path, sent: bytes) -> wire.Reply | None:
    """Send these bytes and no more; the reply, or None where the connection was just closed."""
    with trio.fail_after(5):
        async with await trio.open_unix_socket(str(path)) as stream:
            with contextlib.suppress(trio.BrokenResourceError):
                await stream.send_all(sent)
            stream.socket.shutdown(socket.SHUT_WR)
            received = b"".join([chunk async for chunk in stream])
    return wire.parse_reply(received[wire.HEADER_BYTES :]) if received else None


def framed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


@pytest.mark.parametrize(
    "sent",
    [
        framed(b""),
        framed(b"not json"),
        framed(b"[]"),
        framed(b'{"kind":"shutdown"}'),
        framed(b'{"kind":"describe","more":1}'),
        framed(b'{"kind":"extend_register","rtmr_index":3}'),
        framed(b'{"kind":"extend_register","rtmr_index":4,"digest_sha384":""}'),
        framed(b'{"kind":"quote","report_data":"","version":3}'),
        framed(b'{"kind":"describe"}\xff'),
        (wire.MAX_REQUEST_BYTES + 1).to_bytes(4, "big"),
        b"\xff" * 4,
    ],
)
async def test_what_is_no_request_is_refused(path: Path, pki: SimPki, sent: bytes) -> None:
    async with booted(path, pki):
        await extend(path)
        reply = await exchange(path, sent)
        assert isinstance(reply, wire.Failure)
        assert reply.error == "EINVAL"
        assert await read(path) == replay([DIGEST])


@pytest.mark.parametrize("size", [0, 3, 4, 20])
async def test_a_request_cut_short_does_nothing(path: Path, pki: SimPki, size: int) -> None:
    request = wire.pack(wire.ExtendRegister(rtmr_index=3, digest_sha384=DIGEST))
    async with booted(path, pki):
        assert await exchange(path, request[:size]) is None
        assert await read(path) == bytes(48)


async def test_a_client_that_says_nothing_is_dismissed(
    path: Path, pki: SimPki, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "REQUEST_TIMEOUT_S", 0.05)
    async with booted(path, pki):
        with trio.fail_after(5):
            async with await trio.open_unix_socket(str(path)) as silent:
                received = b"".join([chunk async for chunk in silent])
    reply = wire.parse_reply(received[wire.HEADER_BYTES :])
    assert isinstance(reply, wire.Failure)
    assert reply.error == "ETIMEDOUT"


async def test_registers_survive_a_client_that_is_killed(path: Path, pki: SimPki) -> None:
    async with booted(path, pki):
        crash = await trio.run_process(
            [sys.executable, "-c", CRASHING_CLIENT, str(path)], check=False
        )
        assert crash.returncode == -signal.SIGKILL
        assert await read(path) == replay([DIGEST] * 3)
        await extend(path)
        assert await read(path) == replay([DIGEST] * 4)


async def test_a_fault_of_its_own_costs_one_answer_and_not_the_registers(
    path: Path, pki: SimPki, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: object, report_data: bytes) -> bytes:
        raise ZeroDivisionError

    monkeypatch.setattr(SoftwareTd, "td_report", broken)
    async with booted(path, pki) as source:
        await extend(path)
        with pytest.raises(RuntimeFailed) as failed:
            await source.td_report(REPORT_DATA)
        assert failed.value.actual == "EIO"
        assert await read(path) == replay([DIGEST])


# --- slow quotes ---------------------------------------------------------------------------


async def test_slow_quotes_wait_side_by_side_and_hold_up_nothing(path: Path, pki: SimPki) -> None:
    async with booted(path, pki, quote_delay_s=0.5) as source:
        began = trio.current_time()
        answered: list[bytes] = []

        async def ask(number: int) -> None:
            report_data = bytes([number] * 64)
            quote = parse_quote(await source.quote(report_data))
            assert quote.body.report_data == report_data
            answered.append(quote.body.rtmrs[3])

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(ask, number)
            await trio.sleep(0.25)
            await extend(path)
            assert answered == []
        # One after the other they would take 10 s.
        assert trio.current_time() - began < 4
        # They were begun before the extend and say so.
        assert answered == [bytes(48)] * 20


async def test_a_quote_that_comes_too_late_is_given_up_and_the_td_goes_on(
    path: Path, pki: SimPki
) -> None:
    async with booted(path, pki, quote_delay_s=30.0):
        with pytest.raises(DeadlineExceeded):
            await quotes(path, quote_timeout_s=0.1).quote(REPORT_DATA)
        await extend(path)
        assert await read(path) == replay([DIGEST])


async def test_a_quote_under_way_dies_with_a_boot(path: Path, pki: SimPki) -> None:
    async with booted(path, pki, quote_delay_s=0.5) as source, trio.open_nursery() as nursery:

        async def ask() -> None:
            with pytest.raises(RuntimeFailed) as failed:
                await source.quote(REPORT_DATA)
            assert failed.value.actual == "EIO"

        nursery.start_soon(ask)
        await trio.sleep(0.2)
        await trio.to_thread.run_sync(client.boot, path)


async def test_more_connections_than_the_bound_are_told_to_come_back(
    path: Path, pki: SimPki, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "MAX_CONNECTIONS", 1)
    async with (
        booted(path, pki, quote_delay_s=1.0) as source,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(source.quote, REPORT_DATA)
        await trio.sleep(0.3)
        with pytest.raises(Busy):
            await source.td_report(REPORT_DATA)


async def test_a_delay_below_zero_is_refused(path: Path, pki: SimPki) -> None:
    with pytest.raises(ConfigError), trio.fail_after(5):
        await process.serve(path, pki, quote_delay_s=-1)


# --- one TD at one socket ------------------------------------------------------------------


async def test_a_second_td_at_the_same_socket_is_refused_and_disturbs_nothing(
    path: Path, pki: SimPki
) -> None:
    async with booted(path, pki):
        await extend(path)
        with pytest.raises(Conflict), trio.fail_after(5):
            await process.serve(path, pki)
        assert await read(path) == replay([DIGEST])


async def test_what_is_no_socket_is_not_removed(path: Path, pki: SimPki) -> None:
    async_path = trio.Path(path)
    await async_path.parent.mkdir()
    await async_path.write_text("somebody's")
    with pytest.raises(ConfigError), trio.fail_after(5):
        await process.serve(path, pki)
    assert await async_path.read_text() == "somebody's"


async def test_a_path_that_is_too_long_is_refused(tmp_path: Path, pki: SimPki) -> None:
    with pytest.raises(ConfigError), trio.fail_after(5):
        await process.serve(tmp_path / ("x" * 120), pki)


@contextlib.contextmanager
def server(path: Path, pki: SimPki) -> Iterator[subprocess.Popen[str]]:
    """A software TD in a process of its own; killed in the end, as machines are."""
    command = [sys.executable, "-c", SERVER, str(path), str(pki.directory)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    ) as running:
        try:
            yield running
        finally:
            running.kill()


def wait_until_ready(running: subprocess.Popen[str]) -> None:
    assert running.stdout is not None
    assert running.stdout.readline() == "ready\n"


def test_two_processes_on_one_socket_are_refused_and_a_killed_one_leaves_no_trace(
    path: Path, pki: SimPki
) -> None:
    registers = SimRegisters(path, 3, timeout_s=5.0)
    with server(path, pki) as first:
        wait_until_ready(first)
        registers.extend(DIGEST)
        with server(path, pki) as second:
            _, complaint = second.communicate(timeout=20)
            assert second.returncode == 1
            assert "Conflict" in complaint
        assert registers.read() == replay([DIGEST])
    with pytest.raises(RuntimeFailed):
        registers.read()
    with server(path, pki) as third:
        wait_until_ready(third)
        assert registers.read() == bytes(48)
