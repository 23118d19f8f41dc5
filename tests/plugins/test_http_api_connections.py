"""Streams whose sends end, whoever shields them."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from plugins.http_api.connections import BoundedStream, Connection


async def test_a_send_that_nobody_reads_ends_even_under_a_shield(
    autojump_clock: MockClock,
) -> None:
    ours, theirs = trio.socket.socketpair()
    with ours, theirs:
        stream = BoundedStream(trio.SocketStream(ours))
        began = trio.current_time()
        with trio.CancelScope(shield=True), pytest.raises(trio.BrokenResourceError):
            await stream.send_all(bytes(16 << 20))
        took = trio.current_time() - began
        with pytest.raises(trio.ClosedResourceError):
            await stream.send_all(b"x")
    # Ten seconds, and one for every 16 KiB.
    assert 10 + 1024 <= took < 10 + 1024 + 5


async def test_a_client_that_may_be_slow_has_until_then_and_the_usual_time(
    autojump_clock: MockClock,
) -> None:
    ours, theirs = trio.socket.socketpair()
    with ours, theirs:
        stream = BoundedStream(trio.SocketStream(ours))
        connection = Connection(stream, None)
        began = trio.current_time()
        with connection.patience(began + 500), pytest.raises(trio.BrokenResourceError):
            await stream.send_all(bytes(16 << 20))
        took = trio.current_time() - began
        assert connection.lost
    assert 500 + 10 + 1024 <= took < 500 + 10 + 1024 + 5


async def test_a_stream_knows_that_what_it_sends_does_not_arrive() -> None:
    ours, theirs = trio.socket.socketpair()
    with ours:
        stream = BoundedStream(trio.SocketStream(ours))
        await stream.send_all(b"x")
        assert not stream.lost
        theirs.close()
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_all(b"x")
        assert stream.lost


async def test_cutting_a_stream_ends_a_send_that_is_shielded() -> None:
    ours, theirs = trio.socket.socketpair()
    with ours, theirs, trio.fail_after(5):
        stream = BoundedStream(trio.SocketStream(ours))

        async def send() -> None:
            with trio.CancelScope(shield=True), pytest.raises(trio.ClosedResourceError):
                await stream.send_all(bytes(16 << 20))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await trio.testing.wait_all_tasks_blocked(0.05)
            stream.cut()


async def test_what_runs_for_a_client_ends_when_it_leaves_and_before_it_began_if_it_has_left() -> (
    None
):
    ours, theirs = trio.socket.socketpair()
    with ours, theirs:
        connection = Connection(BoundedStream(trio.SocketStream(ours)), None)
        over = trio.CancelScope()
        with connection.for_its_client(over):
            assert not over.cancel_called
        first, second = trio.CancelScope(), trio.CancelScope()
        with connection.for_its_client(first):
            connection.leave()
            assert first.cancel_called
        with connection.for_its_client(second):
            assert second.cancel_called
        assert not over.cancel_called
