"""What an operator types about containers, against a real daemon with real ones."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from integration_images import Image, ImageFile, ImageMaker
from integration_machine import BIN, PATIENCE_S, Machine, wait_until

pytestmark = pytest.mark.root

# Says how often it was started; ends with 7 when it is asked to.
TALKS = """\
trap 'echo "bye" >&2; exit 7' TERM
echo "run" >> /tmp/runs
while read line; do echo "$line $((n=n+1))"; done < /tmp/runs
printf 'esc \\033[1m\\n' >&2
echo "uid $(id -u)" > /tmp/ready
while :; do sleep 1 & wait $!; done
"""

# Each in a way of its own to end.
QUERY = b"""\
#!/bin/sh
echo "args $*"
echo "env $LEVEL"
echo "in $(cat)"
echo "problem" >&2
exit 42
"""
DIES = b"#!/bin/sh\nkill -9 $$\n"
HANGS = b"#!/bin/sh\nsleep 1000\n"


@pytest.fixture(scope="session")
def talker(images: ImageMaker) -> Image:
    folder = "lib/acon/entrypoint.d"
    return images.make(
        "talker",
        TALKS,
        options=(
            *("--signal", "15", "--log-fd", "1", "--log-fd", "2", "--writable"),
            *("--max-instances", "2"),
        ),
        files={
            f"{folder}/Query": ImageFile(QUERY),
            f"{folder}/Dies": ImageFile(DIES),
            f"{folder}/Hangs": ImageFile(HANGS),
            f"{folder}/private": ImageFile(QUERY),
        },
    )


@pytest.fixture
def running(machine: Machine, talker: Image) -> Machine:
    """A daemon with container 1 of `talker`, which has said what it says at first."""
    machine.start_daemon()
    machine.load(talker)
    assert "container 1 of talker:1 runs" in machine.acon("start", "talker")
    wait_until(lambda: "run 1" in machine.acon("logs", "talker"), "the first line of the log")
    return machine


def run_acon(
    machine: Machine, *words: object, stdin: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [BIN / "acon", *map(str, words)],
        input=stdin,
        capture_output=True,
        timeout=PATIENCE_S,
        check=False,
        env={**os.environ, "ACON_SOCKET": str(machine.api)},
    )


@contextmanager
def acon_beside(machine: Machine, *words: object) -> Iterator[subprocess.Popen[str]]:
    """A command that goes on while the test does."""
    process = subprocess.Popen(
        [BIN / "acon", *map(str, words)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "ACON_SOCKET": str(machine.api)},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def read_until(process: subprocess.Popen[str], words: str) -> list[str]:
    """The lines up to one with `words` in it."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if words in line:
            return lines
    pytest.fail(f"{words!r} did not come, only {lines}")


def test_a_container_is_listed_inspected_and_asked_for_its_log(running: Machine) -> None:
    row = running.acon("ps").splitlines()[1]
    assert row.split()[:2] == ["1", "talker:1"]
    assert " running " in row
    assert " ago " in row or " now " in row
    (listed,) = json.loads(running.acon("ps", "--json"))["containers"]
    assert listed["memory_bytes"] > 0
    assert listed["image_names"] == ["talker:1"]
    inspected = json.loads(running.acon("inspect", "talker", "--json"))
    assert inspected["start_event_digest_sha384"] == listed["start_event_digest_sha384"]
    assert inspected["layers"] == inspected["layer_references"]
    assert len(inspected["layers"]) == 2
    assert inspected["log_fds"] == [1, 2]
    assert "signals      SIGTERM (15)" in running.acon("inspect", "1")
    done = run_acon(running, "logs", "1")
    assert done.stdout == b"run 1\n"
    # A pipe gets what was written.
    wait_until(
        lambda: run_acon(running, "logs", "1").stderr == b"esc \x1b[1m\n", "the other stream"
    )


def test_what_it_writes_is_followed_to_its_end(running: Machine) -> None:
    with (
        acon_beside(running, "logs", "-f", "1") as logs,
        acon_beside(running, "events", "-f", "--type", "container") as events,
    ):
        read_until(logs, "run 1")
        read_until(events, "container.started")
        running.acon("signal", "talker", "TERM")
        _, errors = logs.communicate(timeout=PATIENCE_S)
        assert logs.returncode == 0
        assert errors.endswith("bye\n")
        ended = read_until(events, "container.exited")[-1]
        assert "container_id=1" in ended and "exit_code=7" in ended
        events.send_signal(signal.SIGINT)
        _, errors = events.communicate(timeout=PATIENCE_S)
        assert (events.returncode, errors) == (130, "")
    assert "exited with 7" in running.acon("ps")
    assert running.acon("logs", "1", "--stderr", "--json").count('"bye"') == 1


