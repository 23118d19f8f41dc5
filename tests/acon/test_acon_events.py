"""`acon events` against the real HTTP server, told by the supervisor's own events."""

from __future__ import annotations

import re
import signal
import subprocess
import sys

import pytest
import trio
from acon_daemon import Daemon, lines_of
from http_fakes import IMAGE_ID

from supervisor import ContainerExited, ContainerStarted, ImageAdmitted, LoadRefused, Sealed

STARTED = ContainerStarted(container_id=1, image_id=IMAGE_ID, pid=77, restarts=0)
EXITED = ContainerExited(
    container_id=1, image_id=IMAGE_ID, exit_code=3, signal=None, out_of_memory=False
)
SHORT = f"sha384/{'a' * 12}../{'b' * 12}.."


async def test_each_event_is_a_line_with_its_time(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    for event in (STARTED, EXITED, Sealed()):
        await daemon.operations.report(event)
    assert await daemon.acon("events") == 0
    started, exited, sealed = capsys.readouterr().out.splitlines()
    time = r"[0-9-]{10}T[0-9:]{8}\.[0-9]{6}Z"
    fields = f"container_id=1 image_id={re.escape(SHORT)} pid=77 restarts=0"
    assert re.fullmatch(f"{time}  container.started +{fields}", started)
    # What is not there is not shown.
    assert exited.endswith(f"container_id=1 image_id={SHORT} exit_code=3 out_of_memory=false")
    assert re.fullmatch(f"{time}  sealed", sealed)


async def test_what_strangers_wrote_stays_on_its_line(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "no\n2026-01-01T00:00:00Z  sealed\x1b[2J"
    await daemon.operations.report(LoadRefused(item="a b", rule="r", message=words))
    await daemon.operations.report(ImageAdmitted(image_ids=("x,y", "z")))
    assert await daemon.acon("events") == 0
    refused, admitted = capsys.readouterr().out.splitlines()
    assert 'item="a b" rule=r message="no\\n2026-01-01T00:00:00Z  sealed\\u001b[2J"' in refused
    assert admitted.endswith('image_ids=["x,y", "z"]')


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        (("container",), ["container.started", "container.exited"]),
        (("container.exited",), ["container.exited"]),
        (("container.exited", "sealed"), ["container.exited", "sealed"]),
        (("cont",), []),
    ],
)
async def test_events_can_be_chosen_by_type_and_by_kind(
    daemon: Daemon,
    types: tuple[str, ...],
    expected: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    for event in (STARTED, EXITED, Sealed()):
        await daemon.operations.report(event)
    options = [word for one in types for word in ("--type", one)]
    assert await daemon.acon("events", *options) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == expected


async def test_json_has_whole_values_one_object_a_line(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    await daemon.operations.report(STARTED)
    assert await daemon.acon("events", "--json") == 0
    (only,) = lines_of(capsys.readouterr().out)
    assert only["number"] == 1
    assert only["event"] == {
        "type": "container.started",
        "container_id": 1,
        "image_id": IMAGE_ID,
        "pid": 77,
        "restarts": 0,
    }


async def test_it_is_said_how_many_events_are_lost(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2000):
        await daemon.operations.report(STARTED)
    assert await daemon.acon("events") == 0
    out, err = capsys.readouterr()
    assert err == f"acon: {2000 - len(out.splitlines())} events are no longer kept\n"
    assert await daemon.acon("events", "--json") == 0
    assert "lost_events" in lines_of(capsys.readouterr().out)[0]


async def test_events_are_followed_until_ctrl_c(daemon: Daemon) -> None:
    await daemon.operations.report(STARTED)
    command = [sys.executable, "-m", "acon.cli", "events", "-f", "--socket", str(daemon.socket)]
    process = await trio.lowlevel.open_process(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    async with process.stdout, process.stderr:
        with trio.fail_after(60):
            assert b"container.started" in await process.stdout.receive_some(1000)
            await daemon.operations.report(EXITED)
            assert b"container.exited" in await process.stdout.receive_some(1000)
            process.send_signal(signal.SIGINT)
            assert await process.wait() == 130
            assert await process.stderr.receive_some(100) == b""
