"""Where bytes go that a container wrote: as they are, unless a terminal would obey them."""

from __future__ import annotations

import sys
from typing import TextIO

from acon.output import printable


class ContainerOutput:
    """Standard output or standard error, for a stranger's bytes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.is_terminal = stream.isatty()

    def write(self, data: bytes) -> None:
        """On a terminal, control characters but for tabs and line feeds are shown, not obeyed."""
        if self.is_terminal:
            text = data.decode("utf-8", "backslashreplace")
            self._stream.write("\t".join(printable(part) for part in text.split("\t")))
        else:
            self._stream.flush()
            self._stream.buffer.write(data)

    def flush(self) -> None:
        self._stream.flush()


def standard_output() -> ContainerOutput:
    return ContainerOutput(sys.stdout)


def standard_error() -> ContainerOutput:
    return ContainerOutput(sys.stderr)
