"""Blobs in files: of OCI layout directories, or as members of an archive.

The files belong to the operator, who is not trusted: no link is followed, nothing outside
the configured roots is opened, and what is read is only believed once digests were compared.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import PurePosixPath

import trio

from plugins.image_store.arrival.incoming import PIECE_BYTES
from plugins.image_store.mount.kernel import open_beneath
from supervisor import Denied, FileBlob, FormatError, RuntimeFailed, UnknownItem, Untrusted


@asynccontextmanager
async def open_file_blob(
    roots: Sequence[str], source: FileBlob
) -> AsyncIterator[AsyncIterator[bytes]]:
    """The blob's bytes as stored; the file is closed with the context.

    They end after `source.size_bytes`, or earlier if somebody shortens the file meanwhile.
    Raises `Denied` outside `roots`, `UnknownItem` for what is not there, `Untrusted` for
    what is no plain file or too short, and while reading `RuntimeFailed`.
    """
    opening = _Opening(roots, source)
    try:
        fd = await trio.to_thread.run_sync(opening.run, abandon_on_cancel=True)
        yield _Chunks(fd, source)
    finally:
        opening.close()


class _Opening:
    """Opens a file in a thread that may be given up: a disk can hang for ever."""

    def __init__(self, roots: Sequence[str], source: FileBlob) -> None:
        self._roots = roots
        self._source = source
        self._lock = threading.Lock()
        self._fd: int | None = None
        self._is_closed = False

    def run(self) -> int:
        """The descriptor, open until `close`. Blocking."""
        fd = _opened(self._roots, self._source)
        with self._lock:
            if not self._is_closed:
                self._fd = fd
                return fd
        # Nobody waits any more.
        os.close(fd)
        return -1

    def close(self) -> None:
        """Once. Also while `run` still hangs, which then closes what it opens."""
        with self._lock:
            self._is_closed = True
            if self._fd is not None:
                os.close(self._fd)


class _Chunks:
    """Reads one piece after the other, in threads that may be given up: a disk may hang.

    One that is given up before it reads may find another file under the number: what it
    gets then goes to nobody.
    """

    def __init__(self, fd: int, source: FileBlob) -> None:
        self._fd = fd
        self._source = source
        self._read_bytes = 0

    def __aiter__(self) -> _Chunks:
        return self

    async def __anext__(self) -> bytes:
        size_bytes = min(PIECE_BYTES, self._source.size_bytes - self._read_bytes)
        offset = self._source.offset_bytes + self._read_bytes
        try:
            chunk = await trio.to_thread.run_sync(
                os.pread, self._fd, size_bytes, offset, abandon_on_cancel=True
            )
        except OSError as error:
            raise RuntimeFailed(
                self._source.file, "the blob could not be read", actual=error
            ) from error
        if not chunk:
            raise StopAsyncIteration
        self._read_bytes += len(chunk)
        return chunk


def _opened(roots: Sequence[str], source: FileBlob) -> int:
    """A descriptor of the caller's. Blocking."""
    root, inside = _placed(roots, source.file)
    try:
        root_fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            place_fd = open_beneath(root_fd, os.fsencode(inside), os.O_PATH, cross_mounts=True)
        finally:
            os.close(root_fd)
    except OSError as error:
        raise UnknownItem(
            source.file,
            "the blob must be a plain file, reached through no link",
            expected=source.file,
            actual=error.strerror,
        ) from error
    try:
        # Judged before it is opened: what opening does to a device or a pipe is never done.
        _check_place(os.fstat(place_fd), source)
        # Nonblocking: somebody's lease on the file must not hold us up (fcntl(2)).
        return os.open(f"/proc/self/fd/{place_fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise RuntimeFailed(source.file, "the blob could not be opened", actual=error) from error
    finally:
        os.close(place_fd)


def _check_place(status: os.stat_result, source: FileBlob) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise Untrusted(source.file, "the blob must be a plain file")
    left_bytes = max(0, status.st_size - source.offset_bytes)
    # An archive begins with a header, so what begins at 0 is a file of its own.
    is_whole_file = source.offset_bytes == 0
    if source.size_bytes > left_bytes or (is_whole_file and source.size_bytes < left_bytes):
        raise Untrusted(
            source.file,
            "the blob must have the size that was given",
            expected=f"{source.size_bytes} bytes",
            actual=f"{left_bytes} bytes from {source.offset_bytes} on",
        )


def _placed(roots: Sequence[str], file: str) -> tuple[str, PurePosixPath]:
    """The configured root that `file` lies in, and the path from there."""
    path = PurePosixPath(file)
    if not path.is_absolute() or ".." in path.parts or "\0" in file:
        raise FormatError("file", "must be an absolute path without '..'", actual=file[:160])
    for root in roots:
        if path.is_relative_to(root):
            return root, path.relative_to(root)
    raise Denied(
        "file",
        "a blob is read only from the directories that the configuration names (file_roots)",
        expected=", ".join(roots) or "none configured",
        actual=file[:160],
    )
