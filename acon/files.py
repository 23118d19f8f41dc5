"""Reading with a bound, writing whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from acon.errors import UsageError


def read_bounded(path: Path, *, max_bytes: int) -> bytes:
    """The file's bytes. Raises `UsageError` when it is larger than `max_bytes`, else `OSError`."""
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise UsageError(
            str(path), "the file is too large", expected=f"at most {max_bytes} bytes", actual="more"
        )
    return data


def write_whole(path: Path, data: bytes) -> None:
    """Replace `path` by a file that holds `data`, so that no reader ever sees half of it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            # mkstemp makes 0600; what is written here is public and read by other users.
            umask = os.umask(0)
            os.umask(umask)
            os.fchmod(file.fileno(), 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
