"""The conversation with one command, held with ordinary processes: no runtime, no root."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio
from oci_runtime_rig import open_fds

from plugins.oci_runtime.exchange import (
    DRAIN_BYTES,
    Capture,
    Exchange,
    exchange_pace,
    open_exchange,
)

MUCH = os.urandom(3_000_000)
TIMEOUT_S = 30


@contextmanager
def talking_to(
    script: str, *, stdin: bytes = b"", capture_bytes: int = 1000
) -> Iterator[tuple[Exchange, subprocess.Popen[bytes]]]:
    with open_exchange(
        stdin, capture_bytes=capture_bytes, owner=os.getuid(), pace=exchange_pace()
    ) as exchange:
        ends = exchange.theirs
        process = subprocess.Popen(
            ["/bin/sh", "-c", script], stdin=ends[0], stdout=ends[1], stderr=ends[2]
        )
        exchange.close_theirs()
        try:
            yield exchange, process
        finally:
            process.kill()
            process.wait()


async def test_what_is_told_and_answered_goes_through_unchanged() -> None:
    with (
        talking_to("cat; echo why >&2", stdin=MUCH, capture_bytes=len(MUCH)) as (exchange, _),
        trio.fail_after(TIMEOUT_S),
    ):
        await exchange.run()
    assert bytes(exchange.stdout) == MUCH
    assert not exchange.stdout.cut
    assert bytes(exchange.stderr) == b"why\n"


@pytest.mark.parametrize(
    "script", ["exec <&-; echo deaf", "echo deaf", "head -c 1 >/dev/null; echo deaf"]
)
async def test_a_command_that_does_not_listen_is_not_waited_for(script: str) -> None:
    with (
        talking_to(script, stdin=MUCH) as (exchange, _),
        trio.fail_after(TIMEOUT_S),
    ):
        await exchange.run()
    assert bytes(exchange.stdout) == b"deaf\n"


async def test_a_command_that_hears_nothing_is_told_so() -> None:
    with talking_to("cat; echo end") as (exchange, _), trio.fail_after(TIMEOUT_S):
        await exchange.run()
    assert bytes(exchange.stdout) == b"end\n"


async def test_what_a_command_wrote_before_it_ended_is_drained_without_waiting() -> None:
    # A child has the outputs still.
    with talking_to("sleep 1000 & head -c 50000 /dev/zero; echo $! >&2") as (exchange, process):
        process.wait(TIMEOUT_S)
        with trio.fail_after(TIMEOUT_S):
            await exchange.drain()
        os.kill(int(bytes(exchange.stderr)), 9)
    assert bytes(exchange.stdout) == bytes(1000)
    assert exchange.stdout.cut


async def test_what_is_drained_is_bounded() -> None:
    class Endless(Capture):
        """Whatever is taken out of the pipe is at once replaced."""

        taken_bytes = 0

        def take(self, chunk: bytes) -> None:
            self.taken_bytes += len(chunk)
            os.write(exchange.theirs[1], chunk)

    with open_exchange(b"", capture_bytes=10, owner=os.getuid(), pace=exchange_pace()) as exchange:
        endless = exchange.stdout = Endless(10)
        os.write(exchange.theirs[1], bytes(40_000))
        with trio.fail_after(TIMEOUT_S):
            await exchange.drain()
    assert DRAIN_BYTES <= endless.taken_bytes < DRAIN_BYTES + 40_000


@pytest.mark.parametrize(
    ("chunks", "kept", "cut"),
    [
        ([b"abcde"], b"abcde", False),
        ([b"abcdef"], b"abcde", True),
        ([b"abc", b"", b"de"], b"abcde", False),
        ([b"abcde", b"f"], b"abcde", True),
        ([], b"", False),
    ],
)
def test_a_capture_keeps_the_beginning_and_says_whether_there_was_more(
    chunks: list[bytes], kept: bytes, cut: bool
) -> None:
    capture = Capture(5)
    for chunk in chunks:
        capture.take(chunk)
    assert bytes(capture) == kept
    assert capture.cut is cut


async def test_a_cancelled_conversation_gives_every_descriptor_back() -> None:
    before = open_fds()
    with talking_to("sleep 1000", stdin=MUCH) as (exchange, _), trio.move_on_after(0.05):
        await exchange.run()
    assert open_fds() == before
