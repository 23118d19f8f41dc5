"""Where results go: JSON or words on standard output, remarks on standard error."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

# Terminals obey control characters, and those that turn the direction of writing make a line
# look like another; names and messages may come from strangers.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code != 10}
_CONTROLS |= {
    code: f"\\u{code:04x}"
    for code in (0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A))
}


def printable(text: str) -> str:
    """`text` with control characters (but for line feeds) shown, not obeyed."""
    return text.translate(_CONTROLS)


def say(text: str) -> None:
    """A line for a person, on standard output."""
    sys.stdout.write(printable(text) + "\n")


def remark(text: str) -> None:
    """A line for a person beside the result, on standard error."""
    sys.stderr.write(printable(text) + "\n")


def write_json(value: object, *, lines: bool = False) -> None:
    """`value` on standard output, on one line if `lines`."""
    indent = None if lines else 2
    sys.stdout.write(json.dumps(value, indent=indent, ensure_ascii=True) + "\n")
    sys.stdout.flush()


def result(args: argparse.Namespace, value: object, text: str) -> None:
    """The outcome of a command: `value` with `--json`, else `text`."""
    if args.json:
        write_json(value)
    elif text:
        say(text)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell."""
    every = [tuple(headings), *(tuple(row) for row in rows)]
    widths = [max(len(row[column]) for row in every) for column in range(len(headings))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in every
    )


class Bar(Protocol):
    """How far one of several jobs is. May be moved from any thread."""

    def advance(self, count_bytes: int) -> None: ...

    def reach(self, done_bytes: int, total_bytes: int | None) -> None:
        """Where it stands now, for those who are told totals; it may fall back."""

    def end(self) -> None:
        """Take the bar away: its job is done, failed, or goes on as another. Idempotent."""


class Progress(Protocol):
    """Shows how far long jobs are, each with a bar of its own."""

    def begin(self, title: str, total_bytes: int | None) -> Bar: ...


class _Quiet:
    def begin(self, title: str, total_bytes: int | None) -> Bar:
        return self

    def advance(self, count_bytes: int) -> None:
        pass

    def reach(self, done_bytes: int, total_bytes: int | None) -> None:
        pass

    def end(self) -> None:
        pass


@contextmanager
def progress(args: argparse.Namespace) -> Iterator[Progress]:
    """Bars on a terminal; nothing where nobody looks (`--json`, a pipe, a log file)."""
    if args.json or not sys.stderr.isatty():
        yield _Quiet()
        return
    import rich.console
    import rich.progress

    shown = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(),
        rich.progress.DownloadColumn(),
        rich.progress.TransferSpeedColumn(),
        console=rich.console.Console(stderr=True),
        # Lines of the result stand above the bars on a terminal, and stay what they are in a pipe.
        redirect_stdout=sys.stdout.isatty(),
    )

    class OneBar:
        def __init__(self, task: rich.progress.TaskID) -> None:
            self._task = task
            self._ended = False

        def advance(self, count_bytes: int) -> None:
            if not self._ended:
                shown.advance(self._task, count_bytes)

        def reach(self, done_bytes: int, total_bytes: int | None) -> None:
            if not self._ended:
                shown.update(self._task, completed=done_bytes, total=total_bytes)

        def end(self) -> None:
            if not self._ended:
                self._ended = True
                shown.remove_task(self._task)

    class Bars:
        def begin(self, title: str, total_bytes: int | None) -> Bar:
            return OneBar(shown.add_task(printable(title), total=total_bytes))

    with shown:
        yield Bars()
