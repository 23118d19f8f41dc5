"""`acon logs` against the real HTTP server and the real log of a container."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
import trio
from acon_daemon import Daemon, lines_of
from http_fakes import LOG_BYTES

from supervisor.container_log import ContainerLog

STAMP = r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8}\.[0-9]{6}Z "


def log_of(daemon: Daemon, *writes: tuple[int, bytes], ended: bool = True) -> ContainerLog:
    """Container 1 wrote this."""
    log = daemon.operations.logs[1]
    for fd, data in writes:
        log.write(fd, data)
    if ended:
        log.end_run()
    return log


async def test_descriptor_1_goes_to_standard_output_and_others_to_standard_error(
    daemon: Daemon, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    log_of(daemon, (1, b"out\n\x1b[m\xff\n"), (2, b"err\n"), (5, b"five\n"), (1, b"rest"))
    assert await daemon.acon("logs", "1") == 0
    out, err = capfdbinary.readouterr()
    assert out == b"out\n\x1b[m\xff\nrest\n"
    assert err == b"err\nfive\n"


async def test_a_terminal_is_not_made_to_obey_the_container(
    daemon: Daemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    log_of(
        daemon, (1, b"\x1b[2J\tok\r\n\xc2\x9b\xff\n"), (2, "\x07ä\u202egnp.exe\u2028\n".encode())
    )
    assert await daemon.acon("logs", "1") == 0
    out, err = capsys.readouterr()
    assert out == "\\x1b[2J\tok\\x0d\n\\x9b\\xff\n"
    assert err == "\\x07ä\\u202egnp.exe\\u2028\n"


async def test_only_the_descriptors_that_were_asked_for_are_shown(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    log_of(daemon, (1, b"one\n"), (2, b"two\n"), (5, b"five\n"))
    assert await daemon.acon("logs", "1", "--fd", "5", "--fd", "1") == 0
    assert capsys.readouterr() == ("one\n", "five\n")
    assert await daemon.acon("logs", "1", "--stderr") == 0
    assert capsys.readouterr() == ("", "two\n")


async def test_the_last_lines_are_those_of_what_was_asked_for(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    log_of(daemon, (1, b"1\n2\n3\n"), (2, b"4\n5\n"))
    for tail, expected in (("2", "2\n3\n"), ("9", "1\n2\n3\n"), ("0", "")):
        assert await daemon.acon("logs", "1", "--fd", "1", "--tail", tail) == 0
        assert capsys.readouterr().out == expected


async def test_times_begin_lines_and_not_what_continues_them(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    text = b"x" * (LOG_BYTES // 4 + 1)
    log_of(daemon, (1, text + b"\nend\n"))
    assert await daemon.acon("logs", "1", "-t") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert re.fullmatch(f"{STAMP}x{{{len(text)}}}", first)
    assert re.fullmatch(f"{STAMP}end", second)


async def test_a_cut_line_is_ended_where_nothing_continues_it(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    text = b"x" * (LOG_BYTES // 4 + 1)
    log_of(daemon, (1, text), (5, text), (1, b"more\n"), ended=False)
    assert await daemon.acon("logs", "1", "--tail", "1") == 0
    out, err = capsys.readouterr()
    assert out == "xmore\n"
    assert err == ""
    assert await daemon.acon("logs", "1", "--fd", "5") == 0
    assert capsys.readouterr().err == "x" * (LOG_BYTES // 4) + "\n"


async def test_since_leaves_out_what_was_earlier(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    now = datetime.now(UTC)
    times = iter([now - timedelta(hours=3), now - timedelta(minutes=1)])
    log = ContainerLog(
        kept_bytes=LOG_BYTES, now_ns=lambda: int(next(times).timestamp() * 1_000_000_000)
    )
    daemon.operations.logs[1] = log
    log_of(daemon, (1, b"old\n"), (1, b"new\n"))
    for since, expected in (
        ("2h", "new\n"),
        ("10s", ""),
        ("1d", "old\nnew\n"),
        ("999999999d", "old\nnew\n"),
        ((now - timedelta(hours=1)).isoformat(), "new\n"),
    ):
        assert await daemon.acon("logs", "1", "--since", since) == 0
        assert capsys.readouterr().out == expected
    for wrong in ("yesterday", "10", "2026-01-01", "-5m"):
        assert await daemon.acon("logs", "1", f"--since={wrong}") == 2


async def test_it_is_said_how_many_lines_are_lost(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    log_of(daemon, (1, b"".join(b"%05d\n" % number for number in range(1000))))
    assert await daemon.acon("logs", "1") == 0
    out, err = capsys.readouterr()
    kept = out.splitlines()
    assert kept[-1] == "00999"
    assert err == f"acon: {1000 - len(kept)} lines are no longer kept\n"
    # Who asks for the last ones does not ask for those.
    assert await daemon.acon("logs", "1", "--tail", "1") == 0
    assert capsys.readouterr() == ("00999\n", "")


async def test_json_is_one_object_a_line(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    log_of(daemon, (1, b"a\x1b\n"), (2, b"\xff\n"))
    assert await daemon.acon("logs", "1", "--json") == 0
    out, err = capsys.readouterr()
    first, second = lines_of(out)
    assert err == ""
    assert (first["number"], first["fd"], first["text"], first["cut"]) == (1, 1, "a\x1b", False)
    assert (second["number"], second["fd"], second["bytes"]) == (2, 2, "/w==")
    assert re.fullmatch(STAMP.strip(), str(first["time"]))
    log_of(daemon, (1, b"\n" * 1000))
    assert await daemon.acon("logs", "1", "--json") == 0
    lost, after, *_ = lines_of(capsys.readouterr().out)
    assert int(str(after["number"])) - int(str(lost["lost_lines"])) == 1


async def test_following_ends_when_the_container_does(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    log = log_of(daemon, (1, b"before\n"), ended=False)
    async with trio.open_nursery() as nursery:

        async def write_later() -> None:
            await daemon.operations.log_awaited.wait()
            log.write(1, b"meanwhile\nunfinished")
            log.end_run()

        nursery.start_soon(write_later)
        assert await daemon.acon("logs", "1", "-f") == 0
    assert capsys.readouterr().out == "before\nmeanwhile\nunfinished\n"


async def test_the_last_lines_are_followed_by_what_comes(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    log = log_of(daemon, (1, b"1\n2\n3\n"), ended=False)
    async with trio.open_nursery() as nursery:

        async def write_later() -> None:
            await daemon.operations.log_awaited.wait()
            log.write(1, b"4\n")
            log.end_run()

        nursery.start_soon(write_later)
        assert await daemon.acon("logs", "-f", "--tail", "1", "1") == 0
    assert capsys.readouterr().out == "3\n4\n"


async def test_ctrl_c_ends_following_without_a_word(daemon: Daemon) -> None:
    log_of(daemon, (1, b"here\n"), ended=False)
    command = [sys.executable, "-m", "acon.cli", "logs", "-f", "1", "--socket", str(daemon.socket)]
    process = await trio.lowlevel.open_process(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    async with process.stdout, process.stderr:
        with trio.fail_after(60):
            assert await process.stdout.receive_some(100) == b"here\n"
            process.send_signal(signal.SIGINT)
            assert await process.wait() == 130
            assert await process.stderr.receive_some(100) == b""


async def test_a_reader_that_leaves_ends_following(daemon: Daemon) -> None:
    log = log_of(daemon, (1, b"here\n"), ended=False)
    command = [sys.executable, "-m", "acon.cli", "logs", "-f", "1", "--socket", str(daemon.socket)]
    process = await trio.lowlevel.open_process(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    async with process.stderr:
        with trio.fail_after(60):
            async with process.stdout:
                assert await process.stdout.receive_some(100) == b"here\n"
            log.write(1, b"nobody reads this\n")
            assert await process.wait() == 1
            assert await process.stderr.receive_some(100) == b""


async def test_a_container_that_nobody_knows_is_a_failure(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await daemon.acon("logs", "9", "-f") == 1
    assert "container 9" in capsys.readouterr().err
    assert await daemon.acon("logs", "9", "--json") == 1
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "unknown"
