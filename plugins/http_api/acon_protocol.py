"""ACON's binary protocol on a container's socket, beside HTTP (intel/ACON: acond/src/ipc.rs,
sdk/include/acon_client.h; byte by byte in docs/formats.md).

One request and one answer, then the connection ends, as with ACON's daemon. Stricter than
that daemon: every size and number is checked, and what is wrong is answered with an errno.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

import msgspec
import trio

from plugins.http_api.faults import fault_without_words
from supervisor import (
    Busy,
    Conflict,
    DeadlineExceeded,
    Denied,
    MeasurementHalted,
    Refusal,
    RuntimeFailed,
    UnknownItem,
    Untrusted,
)
from supervisor.formats.base64_text import to_base64
from supervisor.formats.status import MAX_ATTESTATION_DATA_BYTES, AttestationData

if TYPE_CHECKING:
    import structlog

    from plugins.http_api.connections import BoundedStream, Connection
    from supervisor import AconReport, ContainerOperations

# C structures of a 64-bit little-endian machine, the compiler's padding spelt out.
_HEADER = struct.Struct("<iI")  # command, size of the whole message
_GET_REPORT = struct.Struct("<iIIxxxxQQixxxx")  # ..., type, nonce, kind of attestation data
_SET_DATA = struct.Struct("<iIi")  # ..., kind of attestation data
_REPORT = struct.Struct("<iIiii")  # ..., offsets of log, attestation data, TDREPORT or quote
_ERROR = struct.Struct("<iIi")  # ..., the request's command

GET_REPORT = 0
SET_ATTESTATION_DATA = 2
# Twice what a request with all of its data takes, for fixed buffers padded with NULs.
MAX_REQUEST_BYTES = 2 * (_GET_REPORT.size + MAX_ATTESTATION_DATA_BYTES)
_MAX_ANSWER_BYTES = (1 << 31) - 1  # its offsets are signed
_MAX_ERROR_TEXT_BYTES = 1024
_READ_DEADLINE_S = 15.0
_LINGER_S = 2.0
_LINGER_MAX_BYTES = 1 << 20
_NO_DATA = 0
_KIND_BY_TYPE = {1: "binary", 2: "text"}

# What C programs expect in errno.
_ERRNO_BY_CLASS: tuple[tuple[type[Refusal], int], ...] = (
    (Untrusted, errno.EINVAL),
    (Denied, errno.EACCES),
    (UnknownItem, errno.ENOENT),
    (DeadlineExceeded, errno.ETIMEDOUT),
    (Conflict, errno.ESRCH),
    (Busy, errno.EBUSY),
    (MeasurementHalted, errno.EIO),
)


class GetReport(msgspec.Struct, frozen=True, kw_only=True):
    """Command 0. `nonce` is 16 bytes in the order in which ACON's report shows it."""

    nonce: bytes
    want_quote: bool
    data: AttestationData | None


class SetAttestationData(msgspec.Struct, frozen=True, kw_only=True):
    """Command 2. Without data: what was set is forgotten."""

    data: AttestationData | None


class ProtocolError(Exception):
    """A request that this protocol does not have; `number` is an errno."""

    def __init__(self, number: int, rule: str) -> None:
        super().__init__(rule)
        self.number = number


def parse_size(header: bytes) -> int:
    """How long the whole message is, from its first 8 bytes. Raises `ProtocolError`."""
    size: int = _HEADER.unpack(header)[1]
    if size < _HEADER.size:
        raise ProtocolError(errno.EINVAL, "the size of a message counts its header")
    if size > MAX_REQUEST_BYTES:
        raise ProtocolError(errno.EMSGSIZE, f"a request has at most {MAX_REQUEST_BYTES} bytes")
    return size


def parse_request(message: bytes) -> GetReport | SetAttestationData:
    """A whole message, of the size that it says. Raises `ProtocolError`."""
    command: int = _HEADER.unpack_from(message)[0]
    if command == GET_REPORT:
        _, _, report_type, first, second, data_type = _unpack(_GET_REPORT, message)
        if report_type not in (0, 1):
            raise ProtocolError(errno.EINVAL, "a report's type is 0 (TDREPORT) or 1 (quote)")
        return GetReport(
            # ACON takes the first number for the higher half, and writes the lower half first.
            nonce=second.to_bytes(8, "little") + first.to_bytes(8, "little"),
            want_quote=report_type == 1,
            data=_attestation_data(data_type, message[_GET_REPORT.size :]),
        )
    if command == SET_ATTESTATION_DATA:
        _, _, data_type = _unpack(_SET_DATA, message)
        return SetAttestationData(data=_attestation_data(data_type, message[_SET_DATA.size :]))
    raise ProtocolError(errno.ENOSYS, "there are the commands 0 (report) and 2 (attestation data)")


def _unpack(layout: struct.Struct, message: bytes) -> tuple[int, ...]:
    if len(message) < layout.size:
        raise ProtocolError(errno.EINVAL, f"this request has at least {layout.size} bytes")
    return layout.unpack_from(message)


