"""The measurement journal: what was extended, and what must survive a crash to prove it.

A file in the TD's RAM that lives exactly as long as the registers do. Each entry is
one log record with the signed manifests that it admits, framed so that a torn tail
is recognised. Append-only; the last entry alone may be dropped, when it turns out
that it was never extended. Synchronous: called in the measuring thread only.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import msgspec

from supervisor.errors import Conflict, MeasurementHalted, RuntimeFailed

MAGIC = b"ACONJ001"
# u32 payload length, then the first 8 bytes of the payload's SHA-384.
_FRAME = struct.Struct("<I8s")
MAX_ENTRY_BYTES = 64 * 1024 * 1024


class Attachment(msgspec.Struct, frozen=True, array_like=True):
    """One admitted image as its owner signed it; evidence needs these bytes again."""

    manifest: bytes
    signature: bytes
    certificate_der: bytes


class JournalEntry(msgspec.Struct, frozen=True, array_like=True):
    """`record` is the raw AAEL record (`supervisor.formats.event_log`)."""

    record: bytes
    attachments: tuple[Attachment, ...] = ()


class Journal:
    """One writer, held by a lock on the file, until `close`."""

    def __init__(self, path: Path, descriptor: int, entries: list[JournalEntry]) -> None:
        self._path = path
        self._descriptor = descriptor
        self._ends = [len(MAGIC)]
        self.entries = entries

    @classmethod
    def open(cls, path: Path) -> Journal:
        """Open or create, lock, and read all whole entries; a torn tail is cut off.

        A torn tail was never extended: the extension follows the complete append.
        Raises `Conflict` if another supervisor holds the journal, `MeasurementHalted` if
        the file is not a journal, `RuntimeFailed` on input or output errors.
        """
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise RuntimeFailed(str(path), "the journal must be writable", actual=error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            journal = cls(path, descriptor, [])
            journal._load()
        except BlockingIOError as error:
            os.close(descriptor)
            raise Conflict(str(path), "another supervisor holds the journal") from error
        except OSError as error:
            os.close(descriptor)
            raise RuntimeFailed(str(path), "the journal must be readable", actual=error) from error
        except BaseException:
            os.close(descriptor)
            raise
        return journal

    def _load(self) -> None:
        data = bytearray()
        while chunk := os.pread(self._descriptor, 1 << 20, len(data)):
            data += chunk
        if data[: len(MAGIC)] != MAGIC:
            if not MAGIC.startswith(data):
                raise MeasurementHalted(str(self._path), "is no measurement journal")
            os.ftruncate(self._descriptor, 0)
            self._write_all(MAGIC, 0)
            return
        offset = len(MAGIC)
        while entry := _read_entry(data, offset):
            self.entries.append(entry[0])
            offset = entry[1]
            self._ends.append(offset)
        if offset != len(data):
            if _claimed_end(data, offset) < len(data):
                # An append is cut off at its end; this is damage, and what follows is evidence.
                raise MeasurementHalted(
                    str(self._path), "is damaged before its end", actual=f"byte {offset}"
                )
            os.ftruncate(self._descriptor, offset)

    @property
    def size_bytes(self) -> int:
        return self._ends[-1]

    def append(self, entry: JournalEntry) -> None:
        """Add a whole entry or nothing.

        Raises `RuntimeFailed` when nothing was added (no space, read-only), and
        `MeasurementHalted` when even that is not certain.
        """
        payload = msgspec.msgpack.encode(entry)
        if len(payload) > MAX_ENTRY_BYTES:
            raise RuntimeFailed(
                str(self._path),
                "takes entries of a bounded size",
                expected=f"at most {MAX_ENTRY_BYTES} bytes",
                actual=len(payload),
            )
        frame = _FRAME.pack(len(payload), hashlib.sha384(payload).digest()[:8]) + payload
        start = self._ends[-1]
        try:
            if not os.path.samestat(os.stat(self._path), os.fstat(self._descriptor)):
                raise OSError(errno.ESTALE, "another file lies at its path")
            self._write_all(frame, start)
        except OSError as error:
            try:
                os.ftruncate(self._descriptor, start)
            except OSError as second:
                raise MeasurementHalted(
                    str(self._path), "a half-written entry could not be removed", actual=second
                ) from error
            raise RuntimeFailed(str(self._path), "cannot be written", actual=error) from error
        self.entries.append(entry)
        self._ends.append(start + len(frame))

    def drop_last(self) -> None:
        """Remove the last entry, which was never extended. Raises `RuntimeFailed`."""
        try:
            os.ftruncate(self._descriptor, self._ends[-2])
        except OSError as error:
            raise RuntimeFailed(str(self._path), "cannot be written", actual=error) from error
        self._ends.pop()
        self.entries.pop()

    def put_aside(self) -> Path:
        """Keep an old boot's entries under another name and begin anew; returns that name."""
        for number in range(1, 10_000):
            aside = self._path.with_name(f"{self._path.name}.old-{number}")
            try:
                with open(aside, "xb", opener=_private) as copy:
                    offset = 0
                    while chunk := os.pread(self._descriptor, 1 << 20, offset):
                        copy.write(chunk)
                        offset += len(chunk)
                os.ftruncate(self._descriptor, len(MAGIC))
            except FileExistsError:
                continue
            except OSError as error:
                raise RuntimeFailed(str(aside), "cannot be written", actual=error) from error
            self.entries.clear()
            self._ends = [len(MAGIC)]
            return aside
        raise RuntimeFailed(str(self._path), "too many old journals lie beside it")

    def close(self) -> None:
        """Release the lock. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _write_all(self, data: bytes, offset: int) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._descriptor, view, offset)
            offset += written
            view = view[written:]


def _claimed_end(data: bytearray, offset: int) -> int:
    """Where the entry at `offset` says that it ends."""
    if offset + _FRAME.size > len(data):
        return len(data)
    length: int = _FRAME.unpack_from(data, offset)[0]
    return offset + _FRAME.size + length


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _read_entry(data: bytearray, offset: int) -> tuple[JournalEntry, int] | None:
    if offset + _FRAME.size > len(data):
        return None
    length, check = _FRAME.unpack_from(data, offset)
    start, end = offset + _FRAME.size, offset + _FRAME.size + length
    if length > MAX_ENTRY_BYTES or end > len(data):
        return None
    payload = bytes(data[start:end])
    if hashlib.sha384(payload).digest()[:8] != check:
        return None
    try:
        return msgspec.msgpack.decode(payload, type=JournalEntry), end
    except msgspec.DecodeError:
        return None


def attachments_of(entries: Sequence[JournalEntry]) -> tuple[Attachment, ...]:
    """The admitted images of a log prefix, in order."""
    return tuple(attachment for entry in entries for attachment in entry.attachments)
