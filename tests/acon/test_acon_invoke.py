"""`acon invoke` against the real HTTP server: what goes in and comes out, and its exit codes."""

from __future__ import annotations

import base64
import io
import json
import sys
from pathlib import Path

import msgspec
import pytest
from acon_daemon import Daemon

from supervisor import (
    Busy,
    Conflict,
    DeadlineExceeded,
    ExitStatus,
    Invocation,
    InvocationResult,
    PolicyDenied,
    Refusal,
    UnknownItem,
)


def ends(daemon: Daemon, status: ExitStatus, **changes: object) -> None:
    """What the command will have done."""
    plain = InvocationResult(
        status=status, stdout=b"", stderr=b"", stdout_cut=False, stderr_cut=False
    )
    daemon.operations.result = msgspec.structs.replace(plain, **changes)


async def test_everything_after_the_name_goes_to_the_command(daemon: Daemon) -> None:
    options = ("--env", "A=1", "--env", "B=", "--timeout", "7", "--capture", "99")
    await daemon.acon("invoke", *options, "1", "Backup", "--full", "-x", "--json", "--", "a b", "")
    ((container_id, invocation),) = daemon.operations.invocations
    assert container_id == 1
    assert invocation == Invocation(
        entry_point="Backup",
        arguments=("--full", "-x", "--json", "--", "a b", ""),
        environment=("A=1", "B="),
        stdin=b"",
        capture_bytes=99,
        timeout_s=7,
    )


async def test_without_options_there_is_no_input_and_a_bound_on_time_and_output(
    daemon: Daemon,
) -> None:
    await daemon.acon("invoke", "1", "Backup")
    ((_, invocation),) = daemon.operations.invocations
    assert invocation == Invocation(entry_point="Backup", capture_bytes=65_536, timeout_s=30)


async def test_input_comes_from_a_file_or_from_this_commands_own(
    daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = bytes(range(256))
    (tmp_path / "request").write_bytes(given)
    await daemon.acon("invoke", "--stdin", tmp_path / "request", "1", "Query")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given[::-1])))
    await daemon.acon("invoke", "--stdin", "-", "1", "Query")
    stdins = [invocation.stdin for _, invocation in daemon.operations.invocations]
    assert stdins == [given, given[::-1]]


async def test_more_input_than_fits_into_memory_is_refused(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ends(daemon, ExitStatus(exit_code=0))
    monkeypatch.setattr("acon.commands.invoke.MAX_STDIN_BYTES", 10)
    file = tmp_path / "input"
    for size, code in ((10, 0), (11, 125)):
        file.write_bytes(b"x" * size)
        assert await daemon.acon("invoke", "--stdin", str(file), "1", "Report") == code
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"x" * size)))
        assert await daemon.acon("invoke", "--stdin", "-", "1", "Report") == code
    assert [len(made.stdin) for _, made in daemon.operations.invocations] == [10, 10]


async def test_output_is_written_as_the_command_wrote_it(
    daemon: Daemon, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    ends(daemon, ExitStatus(exit_code=0), stdout=b"\x00\xff\x1b[m\r\n", stderr=b"e\x80")
    assert await daemon.acon("invoke", "1", "Query") == 0
    out, err = capfdbinary.readouterr()
    assert (out, err) == (b"\x00\xff\x1b[m\r\n", b"e\x80")


async def test_a_terminal_is_not_made_to_obey_the_command(
    daemon: Daemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    ends(daemon, ExitStatus(exit_code=0), stdout=b"a\tb\n\x1b]0;title\x07\xff\xc2\x9b1m\n")
    assert await daemon.acon("invoke", "1", "Query") == 0
    assert capsys.readouterr().out == "a\tb\n\\x1b]0;title\\x07\\xff\\x9b1m\n"


async def test_it_is_said_when_the_command_wrote_more_than_was_kept(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    ends(daemon, ExitStatus(exit_code=0), stdout=b"abc", stdout_cut=True)
    assert await daemon.acon("invoke", "--capture", "3", "1", "Query") == 0
    out, err = capsys.readouterr()
    assert out == "abc"
    assert err == "acon: of its standard output only the first 3 bytes were kept\n"


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (ExitStatus(exit_code=0), 0),
        (ExitStatus(exit_code=1), 1),
        (ExitStatus(exit_code=2), 2),
        (ExitStatus(exit_code=255), 255),
        (ExitStatus(signal=9), 137),
        (ExitStatus(signal=15), 143),
    ],
)
@pytest.mark.parametrize("options", [(), ("--json",)])
async def test_the_exit_code_is_the_commands_own(
    daemon: Daemon, status: ExitStatus, code: int, options: tuple[str, ...]
) -> None:
    ends(daemon, status)
    assert await daemon.acon("invoke", *options, "1", "Query") == code


@pytest.mark.parametrize("kind", [PolicyDenied, UnknownItem, Busy, Conflict, DeadlineExceeded])
async def test_what_the_daemon_refuses_cannot_be_taken_for_the_commands_word(
    daemon: Daemon, kind: type[Refusal], capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.operations.refusal = kind("Query", "may not")
    assert await daemon.acon("invoke", "1", "Query") == 125
    assert "Query: may not" in capsys.readouterr().err
    assert await daemon.acon("invoke", "--json", "1", "Query") == 125
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == kind.kind


@pytest.mark.parametrize(
    "words",
    [
        ("1",),
        ("--no-such-option", "1", "Query"),
        ("--timeout", "0", "1", "Query"),
        ("--stdin", "/nowhere/at/all", "1", "Query"),
        ("no-such-image", "Query"),
    ],
)
async def test_neither_can_wrong_usage(daemon: Daemon, words: tuple[str, ...]) -> None:
    assert await daemon.acon("invoke", *words) == 125
    assert daemon.operations.invocations == []


async def test_json_has_both_outputs_in_base64(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    ends(daemon, ExitStatus(signal=11), stdout=b"\xff", stderr=b"e", stderr_cut=True)
    await daemon.acon("invoke", "--json", "1", "Query")
    assert json.loads(capsys.readouterr().out) == {
        "exit_code": None,
        "signal": 11,
        "stdout": base64.b64encode(b"\xff").decode(),
        "stderr": base64.b64encode(b"e").decode(),
        "stdout_cut": False,
        "stderr_cut": True,
    }
