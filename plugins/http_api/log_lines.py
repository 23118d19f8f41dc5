"""The kept output of one container as lines of JSON."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

import msgspec

from plugins.http_api.streams import Piece, json_line, piece_of, utc_time
from supervisor import UnknownItem

if TYPE_CHECKING:
    from supervisor import LogLine, Operations

# Looked at for one piece; a piece of this many short lines is worth its sending.
_PAGE_LINES = 256


class _TextLine(msgspec.Struct, frozen=True):
    """`cut`: the line goes on in the next one of this `fd`."""

    number: int
    time: datetime
    fd: int
    text: str
    cut: bool


class _BytesLine(msgspec.Struct, frozen=True):
    """A line that is not UTF-8, in base64."""

    number: int
    time: datetime
    fd: int
    bytes: bytes
    cut: bool


class LogLines:
    """A `streams.Source` over `Operations.log_page`; it ends with the container's run."""

    def __init__(self, operations: Operations, container_id: int) -> None:
        """Raises `UnknownItem` if there is no such container."""
        self._operations = operations
        self._container_id = container_id
        self._last_number = operations.log_page(container_id, after=0, max_lines=0).last_number

    @property
    def last_number(self) -> int:
        """When this was made."""
        return self._last_number

    def read(self, after: int) -> Piece:
        try:
            page = self._operations.log_page(self._container_id, after=after, max_lines=_PAGE_LINES)
        except UnknownItem:  # forgotten meanwhile
            return Piece(data=b"", after=after, ended=True)
        data, count = piece_of(_encoded(line) for line in page.lines)
        told = json_line({"lost_lines": page.lost_lines}) if page.lost_lines else b""
        return Piece(
            data=told + data,
            after=after + page.lost_lines + count,
            ended=page.ended and count == len(page.lines),
        )

    async def wait(self, after: int) -> None:
        try:
            await self._operations.wait_for_log(self._container_id, after=after)
        except UnknownItem:
            return  # `read` tells the end


def _encoded(line: LogLine) -> bytes:
    time = utc_time(line.time_ns)
    try:
        text = line.text.decode()
    except UnicodeDecodeError:
        return json_line(_BytesLine(line.number, time, line.fd, line.text, line.cut))
    return json_line(_TextLine(line.number, time, line.fd, text, line.cut))
