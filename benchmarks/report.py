"""The figures as a page: `docs/performance.md`."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime

import msgspec

from benchmarks.figures import Figure, Section

COMMAND = "./run bench"
_TIMEOUT_S = 10

_HEAD = """\
# Performance

Written by `{command}` on {date}; do not edit. `{command} NAME` repeats one section without
writing this page. No test asserts a speed: figures are those of one machine, and what
compares programs was measured in one run, in turn. Ratios carry over to other machines
better than times do.

The machine: {machine}.
"""


class MachineWords(msgspec.Struct, frozen=True, kw_only=True):
    """What a figure depends on, and nothing that tells whose machine it was."""

    cores: int
    architecture: str
    kernel: str
    python: str
    runc: str | None
    podman: str | None
    skopeo: str | None
    umoci: str | None
    load_at_start: float

    def __str__(self) -> str:
        tools = [
            f"{name} {version}"
            for name, version in (
                ("runc", self.runc),
                ("Podman", self.podman),
                ("skopeo", self.skopeo),
                ("umoci", self.umoci),
            )
            if version
        ]
        return ", ".join(
            [
                f"{self.cores} cores ({self.architecture})",
                self.kernel,
                f"Python {self.python}",
                *tools,
                f"load average {self.load_at_start:.1f} when it began",
            ]
        )


def describe_machine() -> MachineWords:
    release = re.match(r"[0-9.]+", platform.release())
    return MachineWords(
        cores=len(os.sched_getaffinity(0)),
        architecture=platform.machine(),
        kernel=f"Linux {release[0].rstrip('.')}" if release else "Linux",
        python=platform.python_version(),
        runc=_version("runc"),
        podman=_version("podman"),
        skopeo=_version("skopeo"),
        umoci=_version("umoci"),
        load_at_start=os.getloadavg()[0],
    )


def _version(program: str) -> str | None:
    """The first number with dots that it says, or None if it is not installed."""
    if shutil.which(program) is None:
        return None
    done = subprocess.run(
        [program, "--version"], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
    )
    found = re.search(r"\d+(\.\d+)+", done.stdout)
    return found[0] if found else None


def render(sections: Sequence[Section], machine: MachineWords, at: datetime) -> str:
    """The whole page, Markdown. `at` is aware."""
    date = at.astimezone(UTC).date().isoformat()
    parts = [_HEAD.format(command=COMMAND, date=date, machine=machine)]
    parts += [_section(section) for section in sections]
    return "\n".join(parts)


def _section(section: Section) -> str:
    lines = [f"## {section.title} (`{COMMAND} {section.name}`)", ""]
    if section.method:
        lines += [section.method, ""]
    if section.figures:
        lines += ["| | Measured | Goal | Met |", "|---|---:|---:|---|"]
        lines += [_row(figure) for figure in section.figures]
        lines.append("")
    lines += [f"Left out: {reason}\n" for reason in section.left_out]
    if section.conclusion:
        lines += [section.conclusion, ""]
    return "\n".join(lines)


def _row(figure: Figure) -> str:
    goal, met = "", ""
    if figure.goal is not None:
        goal = goal_words(figure)
        met = "yes" if figure.is_met else "**no**"
    return f"| {figure.name} | {number(figure.value)} {figure.unit} | {goal} | {met} |"


def goal_words(figure: Figure) -> str:
    """`at least 300 a second`; empty without a goal."""
    if figure.goal is None:
        return ""
    if figure.goal.at_least is not None:
        return f"at least {number(figure.goal.at_least)} {figure.unit}"
    return f"at most {number(figure.goal.at_most or 0.0)} {figure.unit}"


def number(value: float) -> str:
    """Three significant digits, thousands apart."""
    if value >= 100:
        digits = len(f"{value:.0f}")
        return f"{round(value, 3 - digits):,.0f}"
    return f"{value:.3g}"
