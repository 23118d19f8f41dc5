"""How `acon logs` shows lines: as they were written, each to where it belongs, or as JSON."""

from __future__ import annotations

import base64

from acon.container_client import Lost, Output, OutputLine
from acon.container_output import ContainerOutput, standard_error, standard_output
from acon.output import remark, write_json
from acon.times import rfc3339

_STDOUT = 1


class LogReport:
    """One command's. `end` must follow, also after a failure."""

    def __init__(self, *, as_json: bool, timestamps: bool) -> None:
        self._as_json = as_json
        self._timestamps = timestamps
        outputs = standard_output(), standard_error()
        self._streams = tuple(_Stream(output) for output in outputs)
        self._share_a_terminal = all(output.is_terminal for output in outputs)

    def tell(self, entry: Output) -> None:
        """Whoever reads a pipe sees it at once."""
        if self._as_json:
            write_json(_facts(entry), lines=True)
        elif isinstance(entry, Lost):
            self.end()
            remark(f"acon: {entry.count} lines are no longer kept")
        else:
            stream, other = self._streams if entry.fd == _STDOUT else self._streams[::-1]
            if self._share_a_terminal:
                other.end()
            stream.tell(entry, f"{rfc3339(entry.time)} " if self._timestamps else "")

    def end(self) -> None:
        """End a line that is cut, where nothing continues it."""
        for stream in self._streams:
            stream.end()


class _Stream:
    """Puts cut lines together again, as long as no other descriptor's comes between them."""

    def __init__(self, output: ContainerOutput) -> None:
        self._output = output
        self._open_fd: int | None = None

    def tell(self, line: OutputLine, prefix: str) -> None:
        if self._open_fd != line.fd:
            self.end()
            self._output.write(prefix.encode())
        self._output.write(line.data + (b"" if line.cut else b"\n"))
        self._output.flush()
        self._open_fd = line.fd if line.cut else None

    def end(self) -> None:
        if self._open_fd is not None:
            self._open_fd = None
            self._output.write(b"\n")
            self._output.flush()


def _facts(entry: Output) -> dict[str, object]:
    if isinstance(entry, Lost):
        return {"lost_lines": entry.count}
    facts: dict[str, object] = {"number": entry.number, "time": rfc3339(entry.time), "fd": entry.fd}
    try:
        facts["text"] = entry.data.decode()
    except UnicodeDecodeError:
        facts["bytes"] = base64.b64encode(entry.data).decode()
    return facts | {"cut": entry.cut}
