"""`acon ps`, and how containers are meant by their images, against the real HTTP server."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from acon_daemon import Daemon
from http_fakes import IMAGE_ID

from supervisor import ImageView

SIGNER = IMAGE_ID.rpartition("/")[0]


def named(*names: str, image_id: str = IMAGE_ID) -> ImageView:
    return ImageView(image_id=image_id, names=names, executable=True, missing_layers=())


def since(daemon: Daemon, passed: timedelta) -> None:
    at = (datetime.now(UTC) - passed).isoformat().replace("+00:00", "Z")
    daemon.operations.known = tuple(
        msgspec.structs.replace(one, since=at) for one in daemon.operations.known
    )


async def test_a_table_shows_names_states_times_and_sizes_as_people_say_them(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.operations.more_images = (named("gateway:1", "gateway:2"),)
    since(daemon, timedelta(minutes=3, seconds=20))
    assert await daemon.acon("ps") == 0
    headings, running, ended, killed = capsys.readouterr().out.splitlines()
    assert headings.split()[:4] == ["ID", "IMAGE", "SIGNER", "STATE"]
    assert headings.split()[4:] == ["SINCE", "RESTARTS", "PID", "MEMORY"]
    cells = [cell.strip() for cell in running.split("  ") if cell]
    signer = "a" * 12
    expected = ["1", "gateway:1", signer, "running", "3 minutes ago", "2", "77", "4 kB"]
    assert cells == expected
    assert "exited with 3" in ended
    assert "killed by SIGKILL" in killed
    assert killed.split()[-2:] == ["-", "-"]


async def test_an_image_without_a_name_is_shown_by_what_start_takes(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.operations.more_images = (named(),)
    assert await daemon.acon("ps") == 0
    shown = capsys.readouterr().out.splitlines()[1].split()[1]
    assert shown == "b" * 12
    assert await daemon.acon("start", shown) == 0
    assert daemon.operations.starts == [(IMAGE_ID, ())]


async def test_nothing_is_cut_when_asked(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    for option in ("--no-trunc", "--long"):
        assert await daemon.acon("ps", option) == 0
        row = capsys.readouterr().out.splitlines()[1].split()
        assert row == ["1", IMAGE_ID, SIGNER, "running", "2026-01-02T03:04:05Z", "2", "77", "4096"]


async def test_json_has_whole_values(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.operations.more_images = (named("gateway:1"),)
    assert await daemon.acon("ps", "--json") == 0
    first, second, _ = json.loads(capsys.readouterr().out)["containers"]
    assert first["image_id"] == IMAGE_ID
    assert first["image_names"] == ["gateway:1"]
    assert first["signer"] == SIGNER
    assert (first["since"], first["restarts"]) == ("2026-01-02T03:04:05Z", 2)
    assert (first["memory_bytes"], second["memory_bytes"]) == (4096, None)
    assert second["exit_code"] == 3


async def test_quiet_prints_numbers_alone_and_asks_for_no_memory(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await daemon.acon("ps", "-q") == 0
    assert capsys.readouterr().out == "1\n2\n3\n"
    assert daemon.operations.memory_asked == 0


async def test_no_containers_are_said_to_be_none(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.operations.known = ()
    assert await daemon.acon("ps") == 0
    assert capsys.readouterr().out == "no containers\n"
    assert await daemon.acon("ps", "-q") == 0
    assert capsys.readouterr().out == ""


async def test_an_end_for_want_of_memory_is_said(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = msgspec.structs.replace(daemon.operations.known[2], out_of_memory=True)
    daemon.operations.known = (killed,)
    assert await daemon.acon("ps") == 0
    assert "killed by SIGKILL, out of memory" in capsys.readouterr().out


# --- which container is meant ---------------------------------------------------------------


def containers(daemon: Daemon, *states: str) -> None:
    """Containers 1, 2, ... of one image, in these states."""
    like = daemon.operations.known[0]
    daemon.operations.known = tuple(
        msgspec.structs.replace(like, container_id=number, state=state)
        for number, state in enumerate(states, 1)
    )
    daemon.operations.more_images = (named("gateway:1"),)


@pytest.mark.parametrize(
    ("states", "meant"),
    [
        (("running",), 1),
        (("exited", "running", "exited"), 2),
        (("exited",), 1),
        (("starting", "exited"), 1),
    ],
)
async def test_an_image_stands_for_its_only_container(
    daemon: Daemon, states: tuple[str, ...], meant: int
) -> None:
    containers(daemon, *states)
    for text in ("gateway", "gateway:1", "b" * 12, f"{SIGNER}/{'b' * 12}.."):
        assert await daemon.acon("signal", text, "TERM") == 0
    assert daemon.operations.signals == [(meant, 15)] * 4


@pytest.mark.parametrize(
    ("states", "code", "words"),
    [
        (("running", "exited", "running"), 2, "containers 1, 3"),
        (("exited", "exited"), 2, "containers 1, 2"),
        ((), 1, "no container of this image"),
    ],
)
async def test_an_image_with_other_than_one_container_stands_for_none(
    daemon: Daemon,
    states: tuple[str, ...],
    code: int,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    containers(daemon, *states)
    assert await daemon.acon("signal", "gateway", "TERM") == code
    assert words in capsys.readouterr().err
    assert daemon.operations.signals == []


async def test_an_image_that_nobody_knows_is_no_container(daemon: Daemon) -> None:
    containers(daemon, "running")
    assert await daemon.acon("restart", "other") == 1
    assert daemon.operations.restarts == []
