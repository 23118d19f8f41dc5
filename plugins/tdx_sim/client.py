"""The guest's side of the software TD: registers for the measuring thread, quotes for trio.

And the owner's: `boot` and `describe`, for `acon sim`.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import trio

from plugins.tdx_sim import wire
from plugins.tdx_sim.firmware import BaseImage
from supervisor import Busy, DeadlineExceeded, FormatError, RuntimeFailed
from supervisor.formats.quote import parse_quote
from supervisor.formats.td_report import TD_REPORT_BYTES

_ITEM = "software TD"
_REGISTER_BYTES = 48


class SimRegisters:
    """One RTMR of the software TD. Synchronous; each call ends within `timeout_s`."""

    def __init__(self, socket_path: Path | str, rtmr_index: int, *, timeout_s: float) -> None:
        self._socket_path = Path(socket_path)
        self._rtmr_index = rtmr_index
        self._timeout_s = timeout_s

    def read(self) -> bytes:
        """The register's 48 bytes. Raises `RuntimeFailed`."""
        reply = self._ask(wire.ReadRegister(rtmr_index=self._rtmr_index))
        if not isinstance(reply, wire.Blob) or len(reply.data) != _REGISTER_BYTES:
            raise RuntimeFailed(_ITEM, "a register has 48 bytes", actual=_summary(reply))
        return reply.data

    def extend(self, digest_sha384: bytes) -> None:
        """register = SHA384(register || digest). Raises `RuntimeFailed`; never tried twice.

        After a refusal by the TD (its errno is named) nothing changed; after any other error
        whether it happened is unknown.
        """
        request = wire.ExtendRegister(rtmr_index=self._rtmr_index, digest_sha384=digest_sha384)
        reply = self._ask(request)
        if not isinstance(reply, wire.Done):
            raise RuntimeFailed(_ITEM, "an extend is confirmed", actual=_summary(reply))

    def _ask(self, request: wire.Request) -> wire.Reply:
        return _ask(self._socket_path, request, timeout_s=self._timeout_s)


class SimQuoteSource:
    """Quotes of the software TD. Methods may be called concurrently, and cancelled.

    They raise `DeadlineExceeded` after their time, `Busy` when the TD serves too many at once,
    `RuntimeFailed` for everything else.
    """

    def __init__(
        self,
        socket_path: Path | str,
        *,
        quote_version: wire.QuoteVersion,
        timeout_s: float,
        quote_timeout_s: float,
    ) -> None:
        self._socket_path = Path(socket_path)
        self._quote_version: wire.QuoteVersion = quote_version
        self._timeout_s = timeout_s
        self._quote_timeout_s = quote_timeout_s

    async def quote(self, report_data: bytes) -> bytes:
        """A quote whose REPORTDATA is these 64 bytes: looked at here, as with hardware."""
        request = wire.MakeQuote(report_data=report_data, version=self._quote_version)
        quote = await self._blob(request, timeout_s=self._quote_timeout_s)
        try:
            actual = parse_quote(quote).body.report_data
        except FormatError as error:
            raise RuntimeFailed(_ITEM, "the answer is a quote", actual=error) from error
        if actual != report_data:
            raise RuntimeFailed(
                _ITEM,
                "the quote answers this request",
                expected=report_data.hex(),
                actual=actual.hex(),
            )
        return quote

    async def td_report(self, report_data: bytes) -> bytes:
        """A TDREPORT, 1,024 bytes, whose REPORTDATA is these 64 bytes."""
        request = wire.MakeTdReport(report_data=report_data)
        report = await self._blob(request, timeout_s=self._timeout_s)
        if len(report) != TD_REPORT_BYTES:
            raise RuntimeFailed(
                _ITEM, "a TDREPORT's size in bytes", expected=TD_REPORT_BYTES, actual=len(report)
            )
        return report

    async def boot_event_log(self) -> bytes:
        """The CCEL of the simulated boot, without filler."""
        return await self._blob(wire.ReadBootLog(), timeout_s=self._timeout_s)

    async def _blob(self, request: wire.Request, *, timeout_s: float) -> bytes:
        reply = await _ask_async(self._socket_path, request, timeout_s=timeout_s)
        if not isinstance(reply, wire.Blob):
            raise RuntimeFailed(_ITEM, "the answer is bytes", actual=_summary(reply))
        return reply.data


