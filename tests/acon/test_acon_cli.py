"""The command line as a whole: help, exit codes, completion, what is imported when."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from acon_helpers import Acon

from acon import cli
from acon.daemon import DEFAULT_SOCKET
from plugins.http_api.settings import Settings


def commands(
    parser: argparse.ArgumentParser, words: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """Every command that can be run, with its words."""
    groups = [one for one in parser._actions if isinstance(one, argparse._SubParsersAction)]
    for group in groups:
        for name, inner in group.choices.items():
            yield from commands(inner, (*words, name))
    if not groups:
        yield words, parser


ALL = dict(commands(cli.build_parser()))


def run_acon(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "acon.cli", *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_commands_that_scripts_rely_on_are_there() -> None:
    fixed = """image convert,image delegate,image sign,image show,plan,vendor make,vendor sign,
        load,seal,start,ps,logs,signal,restart,invoke,inspect,events,doctor,evidence,verify,
        policy init,log show"""
    assert {tuple(one.split()) for one in fixed.split(",") if one.strip()} <= set(ALL)


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_every_command_has_json_and_an_example_that_it_would_take(words: tuple[str, ...]) -> None:
    parser = ALL[words]
    assert any("--json" in action.option_strings for action in parser._actions)
    examples = (parser.epilog or "").partition("example:\n")[2].strip().splitlines()
    assert examples
    for example in examples:
        # What a shell would do with `> FILE`, `$(...)`, `eval` and `sudo`.
        command = example.strip().removeprefix("sudo ").removeprefix('eval "$(').removesuffix(')"')
        command = command.partition(" > ")[0].replace("$(openssl rand -hex 32)", "00")
        program, *arguments = shlex.split(command)
        assert program == "acon"
        assert tuple(arguments[: len(words)]) == words
        cli.build_parser().parse_args(arguments)


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_every_commands_help_is_printed(
    words: tuple[str, ...], acon: Acon, capsys: pytest.CaptureFixture[str]
) -> None:
    assert acon(*words, "--help") == 0
    assert "example:" in capsys.readouterr().out


def test_exit_codes_as_a_script_sees_them(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{", encoding="utf-8")
    assert run_acon("--help").returncode == 0
    assert run_acon("--version").returncode == 0
    assert run_acon().returncode == 2
    assert run_acon("no-such-command").returncode == 2
    assert run_acon("image", "show", str(tmp_path)).returncode == 2
    assert run_acon("image", "show", str(tmp_path / "absent")).returncode == 2
    assert run_acon("status", "--socket", str(tmp_path / "absent.sock")).returncode == 1


def test_errors_are_words_on_standard_error_and_json_on_standard_output(tmp_path: Path) -> None:
    plain = run_acon("log", "show", str(tmp_path / "absent"))
    assert plain.stdout == ""
    assert str(tmp_path / "absent") in plain.stderr
    as_json = run_acon("log", "show", str(tmp_path / "absent"), "--json")
    assert json.loads(as_json.stdout)["error"]["item"] == str(tmp_path / "absent")
    assert as_json.stderr == ""


def test_help_imports_nothing_heavy() -> None:
    heavy = ("trio", "httpx", "cryptography", "rich", "msgspec", "starlette", "dcap_qvl")
    code = (
        "import sys\nfrom acon.cli import build_parser\nbuild_parser().format_help()\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_bash_takes_the_completion_and_offers_the_commands(tmp_path: Path) -> None:
    done = run_acon("completion", "bash")
    assert done.returncode == 0
    script = tmp_path / "completion"
    script.write_text(done.stdout, encoding="utf-8")
    ask = (
        f"source {shlex.quote(str(script))}; COMP_WORDS=(acon image ''); COMP_CWORD=2; "
        "_shtab_acon; printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    offered = subprocess.run(
        ["bash", "-c", ask], capture_output=True, text=True, timeout=60, check=True
    )
    assert {"convert", "delegate", "sign", "show"} <= set(offered.stdout.split())


@pytest.mark.parametrize("command", ["logs", "inspect", "signal", "restart", "invoke"])
def test_bash_offers_the_numbers_of_containers_where_one_is_meant(
    command: str, tmp_path: Path
) -> None:
    script = tmp_path / "completion"
    script.write_text(run_acon("completion", "bash").stdout, encoding="utf-8")
    # In the place of the command itself: what it would say of a daemon with three containers.
    ask = (
        'acon() { [ "$*" = "ps --quiet" ] && printf "1\n2\n31\n"; }; '
        f"source {shlex.quote(str(script))}; "
        f"COMP_WORDS=(acon {command} 3); COMP_CWORD=2; _shtab_acon; "
        "printf '%s\n' \"${COMPREPLY[@]}\""
    )
    offered = subprocess.run(
        ["bash", "-c", ask], capture_output=True, text=True, timeout=60, check=True
    )
    assert offered.stdout.split() == ["31"]


def test_zsh_has_what_it_calls_for_them() -> None:
    script = run_acon("completion", "zsh").stdout
    assert "\n_acon_containers() {" in script
    assert ":_acon_containers" in script


def test_options_that_a_command_does_not_know_are_said_with_its_own_usage() -> None:
    done = run_acon("ps", "--surprise")
    assert done.returncode == 2
    assert done.stderr.startswith("usage: acon ps ")
    assert "unrecognized arguments: --surprise" in done.stderr


def test_the_default_socket_is_where_the_daemon_listens_by_default() -> None:
    assert Settings().socket == DEFAULT_SOCKET


def test_control_characters_of_strangers_are_shown_and_not_obeyed(
    acon: Acon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "manifest.json").write_text('{"\x1b[2J": 1}'.replace("\x1b", "\\u001b"))
    assert acon("image", "show", tmp_path) == 2
    assert "\x1b" not in capsys.readouterr().err
