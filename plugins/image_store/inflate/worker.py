"""The program that decompresses: from standard input to standard output, and nothing else.

Started by `process`; knows only the standard library, this folder and one decompressor.
"""

from __future__ import annotations

import importlib
import os

from plugins.image_store.inflate.confinement import confine
from plugins.image_store.inflate.damage import StreamDamaged

# Importing `typing` takes longer than all that this process does to start; type checkers
# take any constant of this name for true.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import NoReturn

# Each is only imported when it is needed: it costs as long as all the rest.
DECODERS = {"gzip": ("gzip_members", "gunzip"), "zstd": ("zstd_frames", "unzstd")}
LIBRARIES = {"gzip": "isal", "zstd": "zstandard"}
READ_BYTES = 256 * 1024
# The longest line on standard error, in bytes.
MAX_WORDS = 400

DAMAGED = 3
UNCONFINED = 4
OUT_OF_MEMORY = 5
UNHEARD = 6
FAILED = 7

STDIN, STDOUT, STDERR = 0, 1, 2


def main(compression: str) -> NoReturn:
    """Confine this process, then decompress to the end. Exits with a status of the above.

    `os._exit` throughout: the interpreter's own way out makes system calls that the
    filter kills.
    """
    decode = _decoder(compression)
    try:
        confine()
    except OSError as error:
        _leave(UNCONFINED, f"{error.filename or ''}\t{error.strerror}")
    try:
        for piece in decode(_chunks()):
            _write(piece)
    except StreamDamaged as damage:
        _leave(DAMAGED, f"{damage.rule}\t{damage.detail}")
    except MemoryError:
        _leave(OUT_OF_MEMORY, "")
    except BrokenPipeError:
        _leave(UNHEARD, "")
    except BaseException as error:
        _leave(FAILED, f"{type(error).__name__}\t{error}")
    os._exit(0)


def _decoder(compression: str) -> Callable[[Iterable[bytes]], Iterator[bytes]]:
    module, name = DECODERS[compression]
    decode: Callable[[Iterable[bytes]], Iterator[bytes]] = getattr(
        importlib.import_module(f"plugins.image_store.inflate.{module}"), name
    )
    return decode


def _chunks() -> Iterator[bytes]:
    while chunk := os.read(STDIN, READ_BYTES):
        yield chunk


def _write(piece: bytes) -> None:
    written_bytes = os.write(STDOUT, piece)
    while written_bytes < len(piece):
        written_bytes += os.write(STDOUT, memoryview(piece)[written_bytes:])


def _leave(status: int, words: str) -> NoReturn:
    line = words.encode("ascii", "replace")[:MAX_WORDS].replace(b"\n", b" ")
    try:
        os.write(STDERR, line)
    except OSError:
        status = FAILED
    os._exit(status)
