"""Following a log over answers that end, break, fall silent or lie."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
from acon_daemon import daemon_that

from acon import following
from acon.client import Client
from acon.connection import ConnectionFailed
from acon.container_client import Lost, OutputLine
from supervisor.errors import Busy, Conflict, FormatError, Refusal, UnknownItem

# httpx leaves its own generators unfinished when an answer is not read to its end.
pytestmark = pytest.mark.filterwarnings("ignore:Async generator 'http:ResourceWarning")

Answer = Callable[[trio.SocketStream], Awaitable[None]]
HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
LAST = {"ended": True}


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_PAUSE_S", 0.01)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"


def written(number: int, **changes: object) -> dict[str, object]:
    plain = {"number": number, "time": "2026-01-02T03:04:05Z", "fd": 1, "text": f"line {number}"}
    return plain | changes


class Script:
    """A server that gives one answer after the other, each on a connection of its own."""

    def __init__(self, *answers: bytes, hold: bool = False) -> None:
        self._answers = list(answers)
        self._hold = hold
        self.asked: list[str] = []

    async def __call__(self, stream: trio.SocketStream) -> None:
        async with stream:
            request = bytes(await stream.receive_some(65536))
            self.asked.append(request.split(b" ")[1].decode())
            if self._answers:
                await stream.send_all(self._answers.pop(0))
            if self._hold and not self._answers:
                await trio.sleep_forever()

    @property
    def afters(self) -> list[int]:
        return [int(path.partition("after=")[2].partition("&")[0]) for path in self.asked]


def whole(*values: object) -> bytes:
    return HEAD + chunk(b"".join(line(value) for value in values)) + END


def broken(data: bytes) -> bytes:
    return HEAD + chunk(data)


async def follow(client: Client, *, after: int = 0, follow: bool = True) -> list[object]:
    with trio.fail_after(20):
        async with client.logs(7, after=after, follow=follow) as lines:
            return [one.number if isinstance(one, OutputLine) else one async for one in lines]


async def test_it_goes_on_where_the_daemon_ended_an_answer(tmp_path: Path) -> None:
    script = Script(
        whole(written(3), written(4), {"ended": False, "after": 9}),
        whole(written(10), LAST),
    )
    async with daemon_that(script, tmp_path) as client:
        assert await follow(client, after=2) == [3, 4, 10]
    assert script.asked == [
        "/api/v2/containers/7/logs?after=2&follow=1",
        "/api/v2/containers/7/logs?after=9&follow=1",
    ]


@pytest.mark.parametrize("rest", [b"", line(written(3))[:-9]], ids=["between lines", "within one"])
async def test_it_goes_on_where_a_connection_broke(tmp_path: Path, rest: bytes) -> None:
    script = Script(broken(line(written(1)) + line(written(2)) + rest), whole(written(3), LAST))
    async with daemon_that(script, tmp_path) as client:
        assert await follow(client) == [1, 2, 3]
    assert script.afters == [0, 2]


async def test_an_end_that_no_line_announced_is_no_end(tmp_path: Path) -> None:
    script = Script(whole(written(1)), whole(LAST))
    async with daemon_that(script, tmp_path) as client:
        assert await follow(client) == [1]
    assert script.afters == [0, 1]


async def test_without_follow_what_broke_off_is_a_failure(tmp_path: Path) -> None:
    script = Script(broken(line(written(1))))
    async with daemon_that(script, tmp_path) as client:
        with pytest.raises(ConnectionFailed):
            await follow(client, follow=False)
    assert len(script.asked) == 1


async def test_without_follow_it_ends_with_what_there_is(tmp_path: Path) -> None:
    script = Script(whole(written(1), {"ended": False, "after": 1}))
    async with daemon_that(script, tmp_path) as client:
        assert await follow(client, follow=False) == [1]
    assert script.asked == ["/api/v2/containers/7/logs?after=0&follow=0"]


async def test_heartbeats_say_nothing(tmp_path: Path) -> None:
    parts = [b"\n", line(written(1)), b"\n\n", line(written(2)), line(LAST)]
    script = Script(HEAD + b"".join(chunk(part) for part in parts) + END)
    async with daemon_that(script, tmp_path) as client:
        assert await follow(client) == [1, 2]


async def test_lines_may_come_in_pieces_of_any_size(tmp_path: Path) -> None:
    data = line(written(1, text="ä\n")) + line(written(2)) + line(LAST)
    script = Script(HEAD + b"".join(chunk(bytes([byte])) for byte in data) + END)
    async with daemon_that(script, tmp_path) as client:
        assert await follow(client) == [1, 2]


async def test_silence_counts_as_a_broken_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "_SILENCE_S", 0.1)
    first = True

    async def silent_once(stream: trio.SocketStream) -> None:
        nonlocal first
        async with stream:
            await stream.receive_some(65536)
            if first:
                first = False
                await stream.send_all(broken(line(written(1))))
                await stream.receive_some(1)  # until the client has had enough
            else:
                await stream.send_all(whole(written(2), LAST))

    async with daemon_that(silent_once, tmp_path) as client:
        assert await follow(client) == [1, 2]


async def test_a_daemon_that_says_nothing_at_all_is_given_up(tmp_path: Path) -> None:
    script = Script(*[HEAD] * 100)
    async with daemon_that(script, tmp_path) as client:
        with pytest.raises(ConnectionFailed):
            await follow(client)
    assert len(script.asked) == 6


async def test_one_that_says_something_each_time_is_not(tmp_path: Path) -> None:
    script = Script(*[broken(b"\n")] * 20, whole(written(1), LAST))
    async with daemon_that(script, tmp_path) as client:
        assert await follow(client) == [1]


async def test_a_daemon_that_is_gone_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "brief.sock"
    sock = trio.socket.socket(trio.socket.AF_UNIX)
    await sock.bind(str(path))
    sock.listen()

    async def once() -> None:
        async with trio.SocketListener(sock) as listener, await listener.accept() as stream:
            await stream.receive_some(65536)
            await stream.send_all(broken(line(written(1))))

    async with trio.open_nursery() as nursery, Client.over_socket(path) as client:
        nursery.start_soon(once)
        with pytest.raises(ConnectionFailed, match="nobody listens"):
            await follow(client)


async def test_lost_lines_are_told_where_they_are_missing(tmp_path: Path) -> None:
    script = Script(whole({"lost_lines": 4}, written(5), {"lost_lines": 2}, written(8), LAST))
    async with daemon_that(script, tmp_path) as client:
        assert await follow(client) == [Lost(4), 5, Lost(2), 8]


async def test_lines_that_are_not_utf8_come_as_bytes(tmp_path: Path) -> None:
    value = written(1, bytes="/wA=", cut=True)
    del value["text"]
    script = Script(whole(value, LAST))
    async with daemon_that(script, tmp_path) as client, client.logs(7) as lines:
        (only,) = [one async for one in lines]
    assert isinstance(only, OutputLine)
    assert (only.data, only.cut) == (b"\xff\x00", True)


@pytest.mark.parametrize(
    "data",
    [
        b"x" * (following.MAX_LINE_BYTES + 1),
        b"nonsense\n",
        b"[]\n",
        b'{"number":1}\n',
        line(written(1, text=None)),
        line(written(1, text=7)),
        line(written(1, time="yesterday")),
        line(written(1, time="2026-01-02T03:04:05")),
        line(written(1, text="\ud800")).replace(b"\\ud800", b"\xff"),
    ],
    ids=["endless", "noise", "list", "half", "no text", "number", "no time", "no zone", "bytes"],
)
async def test_a_line_that_is_none_ends_it(tmp_path: Path, data: bytes) -> None:
    script = Script(*[broken(data)] * 9)
    async with daemon_that(script, tmp_path) as client:
        with pytest.raises(FormatError):
            await follow(client)
    assert len(script.asked) == 1


def refused(refusal: Refusal, status: int) -> bytes:
    body = json.dumps({"error": refusal.to_dict()}).encode()
    return b"HTTP/1.1 %d No\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


@pytest.mark.parametrize("kind", [UnknownItem, Conflict, Busy])
async def test_what_the_daemon_refuses_is_raised_as_it_was_there(
    tmp_path: Path, kind: type[Refusal]
) -> None:
    script = Script(*[refused(kind("container 7", "no"), 404)] * 9)
    async with daemon_that(script, tmp_path) as client:
        with pytest.raises(kind, match="no"):
            await follow(client)
    assert len(script.asked) == 1


async def test_who_has_followed_already_waits_for_a_place(tmp_path: Path) -> None:
    script = Script(
        whole(written(1), {"ended": False, "after": 1}),
        refused(Busy("followers", "too many"), 503),
        whole(written(2), LAST),
    )
    async with daemon_that(script, tmp_path) as client:
        assert await follow(client) == [1, 2]
    assert script.afters == [0, 1, 1]


async def test_a_container_that_is_forgotten_meanwhile_is_the_end(tmp_path: Path) -> None:
    script = Script(
        whole(written(1), {"ended": False, "after": 1}), refused(UnknownItem("7", "gone"), 404)
    )
    async with daemon_that(script, tmp_path) as client:
        with pytest.raises(UnknownItem):
            await follow(client)


async def test_leaving_early_closes_the_connection(tmp_path: Path) -> None:
    closed = trio.Event()

    async def endless(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some(65536)
            await stream.send_all(broken(line(written(1))))
            assert await stream.receive_some(1) == b""
            closed.set()

    async with daemon_that(endless, tmp_path) as client:
        async with client.logs(7, follow=True) as lines:
            async for _ in lines:
                break
        with trio.fail_after(10):
            await closed.wait()


async def test_being_cancelled_closes_the_connection(tmp_path: Path) -> None:
    closed = trio.Event()
    asked = trio.Event()

    async def endless(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some(65536)
            await stream.send_all(HEAD)
            asked.set()
            assert await stream.receive_some(1) == b""
            closed.set()

    async with daemon_that(endless, tmp_path) as client, trio.open_nursery() as nursery:
        nursery.start_soon(follow, client)
        await asked.wait()
        nursery.cancel_scope.cancel()
    assert closed.is_set() or await _comes(closed)


async def _comes(event: trio.Event) -> bool:
    with trio.move_on_after(10):
        await event.wait()
    return event.is_set()