def _attestation_data(data_type: int, raw: bytes) -> AttestationData | None:
    """What stands behind the structure. A C string's end is no part of a text."""
    if data_type == _NO_DATA:
        if raw.strip(b"\0"):
            raise ProtocolError(errno.EINVAL, "there is data of type 0, which means none")
        return None
    kind = _KIND_BY_TYPE.get(data_type)
    if kind is None:
        raise ProtocolError(errno.EINVAL, "data is of type 0 (none), 1 (binary) or 2 (text)")
    said = raw.rstrip(b"\0") if kind == "text" else raw
    if len(said) > MAX_ATTESTATION_DATA_BYTES:
        raise ProtocolError(
            errno.EMSGSIZE, f"attestation data has at most {MAX_ATTESTATION_DATA_BYTES} bytes"
        )
    return AttestationData(kind=kind, data=to_base64(said))


def report_answer(report: AconReport) -> bytes:
    """Log, attestation data's JSON, and TDREPORT or quote, one behind the other. Raises
    `ProtocolError` if the protocol's numbers cannot hold its size.

    The log is the lines of all registers, each with a NUL behind it, those of one register
    behind an empty line for every register before it.
    """
    lines = "".join(f"{line}\0" for line in report.log_lines)
    log = b"\0" * report.rtmr_index + lines.encode()
    text = report.attestation_data.encode()
    text_at = _REPORT.size + len(log)
    data_at = text_at + len(text)
    size = data_at + len(report.data)
    if size > _MAX_ANSWER_BYTES:
        raise ProtocolError(errno.EOVERFLOW, "the report is too large for this protocol")
    head = _REPORT.pack(GET_REPORT + 1, size, _REPORT.size, text_at, data_at)
    return b"".join((head, log, text, report.data))


def error_answer(command: int, number: int, text: str) -> bytes:
    """`number` is a (positive) errno; `text` is for people."""
    said = text.encode()[:_MAX_ERROR_TEXT_BYTES]
    return _ERROR.pack(-number, _ERROR.size + len(said), command) + said


class AconProtocol:
    """The protocol for one container, any number of connections."""

    def __init__(
        self,
        operations: ContainerOperations,
        *,
        log: structlog.stdlib.BoundLogger,
        deadline_s: float,
    ) -> None:
        self._operations = operations
        self._log = log
        self._deadline_s = deadline_s

    async def converse(self, stream: BoundedStream, connection: Connection) -> None:
        """Read one request and answer it. The caller closes `stream`.

        Raises what sending raises when the peer has gone; refusals are answered.
        """
        command = 0
        unread = True
        try:
            header = await _read(stream, _HEADER.size, before=b"")
            command = _HEADER.unpack(header)[0]
            if connection.refusal is not None:
                raise connection.refusal
            message = await _read(stream, parse_size(header), before=header)
            unread = False
            with trio.move_on_after(self._deadline_s) as limit:
                answer = await self._answer(parse_request(message))
            if limit.cancelled_caught:
                raise ProtocolError(errno.ETIMEDOUT, "must be done in the time requests have")
        except ProtocolError as error:
            answer = error_answer(command, error.number, str(error))
        except Refusal as refusal:
            answer = error_answer(command, _errno_of(refusal), str(refusal))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return  # nobody is there to be answered
        except Exception as error:
            self._log.error("request failed", fault=fault_without_words(error))
            failed = RuntimeFailed("request", "the daemon failed inside; its log says how")
            answer = error_answer(command, _errno_of(failed), str(failed))
        await stream.send_all(answer)
        if unread:
            await _linger(stream)

    async def _answer(self, request: GetReport | SetAttestationData) -> bytes:
        if isinstance(request, SetAttestationData):
            self._operations.set_attestation_data(request.data)
            return _HEADER.pack(SET_ATTESTATION_DATA + 1, _HEADER.size)
        report = await self._operations.acon_report(
            request.nonce, request.data, want_quote=request.want_quote
        )
        return report_answer(report)


async def _read(stream: BoundedStream, size_bytes: int, *, before: bytes) -> bytes:
    """`before` and what follows it, `size_bytes` together. Raises `ProtocolError`."""
    message = bytearray(before)
    with trio.move_on_after(_READ_DEADLINE_S):
        while len(message) < size_bytes:
            chunk = await stream.receive_some(size_bytes - len(message))
            if not chunk:
                raise ProtocolError(errno.EINVAL, "the request ended before its size was reached")
            message += chunk
        return bytes(message)
    raise ProtocolError(errno.ETIMEDOUT, "the request did not come in time")


async def _linger(stream: BoundedStream) -> None:
    """Throw away what still comes, for a moment: else a peer that is writing would get a
    broken pipe instead of its answer."""
    thrown_away = 0
    with trio.move_on_after(_LINGER_S):
        await stream.send_eof()
        while thrown_away < _LINGER_MAX_BYTES and (chunk := await stream.receive_some(65536)):
            thrown_away += len(chunk)


def _errno_of(refusal: Refusal) -> int:
    numbers = (number for kind, number in _ERRNO_BY_CLASS if isinstance(refusal, kind))
    return next(numbers, errno.EIO)
