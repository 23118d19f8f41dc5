"""Programs that look around, and reach out, from inside a real container."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from integration_images import ImageFile
from integration_machine import Machine, wait_until

from supervisor.operations import ContainerView

INSIDE = Path(__file__).resolve().parent / "inside"
FACTS = (INSIDE / "facts.sh").read_text()
# Waits for what to reach out for, then tries everything as the given user.
TRIES = """\
b=/bin/busybox
until $b test -e /tmp/targets; do $b sleep 1; done
{command} > /tmp/found.new 2>&1
$b mv /tmp/found.new /tmp/found
trap 'exit 0' TERM
while :; do $b sleep 1 & wait $!; done
"""


def compile_tries(folder: Path) -> Path:
    """The static helper `inside/tries.c`. Skips the test where it cannot be made."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("gcc, for a program that makes the system calls, is not installed")
    program = folder / "tries"
    options = ("-static", "-O1", "-Wall", "-Wextra", "-Werror", "-o")
    command = [compiler, *options, str(program), str(INSIDE / "tries.c")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


def set_user_id_files(tries: bytes) -> dict[str, ImageFile]:
    """The helper, and copies of it that change their user: root's, a mapped and an unmapped one."""
    return {
        "app/tries": ImageFile(tries),
        "app/as0": ImageFile(tries, mode=0o4755),
        "app/as33": ImageFile(tries, mode=0o4755, uid=33),
        "app/as77": ImageFile(tries, mode=0o4755, uid=77),
    }


def inside(pid: int, path: str) -> Path:
    """A container's file, as the machine's root finds it."""
    return Path(f"/proc/{pid}/root{path}")


@dataclass(frozen=True)
class Seen:
    """A running container, and what its first process saw when it started."""

    view: ContainerView
    facts: dict[str, str]

    @property
    def pid(self) -> int:
        assert self.view.pid is not None
        return self.view.pid

    def lines(self, name: str) -> list[str]:
        return self.facts[name].splitlines()

    def status(self, field: str) -> str:
        """Of /proc/1/status."""
        return dict(line.split(":", 1) for line in self.lines("status"))[field].strip()

    def namespaces(self) -> dict[str, str]:
        return dict(line.split() for line in self.lines("namespaces"))


def look_around(view: ContainerView) -> Seen:
    """Wait for what a container that runs FACTS has seen."""
    assert view.pid is not None
    folder = inside(view.pid, "/tmp/facts")
    wait_until(folder.is_dir, "a container that has looked around")
    return Seen(view, {file.name: file.read_text() for file in folder.iterdir()})


@dataclass(frozen=True)
class Try:
    """One line of `inside/tries.c`."""

    way: str
    what: str
    outcome: str


def tries_of(text: str) -> list[Try]:
    """All but the last line, which says that the program came to its end."""
    *lines, last = [Try(*line.split("\t")) for line in text.splitlines()]
    assert last == Try("done", "all", "done")
    return lines


def reach_out(machine: Machine, view: ContainerView, targets: str) -> list[Try]:
    """Have a container that runs TRIES try everything."""
    assert view.pid is not None
    waiting = inside(view.pid, "/tmp/targets.new")
    waiting.write_text(targets)
    waiting.chmod(0o644)
    waiting.rename(inside(view.pid, "/tmp/targets"))
    found = inside(view.pid, "/tmp/found")
    wait_until(found.exists, "a container that has tried everything")
    return tries_of(found.read_text())


def outcomes(tries: list[Try], *ways: str) -> Counter[str]:
    """How often each outcome came, of some ways."""
    return Counter(one.outcome for one in tries if one.way in ways)
