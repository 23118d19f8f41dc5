"""A layer's tar as the body of a request, from any offset."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path
from typing import Protocol, Self

import httpx
import trio

from supervisor.formats.errors import FormatError

_CHUNK_BYTES = 256 << 10

# Bytes sent so far, and bytes in all.
Progress = Callable[[int, int], None]


class TarSource(Protocol):
    """An uncompressed tar that can be read again from any offset."""

    @property
    def size_bytes(self) -> int: ...

    def chunks(self, offset: int) -> Generator[bytes, None, None]:
        """The bytes from `offset` on. Each step runs in a worker thread, one at a time."""


class FileTar:
    """A tar in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def size_bytes(self) -> int:
        return self._path.stat().st_size

    def chunks(self, offset: int) -> Generator[bytes, None, None]:
        with self._path.open("rb") as file:
            file.seek(offset)
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk


class TarBody(httpx.AsyncByteStream):
    """A request's body. No async generator: nobody would close one of a broken request."""

    def __init__(self, source: TarSource, offset: int, total: int, report: Progress) -> None:
        self._chunks = source.chunks(offset)
        self._sent = offset
        self._total = total
        self._report = report

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        chunk = await trio.to_thread.run_sync(next, self._chunks, b"")
        if not chunk and self._sent == self._total:
            raise StopAsyncIteration
        self._sent += len(chunk)
        if not chunk or self._sent > self._total:
            raise FormatError(
                "layer",
                "a tar does not change while it is sent",
                expected=f"{self._total} bytes",
                actual=self._sent,
            )
        self._report(self._sent, self._total)
        return chunk

    async def aclose(self) -> None:
        self._chunks.close()
