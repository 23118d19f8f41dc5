"""What strangers may do to a container, and what is left of one: real ones, a real daemon."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from inside_rig import inside
from integration_images import Image, ImageMaker
from integration_machine import Machine, is_alive, machine_in, wait_until

from acon.client import Client
from supervisor import Conflict, ContainerView, DeadlineExceeded, PolicyDenied, Refusal

pytestmark = pytest.mark.root

# Counts its own USR1 and its child's, each in a file; ends with 9 when it is asked to.
COUNTS = """\
trap 'exit 9' TERM
trap 'echo x >> /tmp/own' USR1
sh -c 'trap "echo x >> /tmp/child" USR1; : > /tmp/child; while :; do sleep 1 & wait $!; done' &
until test -e /tmp/child; do sleep 0.01; done
: > /tmp/own
: > /tmp/ready
while :; do wait; done
"""
# Ends by itself, when a file appears; deaf to TERM.
ENDS_ALONE = """\
trap '' TERM
echo run >> /tmp/runs
: > /tmp/ready
until test -e /tmp/end; do sleep 0.05; done
mv /tmp/end /tmp/ended
"""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, pki_folder: Path) -> Iterator[Machine]:
    with machine_in(tmp_path_factory.mktemp("lives"), pki_folder) as machine:
        # Some of them are deaf.
        machine.write_config(more="[containers]\nstop_timeout_s = 1")
        machine.power_on()
        machine.start_daemon()
        yield machine


def started(machine: Machine, image: Image) -> ContainerView:
    """A container that has made /tmp/ready."""
    machine.load(image)
    view = machine.start(image)
    wait_until(found(view, "/tmp/ready").exists, "a container that is ready")
    return view


def found(view: ContainerView, path: str) -> Path:
    assert view.pid is not None
    return inside(view.pid, path)


def count(view: ContainerView, path: str) -> int:
    return found(view, path).read_text().count("x")


def members(machine: Machine, view: ContainerView) -> set[int]:
    """Pids of everybody in a container."""
    group = machine.groups()[0] / str(view.container_id)
    return {int(pid) for pid in (group / "cgroup.procs").read_text().split()}


def view_of(machine: Machine, container_id: int) -> ContainerView:
    (view,) = [one for one in machine.containers() if one.container_id == container_id]
    return view


def refusal_of(machine: Machine, call: Callable[[Client], Awaitable[object]]) -> Refusal | None:
    async def work(client: Client) -> Refusal | None:
        try:
            await call(client)
        except Refusal as refusal:
            return refusal
        return None

    return machine.ask(work)


def send(machine: Machine, view: ContainerView, signum: int) -> Refusal | None:
    return refusal_of(machine, lambda client: client.signal(view.container_id, signum))


def restart(machine: Machine, view: ContainerView, timeout_s: int = 60) -> Refusal | None:
    return refusal_of(
        machine, lambda client: client.restart(view.container_id, timeout_s=timeout_s)
    )


def until_exited(machine: Machine, view: ContainerView) -> ContainerView:
    wait_until(lambda: view_of(machine, view.container_id).state == "exited", "an end")
    return view_of(machine, view.container_id)


@pytest.mark.parametrize(
    ("signals", "allowed", "denied"),
    [
        ((15, 10), 10, -10),
        ((15, -10), -10, 10),
    ],
)
def test_a_listed_signal_reaches_the_process_or_its_group_and_no_other_is_sent(
    daemon: Machine, images: ImageMaker, signals: tuple[int, ...], allowed: int, denied: int
) -> None:
    options = [word for one in signals for word in (f"--signal={one}",)]
    image = images.make(f"counts{allowed}", COUNTS, options=("--max-instances", "0", *options))
    view = started(daemon, image)
    for other in (denied, signal.SIGKILL, -signal.SIGTERM, -signal.SIGKILL, 0, 64):
        assert isinstance(send(daemon, view, other), PolicyDenied), other
    assert send(daemon, view, allowed) is None
    wait_until(lambda: count(view, "/tmp/own") == 1, "the signal at the process")
    if allowed < 0:
        wait_until(lambda: count(view, "/tmp/child") == 1, "the signal at its child")
    assert send(daemon, view, signal.SIGTERM) is None
    ended = until_exited(daemon, view)
    assert (ended.exit_code, ended.signal) == (9, None)
    assert isinstance(send(daemon, view, signal.SIGTERM), Conflict)


def test_a_plain_signal_is_not_heard_by_the_children(daemon: Machine, images: ImageMaker) -> None:
    options = ("--max-instances", "0", "--signal", "10", "--signal=-10")
    view = started(daemon, images.make("counts-both", COUNTS, options=options))
    assert send(daemon, view, 10) is None
    wait_until(lambda: count(view, "/tmp/own") == 1, "the signal at the process")
    # What the child had got by then would be counted before this.
    assert send(daemon, view, -10) is None
    wait_until(lambda: count(view, "/tmp/child") > 0, "the signal at its child")
    wait_until(lambda: count(view, "/tmp/own") == 2, "the second at the process")
    assert count(view, "/tmp/child") == 1


def test_a_restart_that_is_not_obeyed_in_time_kills_nothing_and_is_408(
    daemon: Machine, images: ImageMaker
) -> None:
    image = images.make("ends-alone", ENDS_ALONE, options=("--signal", "15"))
    view = started(daemon, image)
    refusal = restart(daemon, view, timeout_s=1)
    assert isinstance(refusal, DeadlineExceeded)
    now = view_of(daemon, view.container_id)
    assert (now.state, now.pid, now.restarts) == ("running", view.pid, 0)
    assert found(view, "/tmp/runs").read_text() == "run\n"
    # Nor is it restarted later, when it ends of itself.
    found(view, "/tmp/end").touch()
    assert until_exited(daemon, view).restarts == 0


@pytest.mark.parametrize("signals", [(), ("--signal", "0", "--signal", "15")])
def test_without_a_first_signal_a_restart_sends_none_and_waits_for_the_end(
    daemon: Machine, images: ImageMaker, signals: tuple[str, ...]
) -> None:
    script = ENDS_ALONE.replace("trap '' TERM", "trap 'exit 5' TERM")
    image = images.make(
        f"unasked{len(signals)}", script, options=("--max-instances", "0", *signals)
    )
    view = started(daemon, image)
    assert isinstance(restart(daemon, view, timeout_s=1), DeadlineExceeded)
    assert view_of(daemon, view.container_id).pid == view.pid
    found(view, "/tmp/end").touch()
    until_exited(daemon, view)
    assert restart(daemon, view) is None
    again = view_of(daemon, view.container_id)
    assert (again.state, again.restarts) == ("running", 1)
    wait_until(lambda: found(again, "/tmp/runs").read_text() == "run\nrun\n", "the second run")


def test_a_restart_keeps_the_ids_and_the_root_and_ends_every_process(
    daemon: Machine, images: ImageMaker
) -> None:
    script = """\
        trap 'exit 0' TERM
        echo run >> /app/runs
        echo run >> /run/user/33/runs
        sleep 4711 &
        : > /tmp/ready
        while :; do sleep 1 & wait $!; done
        """
    options = ("--writable", "--uid", "33", "--signal", "15", "--max-instances", "0")
    view = started(daemon, images.make("keeps", script, options=options))
    assert view.pid is not None
    ids = Path(f"/proc/{view.pid}/uid_map").read_text()
    before = members(daemon, view)
    assert len(before) >= 2
    assert restart(daemon, view) is None
    again = view_of(daemon, view.container_id)
    assert again.pid is not None and again.pid != view.pid
    wait_until(
        lambda: found(again, "/run/user/33/runs").read_text() == "run\nrun\n", "the second run"
    )
    assert found(again, "/app/runs").read_text() == "run\nrun\n"
    assert Path(f"/proc/{again.pid}/uid_map").read_text() == ids
    assert not any(is_alive(pid) for pid in before)


def test_an_owner_who_forbids_restarts_is_obeyed(daemon: Machine, images: ImageMaker) -> None:
    options = ("--signal", "15", "--max-instances", "0")
    view = started(daemon, images.make("once", options=options, fields={"noRestart": True}))
    assert isinstance(restart(daemon, view), PolicyDenied)
    assert view_of(daemon, view.container_id).pid == view.pid
    assert send(daemon, view, signal.SIGTERM) is None
    until_exited(daemon, view)
    assert isinstance(restart(daemon, view), PolicyDenied)
    assert view_of(daemon, view.container_id).state == "exited"


def test_no_more_instances_run_than_the_owner_allows(daemon: Machine, images: ImageMaker) -> None:
    image = images.make("two", options=("--signal", "15", "--max-instances", "2"))
    first, second = started(daemon, image), daemon.start(image)

    def one_more() -> Refusal | None:
        return refusal_of(daemon, lambda client: client.start(image.image_id))

    before = daemon.register()
    assert isinstance(one_more(), Conflict)
    assert send(daemon, first, signal.SIGTERM) is None
    until_exited(daemon, first)
    assert one_more() is None
    # The one that ended has lost its place to another.
    assert isinstance(restart(daemon, first), Conflict)
    assert second.pid is not None and is_alive(second.pid)
    assert daemon.register() == before


def test_of_a_container_that_ended_nothing_is_left_but_its_status(
    daemon: Machine, images: ImageMaker
) -> None:
    script = "echo $$ > /tmp/ready\n(sleep 4711 &)\ntrap 'exit 3' TERM\nwhile :; do sleep 1; done\n"
    image = images.make("leaves", script, options=("--signal", "15", "--max-instances", "0"))
    daemon.load(image)
    mounts = daemon.mounts()
    view = started(daemon, image)
    path = daemon.runtime_dir / "sockets" / f"{view.container_id}.sock"
    groups = [group / str(view.container_id) for group in daemon.groups()]
    assert path.is_socket()
    assert groups and all(group.is_dir() for group in groups)
    processes = members(daemon, view)
    assert len(processes) >= 2
    assert send(daemon, view, signal.SIGTERM) is None
    ended = until_exited(daemon, view)
    assert (ended.exit_code, ended.pid) == (3, None)
    wait_until(lambda: not any(group.exists() for group in groups), "the end of its groups")
    wait_until(lambda: not path.exists(), "the end of its socket")
    assert not any(Path(f"/proc/{pid}").exists() for pid in processes)
    assert daemon.mounts() == mounts
    daemon.require_agreement()


def test_a_stop_asks_with_the_first_signal_of_the_manifest(
    machine: Machine, images: ImageMaker
) -> None:
    script = (
        "trap '' TERM\ntrap 'exit 0' USR2\n: > /tmp/ready\nwhile :; do sleep 1 & wait $!; done\n"
    )
    image = images.make("polite", script, options=("--signal", "12", "--signal", "15"))
    # If it were not asked so, the test's own patience would end first.
    machine.write_config(more="[containers]\nstop_timeout_s = 600")
    machine.start_daemon()
    started(machine, image)
    assert machine.stop_daemon() == 0
    machine.require_nothing_left()


def test_a_stop_kills_what_does_not_end_in_time_with_all_its_processes(
    machine: Machine, images: ImageMaker
) -> None:
    script = "trap '' TERM\n: > /tmp/ready\n(sleep 4711 &)\nwhile :; do sleep 1; done\n"
    machine.write_config(more="[containers]\nstop_timeout_s = 1")
    machine.start_daemon()
    started(machine, images.make("deaf", script))
    processes = machine.container_processes()
    assert len(processes) >= 2
    assert machine.stop_daemon() == 0
    assert not any(is_alive(pid) for pid in processes)
    machine.require_nothing_left()
