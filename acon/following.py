"""What a daemon tells line by line (NDJSON), as it happens, over as many answers as it takes.

The daemon ends each answer by a deadline of its own, and connections break: then the
follower asks for what comes after the last number that it had. Nothing is told twice.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from types import TracebackType
from typing import Generic, Self, TypeVar, cast

import httpx
import msgspec
import trio

from acon.connection import Connection, ConnectionFailed
from supervisor.errors import Busy, FormatError, Refusal

MAX_LINE_BYTES = 1 << 20
# The daemon sends an empty line every 15 s when there is nothing to say: several are missing.
_SILENCE_S = 50.0
# Answers in a row that bring nothing at all, before the daemon is given up.
_ATTEMPTS = 5
_PAUSE_S = 0.5
# Between an answer's last line and its end.
_END_S = 1.0

T = TypeVar("T")


class Told(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """One line of an answer: what it tells, if anything, and where to go on after it.

    `ended` is said by the last line alone: True if nothing will follow, False if there may
    be more for who asks again.
    """

    value: T | None = None
    after: int | None = None
    ended: bool | None = None


class Follower(Generic[T]):
    """An async iterator of what is told; with `async with`, which closes the connection.

    Without `follow` it ends with what the daemon has now. With it, it ends when the daemon
    says that nothing will follow. Raises what the daemon refuses, `ConnectionFailed` when
    the connection broke and asking again did not help (without `follow`: at once), and
    `FormatError` for a line that is too long or not what it must be. Cancelling it closes
    the connection.
    """

    def __init__(
        self,
        connection: Connection,
        path: str,
        *,
        after: int,
        follow: bool,
        read: Callable[[bytes], Told[T]],
    ) -> None:
        self._connection = connection
        self._path = path
        self._after = after
        self._follow = follow
        self._read = read
        self._answer: _Answer | None = None
        self._attempts_left = _ATTEMPTS
        self._was_told = False
        self._failure: Refusal | None = None
        self._ended = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended = True
        await self._drop()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        while not self._ended:
            told = await self._next()
            if told.after is not None:
                self._after = told.after
            if told.ended is not None:
                if self._answer is not None:
                    await self._answer.finish()
                await self._drop()
                self._ended = told.ended or not self._follow
            if told.value is not None:
                return told.value
        raise StopAsyncIteration

    async def _next(self) -> Told[T]:
        """The next line that says something, from as many answers as it takes."""
        while True:
            if self._answer is None:
                self._answer = await self._open()
            try:
                line = await self._answer.next_line()
            except ConnectionFailed as error:
                await self._drop()
                if not self._follow:
                    raise
                self._failure = error
                continue
            # Also an empty line says that the daemon is there.
            self._attempts_left = _ATTEMPTS
            if line:
                return self._read(line)

    async def _open(self) -> _Answer:
        """Raises what cannot be helped by asking again.

        That is also a daemon that cannot be reached any more: it took its containers with
        it, and a later one gives their numbers to others.
        """
        path = f"{self._path}?after={self._after}&follow={int(self._follow)}"
        while True:
            if self._was_told:
                await self._before_another()
            try:
                response = await self._connection.open(path, silence_s=_SILENCE_S)
            except Busy as error:
                if not self._was_told:
                    raise
                # Our own last place may not be free yet.
                self._failure = error
                continue
            self._was_told = True
            return _Answer(self._connection, response)

    async def _before_another(self) -> None:
        """Raises when there were enough answers that said nothing at all."""
        if self._attempts_left == 0:
            raise self._failure or ConnectionFailed(self._connection.where, "says nothing")
        self._attempts_left -= 1
        await trio.sleep(_PAUSE_S)

    async def _drop(self) -> None:
        answer, self._answer = self._answer, None
        if answer is not None:
            await answer.aclose()


class _Answer:
    """The lines of one answer."""

    def __init__(self, connection: Connection, response: httpx.Response) -> None:
        self._connection = connection
        self._response = response
        self._chunks = cast("AsyncGenerator[bytes, None]", response.aiter_raw())
        self._buffer = bytearray()

    async def next_line(self) -> bytes:
        """Without its newline.

        Raises `ConnectionFailed`, also at an end that no line announced, and `FormatError`
        for a line without end.
        """
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if searched > MAX_LINE_BYTES:
                raise FormatError(
                    self._item, "a line is bounded", expected=f"at most {MAX_LINE_BYTES} bytes"
                )
            self._buffer += await self._next_chunk()
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    async def _next_chunk(self) -> bytes:
        try:
            chunk = await anext(self._chunks, None)
        except httpx.ReadTimeout as error:
            raise ConnectionFailed(
                self._connection.where, f"said nothing for {_SILENCE_S:g} s"
            ) from error
        except httpx.HTTPError as error:
            raise self._connection.failure(error, item=self._item, timeout_s=_SILENCE_S) from error
        if chunk is None:
            raise ConnectionFailed(self._connection.where, "broke off in the middle of its answer")
        return chunk

    async def finish(self) -> None:
        """After the last line: read the end, so that the connection can be used again."""
        with trio.move_on_after(_END_S), suppress(httpx.HTTPError):
            await anext(self._chunks, None)

    async def aclose(self) -> None:
        """Bounded, also when cancelled."""
        with trio.move_on_after(_END_S, shield=True):
            await self._chunks.aclose()
        await self._connection.close(self._response)

    @property
    def _item(self) -> str:
        return f"GET {self._response.url.path}"
