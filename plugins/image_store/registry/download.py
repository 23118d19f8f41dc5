"""A blob's bytes, in order and once each, over as many connections as that takes.

A transfer that breaks or stalls goes on where it was (Range, RFC 9110, section 14); a server
that knows no ranges sends all again, and what we have is passed over. Nothing here believes
a byte: whoever reads compares the digest.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import trio

from plugins.image_store.registry.auth import Scope
from plugins.image_store.registry.endpoint import Ask, Endpoint
from plugins.image_store.registry.exchange import Answer
from plugins.image_store.registry.patience import Passing, Patience, too_slow
from plugins.image_store.registry.said import with_mirrors
from supervisor import DeadlineExceeded, Refusal, Untrusted

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,16})-([0-9]{1,16})/([0-9]{1,16}|\*)")
_UNSATISFIED = re.compile(r"bytes \*/([0-9]{1,16})")
_STATUSES = frozenset({200, 206})


class Download:
    """One blob on its way; `chunks` is run once."""

    def __init__(
        self, repository: str, blob_digest: str, size_bytes: int, patience: Patience
    ) -> None:
        self._path = f"/v2/{repository}/blobs/{blob_digest}"
        self._scope = Scope(repository, "pull")
        self._size_bytes = size_bytes
        self._patience = patience
        self._position = 0
        # Until a server shows that it cannot.
        self._by_range = True

    async def chunks(self, endpoints: Sequence[Endpoint]) -> AsyncGenerator[bytes, None]:
        """Exactly `size_bytes`, from the first endpoint that has them; the last one decides.

        Raises `Untrusted` at the first byte too many and for every other lie about lengths;
        otherwise the refusal of the last attempt.
        """
        failed: list[str] = []
        for endpoint in endpoints:
            self._by_range = True
            try:
                async with aclosing(self._from(endpoint)) as pieces:
                    async for piece in pieces:
                        yield piece
            except Refusal as error:
                shown = endpoint.discreet(error)
                if endpoint is endpoints[-1] or self._is_whole:
                    raise with_mirrors(shown, failed) from None
                failed.append(str(shown))
            else:
                return

    @property
    def _is_whole(self) -> bool:
        return 0 < self._size_bytes == self._position

    async def _from(self, endpoint: Endpoint) -> AsyncGenerator[bytes, None]:
        failures = 0
        while True:
            before = self._position
            try:
                async with aclosing(self._attempt(endpoint)) as pieces:
                    async for piece in pieces:
                        self._position += len(piece)
                        yield piece
                return
            except Passing as error:
                if self._is_whole:
                    return  # only the end of the message is missing
                if self._position - before >= self._patience.progress_bytes:
                    failures = 0
                failures += 1
                if failures >= endpoint.attempts:
                    raise error.refusal from error
                pause_s = self._patience.pause_s(failures, error.pause_s)
            await trio.sleep(pause_s)

    async def _attempt(self, endpoint: Endpoint) -> AsyncGenerator[bytes, None]:
        """One request: from where we are until it ends, cleanly or not."""
        begin = self._position if self._by_range else 0
        headers = {"range": f"bytes={begin}-"} if begin else {}
        ask = Ask(method="GET", path=self._path, scope=self._scope, headers=headers)
        answer = await self._answered(endpoint, ask)
        try:
            if answer.status == 416 and begin:
                self._without_range(answer)
            if answer.status not in _STATUSES:
                raise await endpoint.fault(answer, expected=_STATUSES)
            passed_over = 0
            if answer.status == 206:
                self._check_range(answer, begin)
            else:
                self._check_length(answer)
                passed_over = self._position
            async with aclosing(self._body(answer, passed_over)) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            await answer.aclose()

    async def _answered(self, endpoint: Endpoint, ask: Ask) -> Answer:
        timeout_s = self._patience.answer_timeout_s
        try:
            with trio.fail_after(timeout_s):
                return await endpoint.answer(ask)
        except trio.TooSlowError:
            raise Passing(too_slow(endpoint.item(ask), timeout_s)) from None

    async def _body(self, answer: Answer, passed_over: int) -> AsyncGenerator[bytes, None]:
        arrived = self._position - passed_over
        waited_s, window_bytes = 0.0, 0
        while True:
            began_s = trio.current_time()
            chunk = await answer.chunk()
            waited_s += trio.current_time() - began_s
            if not chunk:
                break
            window_bytes += len(chunk)
            if window_bytes >= self._patience.window_bytes:
                waited_s, window_bytes = 0.0, 0
            elif waited_s > self._patience.slow_timeout_s:
                raise Passing(self._trickling(answer))
            arrived += len(chunk)
            if arrived > self._size_bytes:
                raise self._wrong_size(answer, f"more than {self._size_bytes} bytes")
            missed = min(passed_over, len(chunk))
            passed_over -= missed
            if missed < len(chunk):
                yield chunk[missed:] if missed else chunk
        if arrived < self._size_bytes:
            # Perhaps only cut off: unless it was framed, nobody can tell from here.
            raise Passing(self._wrong_size(answer, f"{arrived} bytes"))

    def _without_range(self, answer: Answer) -> None:
        """A 416: either the blob ends before the place we asked for, or ranges do not work."""
        found = _UNSATISFIED.fullmatch(answer.headers.get("content-range", ""))
        if found is not None and int(found[1]) != self._size_bytes:
            raise self._wrong_size(answer, f"{int(found[1])} bytes")
        self._by_range = False
        raise Passing(
            Untrusted(answer.item, "the registry must send the rest of a blob", actual="416")
        )

    def _check_range(self, answer: Answer, begin: int) -> None:
        text = answer.headers.get("content-range", "")
        found = _CONTENT_RANGE.fullmatch(text)
        size_bytes = self._size_bytes
        if (
            begin == 0
            or found is None
            or int(found[1]) != begin
            or not begin <= int(found[2]) < size_bytes
            or found[3] not in ("*", str(size_bytes))
        ):
            raise Untrusted(
                answer.item,
                "a partial answer must begin where it was asked to (Content-Range)",
                expected=f"bytes {begin}-{size_bytes - 1}/{size_bytes}" if begin else "status 200",
                actual=text[:80] or "none",
            )

    def _check_length(self, answer: Answer) -> None:
        length = answer.headers.get("content-length")
        if length is not None and length != str(self._size_bytes):
            raise self._wrong_size(answer, f"{length[:20]} bytes (Content-Length)")

    def _wrong_size(self, answer: Answer, actual: str) -> Untrusted:
        return Untrusted(
            answer.item,
            "the blob must have the size that was given",
            expected=f"{self._size_bytes} bytes",
            actual=actual,
        )

    def _trickling(self, answer: Answer) -> DeadlineExceeded:
        return DeadlineExceeded(
            answer.item,
            "the registry must send at a bearable rate",
            expected=f"{self._patience.window_bytes} bytes within "
            f"{self._patience.slow_timeout_s:g} s",
        )
