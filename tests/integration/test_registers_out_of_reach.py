"""A container that tries everything to reach a measurement register, or what leads to one."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from inside_rig import TRIES, Try, outcomes, reach_out, tries_of
from integration_images import Image, ImageFile, ImageMaker
from integration_machine import Machine

from acon.client import Client
from plugins.oci_runtime.seccomp import COMMON_PROFILE
from plugins.tdx_sim.wire import owner_socket_path
from supervisor import RuntimeFailed

pytestmark = pytest.mark.root

# Where the kernel shows registers and reports, and what stands in for them where it does not.
REGISTERS = (
    "/sys/devices/virtual/misc/tdx_guest/measurements/rtmr3:sha384",
    "/sys/kernel/config/tsm/report",
    "/sys/firmware/acpi/tables/data/CCEL",
    "/dev/tdx_guest",
)
STAND_INS = ("/sys/devices/system/cpu/online", "/sys/kernel/mm")
REFUSED = {"EPERM", "ENOSYS"}
USERS = {
    "root": ((), "/app/tries all /tmp/targets"),
    # Without no_new_privs, and as a user who is not the container's root.
    "root with more users": (("--uid", "33"), "/app/tries all /tmp/targets"),
    "another user": (("--uid", "33"), "/app/tries as 33 /app/tries all /tmp/targets"),
    "a writable root": (("--writable",), "/app/tries all /tmp/targets"),
}


def targets_of(machine: Machine) -> str:
    """What to reach out for: registers, sockets by path and by abstract name, processes."""
    assert machine.td is not None and machine.daemon is not None
    paths = [*REGISTERS, *STAND_INS, machine.config, machine.runtime_dir, machine.run_dir]
    sockets = [*machine.sockets()]
    assert {machine.api, machine.td_socket, owner_socket_path(machine.td_socket)} <= set(sockets)
    pids = [1, os.getpid(), machine.td.pid, machine.daemon.pid]
    return "".join(
        f"{kind} {what}\n"
        for kind, whats in (
            ("path", paths),
            ("socket", sockets),
            ("abstract", sockets),
            ("pid", [pid for pid in pids if pid > 1]),
        )
        for what in whats
    )


def start_trying(machine: Machine, images: ImageMaker, tries_program: Path, user: str) -> list[Try]:
    """Have a container try everything, as one of USERS."""
    options, command = USERS[user]
    image = images.make(
        f"tries as {user}".replace(" ", "-"),
        TRIES.format(command=command),
        files={"app/tries": ImageFile(tries_program.read_bytes())},
        options=("--signal", "15", "--max-instances", "0", *options),
    )
    machine.start_daemon()
    machine.load(image)
    view = machine.start(image)
    before = machine.register()
    tries = reach_out(machine, view, targets_of(machine))
    assert machine.register() == before
    machine.require_agreement()
    return tries


def require_all_refused(tries: list[Try]) -> None:
    assert [one for one in tries if one.outcome in ("reached", "unknown")] == []
    # That the ways were really tried, and refused for the reason that they ought to be.
    assert set(outcomes(tries, "mount", "call")) <= {*REFUSED, "killed", "refused"}
    assert set(outcomes(tries, "mknod", "network")) == {"EPERM"}
    assert set(outcomes(tries, "process")) <= {"ESRCH", *REFUSED}
    assert set(outcomes(tries, "socket")) <= {"ENOENT", "EACCES", "ENAMETOOLONG"}
    assert set(outcomes(tries, "abstract")) == {"ECONNREFUSED"}
    assert set(outcomes(tries, "family")) <= {*REFUSED, "EAFNOSUPPORT"}
    assert {one.what for one in tries if one.way == "unlink"} == {
        "/run/acon.sock",
        "/shared/acon.sock",
    }
    ways = {one.way for one in tries}
    assert {"", "/proc/1/root", "/proc/self/root", "/proc/1/cwd", "/tmp/place"} <= ways | {
        "/proc/self/root"
    }
    assert len(tries) > 200


@pytest.mark.parametrize("user", list(USERS))
def test_no_way_out_of_a_container_leads_to_a_register(
    machine: Machine, images: ImageMaker, tries_program: Path, user: str
) -> None:
    require_all_refused(start_trying(machine, images, tries_program, user))


@pytest.mark.parametrize("user", ["root with more users"])
def test_neither_does_one_under_the_filter_that_comes_with_the_supervisor(
    machine: Machine, images: ImageMaker, tries_program: Path, user: str
) -> None:
    if not COMMON_PROFILE.exists():
        pytest.skip("the other tests have used it: there is no other here")
    machine.write_config(more='[plugin.oci_runtime]\nseccomp_profile = "builtin"')
    require_all_refused(start_trying(machine, images, tries_program, user))


def test_outside_of_a_container_the_same_program_reaches_what_there_is(
    machine: Machine, tries_program: Path, tmp_path: Path
) -> None:
    """So that what is refused above is refused to a container, and not to everybody."""
    machine.start_daemon()
    targets = tmp_path / "targets"
    targets.write_text(targets_of(machine))
    done = subprocess.run(
        [tries_program, "plainly", targets], capture_output=True, text=True, check=True, timeout=90
    )
    tries = tries_of(done.stdout)
    there = [path for path in (*REGISTERS, *STAND_INS) if os.path.exists(path)]
    reached = {one.what for one in tries if one.way == "" and one.outcome == "reached"}
    assert reached == {*there, str(machine.config), str(machine.runtime_dir), str(machine.run_dir)}
    assert set(STAND_INS) <= reached
    reached = {one.what for one in tries if one.way == "socket" and one.outcome == "reached"}
    assert reached == set(map(str, machine.sockets()))


def sockets_of(pid: int) -> set[str]:
    """Inodes of a process's sockets."""
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            target = os.readlink(link)
            if target.startswith("socket:["):
                found.add(target[8:-1])
    return found


def test_neither_simulator_nor_daemon_can_be_found_on_the_network_that_containers_share(
    machine: Machine, patient: Image
) -> None:
    machine.start_daemon()
    machine.load(patient)
    machine.start(patient)
    assert machine.td is not None and machine.daemon is not None
    own = sockets_of(machine.td.pid) | sockets_of(machine.daemon.pid)
    assert len(own) >= 3
    unix = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    names = {line[7] for line in unix if line[6] in own and len(line) > 7}
    assert str(machine.td_socket) in names
    assert [name for name in names if not name.startswith(f"{machine.run_dir}/")] == []
    for table in ("tcp", "tcp6", "udp", "udp6", "raw", "raw6", "packet"):
        lines = Path("/proc/net", table).read_text().splitlines()[1:]
        assert [line for line in lines if set(line.split()) & own] == [], table


def test_no_working_directory_leads_out(machine: Machine, images: ImageMaker) -> None:
    """Runtimes were fooled there by descriptors of their own (CVE-2024-21626)."""
    made = [
        images.make(f"starts-in-{number}", options=("--workdir", f"/proc/self/fd/{number}"))
        for number in range(3, 16)
    ]
    machine.start_daemon()
    machine.load(*made)

    async def start_all(client: Client) -> list[str]:
        refusals = []
        for image in made:
            with pytest.raises(RuntimeFailed) as refused:
                await client.start(image.image_id)
            refusals.append(refused.value.item)
        return refusals

    assert len(set(machine.ask(start_all))) == len(made)
    assert [one.state for one in machine.containers()] == []
    machine.require_agreement()