def test_a_restart_keeps_what_it_had_and_shows_in_the_list(running: Machine) -> None:
    (before,) = json.loads(running.acon("ps", "--json"))["containers"]
    assert "container 1 runs again (restarts: 1)" in running.acon("restart", "talker")
    wait_until(lambda: "run 2" in running.acon("logs", "1"), "the second run")
    # The log goes on, and so do the temporary files.
    assert running.acon("logs", "1").splitlines() == ["run 1", "run 1", "run 2"]
    (after,) = json.loads(running.acon("ps", "--json"))["containers"]
    assert (after["container_id"], after["restarts"]) == (1, 1)
    assert after["pid"] != before["pid"]
    # Ended, and started again from what was kept.
    running.acon("signal", "1", "TERM")
    wait_until(lambda: "exited with 7" in running.acon("ps"), "the end")
    running.acon("restart", "1")
    wait_until(lambda: "run 3" in running.acon("logs", "1", "--tail", "2"), "the third run")


def test_commands_inside_take_input_and_give_their_own_exit_code(running: Machine) -> None:
    words = ("--env", "LEVEL=debug", "--stdin", "-", "1", "Query", "--a", "b c", "--json")
    done = run_acon(running, "invoke", *words, stdin=b"given")
    assert done.returncode == 42
    assert done.stdout == b"args --a b c --json\nenv debug\nin given\n"
    assert done.stderr == b"problem\n"
    done = run_acon(running, "invoke", "--json", "--capture", "4", "1", "Query")
    assert done.returncode == 42
    result = json.loads(done.stdout)
    assert base64.b64decode(result["stdout"]) == b"args"
    assert (result["exit_code"], result["signal"]) == (42, None)
    assert (result["stdout_cut"], result["stderr_cut"]) == (True, True)
    assert run_acon(running, "invoke", "1", "Dies").returncode == 128 + signal.SIGKILL
    assert "entry_point=Query exit_code=42" in running.acon("events", "--type", "container.invoked")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("1", "private"), b"private"),
        (("1", "Absent"), b"Absent"),
        (("--timeout", "1", "1", "Hangs"), b"Hangs"),
        (("2", "Query"), b"container 2"),
    ],
)
def test_what_acon_itself_has_to_say_has_a_code_of_its_own(
    running: Machine, words: tuple[str, ...], reason: bytes
) -> None:
    done = run_acon(running, "invoke", *words)
    assert (done.returncode, done.stdout) == (125, b"")
    assert reason in done.stderr
    assert " running " in running.acon("ps")


def test_an_image_with_two_containers_stands_for_neither(running: Machine) -> None:
    running.acon("start", "talker")
    done = run_acon(running, "logs", "talker")
    assert done.returncode == 2
    assert b"containers 1, 2" in done.stderr
    running.acon("signal", "2", "TERM")
    wait_until(lambda: "exited with 7" in running.acon("ps"), "the end of one of them")
    assert "run 1" in running.acon("logs", "talker")


def test_a_daemon_that_ends_ends_those_who_follow(running: Machine) -> None:
    with acon_beside(running, "events", "-f") as events:
        read_until(events, "container.started")
        assert running.stop_daemon() == 0
        _, errors = events.communicate(timeout=PATIENCE_S)
        assert events.returncode == 1
        assert "is acond running?" in errors


def test_following_outlasts_what_the_daemon_grants_one_connection(
    dark_machine: Machine, talker: Image
) -> None:
    machine = dark_machine
    machine.write_config(http="follow_deadline_s = 0.3\nfollow_heartbeat_s = 0.1")
    machine.power_on()
    machine.start_daemon()
    machine.load(talker)
    machine.acon("start", "talker")
    with acon_beside(machine, "logs", "-f", "1") as logs:
        read_until(logs, "run 1")
        # It would have said so if the first connection's end had been taken for the log's.
        with pytest.raises(subprocess.TimeoutExpired):
            logs.wait(1)
        machine.acon("signal", "1", "TERM")
        _, errors = logs.communicate(timeout=PATIENCE_S)
        assert logs.returncode == 0
        assert errors.count("bye") == 1
