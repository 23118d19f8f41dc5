"""`python -m benchmarks [NAME ...] [--json FILE]`, from the root of the checkout.

With all benchmarks (no NAME) the page `docs/performance.md` is written anew.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import structlog

from benchmarks import (
    admission,
    daemon_start,
    exit_to_event,
    hook_calls,
    idle,
    image_index,
    image_memory,
    image_sources,
    image_transfers,
    invoke,
    measuring,
    report,
    starts,
    verifying,
)
from benchmarks.figures import CannotMeasure, Section

PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"

BENCHMARKS: dict[str, Callable[[], Section]] = {
    "hook_calls": hook_calls.run,
    "admission": admission.run,
    "starts": starts.run,
    "invoke": invoke.run,
    "idle": idle.run,
    "exit_to_event": exit_to_event.run,
    "daemon_start": daemon_start.run,
    "verifying": verifying.run,
    "measuring": measuring.run,
    "image_sources": image_sources.run,
    "image_transfers": image_transfers.run,
    "image_memory": image_memory.run,
    "image_index": image_index.run,
}


def main(
    arguments: Sequence[str] | None = None,
    *,
    benchmarks: Mapping[str, Callable[[], Section]] = BENCHMARKS,
    page: Path = PAGE,
) -> int:
    """Returns 0 when everything ran, whatever the figures; 1 if something could not run."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(benchmarks))
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in benchmarks]
    if unknown:
        parser.error(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(benchmarks)}")
    # What the parts say while they work is not what a benchmark is read for.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    logging.getLogger("plugins").setLevel(logging.ERROR)
    machine = report.describe_machine()
    sections, complete = [], True
    for name in options.names or benchmarks:
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            section = benchmarks[name]()
        except CannotMeasure as error:
            section = Section(name=name, title=name, method="", figures=(), left_out=(str(error),))
            complete = False
        sections.append(section)
        _print(section)
    if options.json is not None:
        document = {"machine": machine, "sections": sections}
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(document)) + b"\n")
    if not options.names:
        page.parent.mkdir(exist_ok=True)
        page.write_text(report.render(sections, machine, datetime.now(UTC)))
        print(f"written: {page.name}")
    return 0 if complete else 1


def _print(section: Section) -> None:
    for figure in section.figures:
        line = f"  {figure.name:44} {report.number(figure.value):>8} {figure.unit}"
        if figure.goal is not None:
            line += f"   ({'met' if figure.is_met else 'MISSED'}: {report.goal_words(figure)})"
        print(line)
    for reason in section.left_out:
        print(f"  left out: {reason}")
    sys.stdout.flush()


def _interrupt(_signum: int, _frame: object) -> None:
    """SIGTERM cleans up as Ctrl-C does. Not raised here: trio knows where Ctrl-C may strike."""
    signal.raise_signal(signal.SIGINT)


if __name__ == "__main__":
    # A shell's background job ignores SIGINT, and then trio would not look after it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _interrupt)
    code = 130
    try:
        code = main()
    except* KeyboardInterrupt:  # a group where a nursery was interrupted
        print("interrupted", file=sys.stderr)
    sys.exit(code)