def describe(socket_path: Path | str, *, timeout_s: float = 5.0) -> wire.Description:
    """The TD as it is now; `socket_path` is the guest's. Raises `RuntimeFailed`."""
    reply = _ask(Path(socket_path), wire.Describe(), timeout_s=timeout_s)
    return _description(reply)


def boot(
    socket_path: Path | str, base_image: BaseImage | None = None, *, timeout_s: float = 5.0
) -> wire.Description:
    """Boot the TD that serves its guest at `socket_path` again, as its owner.

    Its registers begin anew, it has a new attestation key, quotes under way fail. Raises
    `RuntimeFailed`, also for whoever may not open the owner's socket.
    """
    path = wire.owner_socket_path(socket_path)
    return _description(_ask(path, wire.Boot(base_image=base_image), timeout_s=timeout_s))


def _description(reply: wire.Reply) -> wire.Description:
    if not isinstance(reply, wire.Description):
        raise RuntimeFailed(_ITEM, "the answer is a description", actual=_summary(reply))
    return reply


# --- one request, one reply ----------------------------------------------------------------


def _ask(path: Path, request: wire.Request, *, timeout_s: float) -> wire.Reply:
    deadline = time.monotonic() + timeout_s
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            _arm(connection, deadline)
            connection.connect(os.fspath(path))
            connection.sendall(wire.pack(request))
            header = _receive_exactly(connection, wire.HEADER_BYTES, deadline)
            size = wire.body_size(header, limit_bytes=wire.MAX_REPLY_BYTES)
            body = _receive_exactly(connection, size, deadline)
        reply = wire.parse_reply(body)
    except (OSError, ValueError) as error:
        raise _unanswered(path, error) from error
    return _accepted(reply)


def _receive_exactly(connection: socket.socket, size: int, deadline: float) -> bytes:
    received = bytearray()
    while len(received) < size:
        _arm(connection, deadline)
        chunk = connection.recv(size - len(received))
        if not chunk:
            raise ConnectionError("the answer ended early")
        received += chunk
    return bytes(received)


def _arm(connection: socket.socket, deadline: float) -> None:
    remaining_s = deadline - time.monotonic()
    if remaining_s <= 0:
        raise TimeoutError("no answer in time")
    connection.settimeout(remaining_s)


async def _ask_async(path: Path, request: wire.Request, *, timeout_s: float) -> wire.Reply:
    try:
        with trio.fail_after(timeout_s):
            async with await trio.open_unix_socket(os.fspath(path)) as stream:
                await stream.send_all(wire.pack(request))
                header = await _receive_exactly_async(stream, wire.HEADER_BYTES)
                size = wire.body_size(header, limit_bytes=wire.MAX_REPLY_BYTES)
                body = await _receive_exactly_async(stream, size)
        reply = wire.parse_reply(body)
    except trio.TooSlowError as error:
        raise DeadlineExceeded(
            _ITEM, "it answers in time", expected=f"at most {timeout_s} s"
        ) from error
    except (OSError, ValueError, trio.BrokenResourceError) as error:
        raise _unanswered(path, error) from error
    return _accepted(reply)


async def _receive_exactly_async(stream: trio.SocketStream, size: int) -> bytes:
    received = bytearray()
    while len(received) < size:
        chunk = await stream.receive_some(size - len(received))
        if not chunk:
            raise ConnectionError("the answer ended early")
        received += chunk
    return bytes(received)


def _unanswered(path: Path, error: Exception) -> RuntimeFailed:
    return RuntimeFailed(
        _ITEM,
        f"must answer at {path} (`acon sim run` starts one)",
        actual=f"{type(error).__name__}: {error}",
    )


def _accepted(reply: wire.Reply) -> wire.Reply:
    if isinstance(reply, wire.Failure):
        if reply.error == "EBUSY":
            raise Busy(_ITEM, reply.message)
        raise RuntimeFailed(_ITEM, reply.message, actual=reply.error)
    return reply


def _summary(reply: wire.Reply) -> str:
    if isinstance(reply, wire.Blob):
        return f"{len(reply.data)} bytes"
    return type(reply).__name__
