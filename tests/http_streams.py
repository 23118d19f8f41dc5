"""A client that reads an answer of unknown length line by line, as slowly as a test wants."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import h11
import msgspec
import trio

WAIT_S = 10


class LineReader:
    """One request and its answer; `read_more` is the only thing that reads from the socket."""

    def __init__(self, stream: trio.SocketStream, method: str = "GET") -> None:
        self.stream = stream
        self.status = 0
        self.headers: dict[str, str] = {}
        self.is_whole = False
        self._text = bytearray()
        self._http = h11.Connection(h11.CLIENT)
        self._http.send(h11.Request(method=method, target="/", headers=[("Host", "td")]))
        self._http.send(h11.EndOfMessage())

    async def read_more(self, max_bytes: int = 65536) -> None:
        """Take in the next bytes. Raises `EOFError` when the answer breaks off."""
        with trio.fail_after(WAIT_S):
            try:
                self._http.receive_data(bytes(await self.stream.receive_some(max_bytes)))
                self._take_in()
            except (trio.BrokenResourceError, h11.RemoteProtocolError) as error:
                raise EOFError from error

    def _take_in(self) -> None:
        while True:
            event = self._http.next_event()
            if isinstance(event, h11.Response):
                self.status = event.status_code
                self.headers = {name.decode(): text.decode() for name, text in event.headers}
            elif isinstance(event, h11.Data):
                self._text += event.data
            elif isinstance(event, h11.EndOfMessage):
                self.is_whole = True
                return
            else:
                return

    async def line(self) -> bytes:
        """The next line, without its end; b"" is a heartbeat."""
        while b"\n" not in self._text:
            await self.read_more()
        line, _, rest = bytes(self._text).partition(b"\n")
        self._text[:] = rest
        return line

    async def value(self) -> dict[str, object]:
        """The next line that says something."""
        while not (line := await self.line()):
            pass
        return msgspec.json.decode(line, type=dict[str, object])

    async def values(self) -> list[dict[str, object]]:
        """All that still comes, to the end of the answer."""
        while not self.is_whole:
            await self.read_more()
        lines = bytes(self._text).split(b"\n")
        self._text.clear()
        assert lines.pop() == b""
        return [msgspec.json.decode(line, type=dict[str, object]) for line in lines if line]


@asynccontextmanager
async def reading(
    socket: Path, target: str, method: str = "GET", *, version: str = "1.1"
) -> AsyncIterator[LineReader]:
    """Ask, and read the answer's head; the connection is closed when the block ends."""
    async with await trio.open_unix_socket(str(socket)) as stream:
        await stream.send_all(f"{method} {target} HTTP/{version}\r\nHost: td\r\n\r\n".encode())
        reader = LineReader(stream, method)
        while reader.status == 0:
            await reader.read_more()
        yield reader


async def read_all(socket: Path, target: str) -> list[dict[str, object]]:
    """All values of an answer that ends by itself."""
    async with reading(socket, target) as reader:
        assert reader.status == 200
        return await reader.values()
