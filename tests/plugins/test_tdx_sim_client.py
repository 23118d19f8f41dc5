"""The client believes no answer that does not fit its request, and waits for none for ever."""

from __future__ import annotations

import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from plugins.tdx_sim import client, wire
from plugins.tdx_sim.client import SimQuoteSource, SimRegisters
from plugins.tdx_sim.firmware import BaseImage
from plugins.tdx_sim.pki import ensure_pki
from plugins.tdx_sim.software_td import SoftwareTd
from supervisor import DeadlineExceeded, Refusal, RuntimeFailed

REPORT_DATA = bytes(range(64))


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sim-") as folder:
        yield Path(folder) / "td.sock"


@asynccontextmanager
async def answering(path: Path, answer: bytes | None) -> AsyncIterator[None]:
    """A server that says `answer` to everybody, or (None) nothing at all."""

    async def handle(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some()
            if answer is None:
                await trio.sleep_forever()
            else:
                await stream.send_all(answer)

    with trio.socket.socket(trio.socket.AF_UNIX) as sock:
        await sock.bind(str(path))
        sock.listen()
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, handle, [trio.SocketListener(sock)])
            yield
            nursery.cancel_scope.cancel()


def quotes(path: Path) -> SimQuoteSource:
    return SimQuoteSource(path, quote_version=4, timeout_s=0.3, quote_timeout_s=0.3)


WRONG_ANSWERS = {
    "nothing": b"",
    "half a header": b"\0\0",
    "half a frame": wire.pack(wire.Done())[:-1],
    "no JSON": b"\0\0\0\x04nope",
    "endless": (wire.MAX_REPLY_BYTES + 1).to_bytes(4, "big"),
    "an unknown answer": b'\0\0\0\x10{"kind":"other"}',
    "another answer": wire.pack(wire.Failure(error="EIO", message="broken")),
    "bytes of another length": wire.pack(wire.Blob(data=bytes(47))),
}
wrong_answers = pytest.mark.parametrize("answer", WRONG_ANSWERS.values(), ids=WRONG_ANSWERS.keys())


@wrong_answers
async def test_a_wrong_answer_is_a_failed_register(path: Path, answer: bytes) -> None:
    registers = SimRegisters(path, 3, timeout_s=2.0)
    async with answering(path, answer):
        with pytest.raises(RuntimeFailed):
            await trio.to_thread.run_sync(registers.read)
        with pytest.raises(RuntimeFailed):
            await trio.to_thread.run_sync(registers.extend, bytes(48))


@wrong_answers
async def test_a_wrong_answer_is_no_quote_and_no_report(path: Path, answer: bytes) -> None:
    async with answering(path, answer):
        with pytest.raises(RuntimeFailed):
            await quotes(path).quote(REPORT_DATA)
        with pytest.raises(RuntimeFailed):
            await quotes(path).td_report(REPORT_DATA)


async def test_an_extend_is_not_confirmed_by_other_bytes(path: Path) -> None:
    registers = SimRegisters(path, 3, timeout_s=2.0)
    async with answering(path, wire.pack(wire.Blob(data=bytes(48)))):
        assert await trio.to_thread.run_sync(registers.read) == bytes(48)
        with pytest.raises(RuntimeFailed):
            await trio.to_thread.run_sync(registers.extend, bytes(48))


async def test_somebody_elses_quote_is_refused(path: Path, tmp_path: Path) -> None:
    td = SoftwareTd(ensure_pki(tmp_path / "pki"), BaseImage())
    for asked in (REPORT_DATA, bytes(64)):
        other = td.finish_quote(td.begin_quote(asked, 4))
        async with answering(path, wire.pack(wire.Blob(data=other))):
            if asked == REPORT_DATA:
                assert await quotes(path).quote(REPORT_DATA) == other
            else:
                with pytest.raises(RuntimeFailed) as refused:
                    await quotes(path).quote(REPORT_DATA)
                assert refused.value.expected == REPORT_DATA.hex()
                assert refused.value.actual == asked.hex()
        await trio.Path(path).unlink()


async def test_no_answer_ends_in_time(path: Path) -> None:
    registers = SimRegisters(path, 3, timeout_s=0.3)
    async with answering(path, None):
        began = time.monotonic()
        with pytest.raises(RuntimeFailed):
            await trio.to_thread.run_sync(registers.extend, bytes(48))
        for ask in (quotes(path).quote, quotes(path).td_report):
            with pytest.raises(DeadlineExceeded):
                await ask(REPORT_DATA)
        with pytest.raises(DeadlineExceeded):
            await quotes(path).boot_event_log()
        assert time.monotonic() - began < 5


async def test_an_answer_in_single_bytes_has_the_same_deadline(path: Path) -> None:
    async def trickle(stream: trio.SocketStream) -> None:
        async with stream:
            try:
                for byte in wire.pack(wire.Blob(data=bytes(48))):
                    await stream.send_all(bytes([byte]))
                    await trio.sleep(0.1)
            except trio.BrokenResourceError:
                return

    with trio.socket.socket(trio.socket.AF_UNIX) as sock:
        await sock.bind(str(path))
        sock.listen()
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, trickle, [trio.SocketListener(sock)])
            began = time.monotonic()
            with pytest.raises(RuntimeFailed):
                await trio.to_thread.run_sync(SimRegisters(path, 3, timeout_s=0.5).read)
            assert time.monotonic() - began < 3
            nursery.cancel_scope.cancel()


async def test_where_nobody_serves_everything_is_a_refusal_that_names_the_socket(
    path: Path,
) -> None:
    refusals: list[Refusal] = []
    for ask in (SimRegisters(path, 3, timeout_s=1.0).read, lambda: client.describe(path)):
        with pytest.raises(RuntimeFailed) as refused:
            ask()
        refusals.append(refused.value)
    with pytest.raises(RuntimeFailed) as refused:
        client.boot(path)
    assert str(wire.owner_socket_path(path)) in str(refused.value)
    with pytest.raises(RuntimeFailed) as refused:
        await quotes(path).quote(REPORT_DATA)
    refusals.append(refused.value)
    assert all(str(path) in str(refusal) for refusal in refusals)


async def test_a_cancelled_quote_ends_at_once(path: Path) -> None:
    async with answering(path, None):
        with trio.move_on_after(0.05) as scope:
            await SimQuoteSource(path, quote_version=4, timeout_s=60, quote_timeout_s=60).quote(
                REPORT_DATA
            )
        assert scope.cancelled_caught
