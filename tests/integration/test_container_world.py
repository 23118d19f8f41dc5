"""What holds for every container: told by programs in real ones, run by a real daemon."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from inside_rig import FACTS, Seen, inside, look_around, set_user_id_files
from integration_images import Image, ImageMaker
from integration_machine import Machine, machine_in, wait_until

from acon.client import Client
from supervisor import RuntimeFailed

pytestmark = pytest.mark.root

MANY = ("--signal", "15", "--max-instances", "0")
ASKING = (
    *("--uid", "33", "--uid", "1000", "--writable", "--workdir", "/app"),
    *("--log-fd", "1", "--log-fd", "5"),
)
# CHOWN 0, DAC_OVERRIDE 1, FOWNER 3, FSETID 4, KILL 5, SETGID 6, SETUID 7, SETPCAP 8,
# NET_BIND_SERVICE 10, SYS_CHROOT 18, SETFCAP 31 (capability.h)
CAPABILITIES = sum(1 << bit for bit in (0, 1, 3, 4, 5, 6, 7, 8, 10, 18, 31))
DEV = "fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero"
MASKED = {
    *("acpi", "asound", "interrupts", "kcore", "keys", "latency_stats"),
    *("sched_debug", "scsi", "timer_list", "timer_stats"),
}


@dataclass(frozen=True)
class World:
    """One daemon with three containers: two of one image, and another owner's.

    `plain` asks for nothing. `asking` has more users (`uids`), a writable root and a working
    directory.
    """

    machine: Machine
    plain: Seen
    twin: Seen
    asking: Seen

    @property
    def all(self) -> tuple[Seen, Seen, Seen]:
        return self.plain, self.twin, self.asking


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, pki_folder: Path, images: ImageMaker
) -> Iterator[World]:
    plain = images.make("looks-around", FACTS, options=MANY)
    asking = images.make(
        "looks-around-asking",
        FACTS,
        signer="another owner",
        options=(*MANY, *ASKING),
    )
    with machine_in(tmp_path_factory.mktemp("world"), pki_folder) as machine:
        machine.power_on()
        machine.start_daemon()
        machine.load(plain, asking)
        # One after the other, for what the later ones find in /shared.
        seen = [look_around(machine.start(image)) for image in (plain, plain, asking)]
        yield World(machine, *seen)


# --- who it is ------------------------------------------------------------------------------


def id_map(text: str) -> dict[int, int]:
    """Ids inside to ids outside; every line must be about one id."""
    rows = [tuple(map(int, line.split())) for line in text.splitlines()]
    assert all(count == 1 for _, _, count in rows)
    return {first: outside for first, outside, _ in rows}


def test_exactly_the_manifest_s_ids_are_mapped_for_users_and_groups_alike(world: World) -> None:
    for seen, expected in ((world.plain, {0}), (world.twin, {0}), (world.asking, {0, 33, 1000})):
        assert set(id_map(seen.facts["uid_map"])) == expected
        assert seen.facts["gid_map"] == seen.facts["uid_map"]


def test_no_two_containers_share_an_id_and_none_has_the_overflow_id(world: World) -> None:
    outside = [one for seen in world.all for one in id_map(seen.facts["uid_map"]).values()]
    assert len(outside) == len(set(outside)) == 5
    assert all(one >= 100_000 for one in outside)
    assert 65534 not in outside


def test_ids_of_an_ended_container_are_not_given_to_the_next(
    machine: Machine, patient: Image
) -> None:
    machine.start_daemon()
    machine.load(patient)
    given = []
    for _ in range(3):
        view = machine.start(patient)
        assert view.pid is not None
        given.append(Path(f"/proc/{view.pid}/uid_map").read_text().split()[1])
        machine.acon("signal", view.container_id, 15)
        ended = view.container_id

        def is_gone(container_id: int = ended) -> bool:
            (one,) = [one for one in machine.containers() if one.container_id == container_id]
            return one.state == "exited"

        wait_until(is_gone, "an ended container")
    assert len(set(given)) == 3


def test_it_is_root_in_its_own_user_namespace_without_further_groups(world: World) -> None:
    for seen in world.all:
        assert seen.status("Uid").split() == ["0"] * 4
        assert seen.status("Gid").split() == ["0"] * 4
        assert seen.status("Groups") == ""


def test_it_is_process_1_and_leads_its_session_and_its_process_group(world: World) -> None:
    for seen in world.all:
        for field in ("NSpid", "NStgid", "NSsid", "NSpgid"):
            assert seen.status(field) == "1", field
        # stat(5): group and session are its own number, and there is no terminal.
        assert seen.facts["stat"].rpartition(")")[2].split()[2:5] == ["1", "1", "0"]


def test_it_sees_no_process_but_its_own(world: World) -> None:
    for seen in world.all:
        numbers = [int(line) for line in seen.lines("processes")]
        # Itself, the shell around ls, and ls.
        assert 1 in numbers and len(numbers) <= 3


def test_all_namespaces_but_the_network_are_its_own(world: World) -> None:
    private = ("user", "pid", "mnt", "ipc", "uts", "cgroup")
    machine_s = {name: os.readlink(f"/proc/self/ns/{name}") for name in (*private, "net")}
    tables = [machine_s, *(seen.namespaces() for seen in world.all)]
    for name in private:
        assert len({table[name] for table in tables}) == len(tables), name
    assert len({table["net"] for table in tables}) == 1
    assert [seen.facts["cgroup"].splitlines()[-1].rpartition(":")[2] for seen in world.all] == [
        "/"
    ] * 3
    names = {seen.facts["hostname"].strip() for seen in world.all}
    assert len(names) == 3
    assert os.uname().nodename not in names


def test_what_it_makes_is_its_own_until_it_says_otherwise(world: World) -> None:
    for seen in world.all:
        assert seen.facts["umask"].strip() == "0077"
        assert seen.status("Umask") == "0077"
        assert seen.facts["made_mode"].strip() == "600"


def test_it_starts_where_the_manifest_says_with_the_manifest_s_arguments_alone(
    world: World,
) -> None:
    assert [seen.facts["working_dir"].strip() for seen in world.all] == ["/", "/", "/app"]
    for seen in world.all:
        assert seen.facts["cmdline"] == "/bin/sh\0/app/main.sh\0"


@pytest.mark.parametrize("options", [(), ("--writable",)])
def test_where_the_manifest_s_working_directory_is_missing_nothing_starts(
    world: World, images: ImageMaker, options: tuple[str, ...]
) -> None:
    name = f"starts-nowhere-{len(options)}"
    image = images.make(name, FACTS, options=("--workdir", "/missing/here", *options))
    world.machine.load(image)

    async def start(client: Client) -> None:
        with pytest.raises(RuntimeFailed):
            await client.start(image.image_id)

    world.machine.ask(start)


def test_its_descriptors_are_the_first_three_and_those_whose_output_is_kept(world: World) -> None:
    for seen, kept in ((world.plain, set()), (world.twin, set()), (world.asking, {"1", "5"})):
        found = dict(line.split(" ", 1) for line in seen.lines("descriptors"))
        # The shell keeps its script open.
        (script,) = (number for number, target in found.items() if target == "/app/main.sh")
        assert set(found) == {"0", "1", "2", script, *kept}, found
        for number in set(found) - {script}:
            if number in kept:
                assert found[number].startswith("pipe:["), number
            else:
                assert found[number] == "/dev/null", number


# --- what it may do ---------------------------------------------------------------------------


def test_its_capabilities_are_bounded_and_none_is_handed_on(world: World) -> None:
    for seen in world.all:
        for name in ("CapPrm", "CapEff", "CapBnd"):
            assert int(seen.status(name), 16) == CAPABILITIES, name
        for name in ("CapInh", "CapAmb"):
            assert int(seen.status(name), 16) == 0, name


def test_a_filter_of_system_calls_is_on_and_new_privileges_only_with_more_users(
    world: World,
) -> None:
    assert [seen.status("Seccomp") for seen in world.all] == ["2"] * 3
    assert [seen.status("NoNewPrivs") for seen in world.all] == ["1", "1", "0"]


def test_a_set_user_id_program_works_for_a_mapped_user_only_and_only_with_uids(
    machine: Machine, images: ImageMaker, tries_program: Path
) -> None:
    files = set_user_id_files(tries_program.read_bytes())
    with_uids = images.make(
        "set-user-id", FACTS, files=files, options=(*MANY, "--uid", "33", "--uid", "1000")
    )
    without = images.make("no-set-user-id", FACTS, files=files, options=MANY)
    machine.start_daemon()
    machine.load(with_uids, without)
    facts = look_around(machine.start(with_uids)).facts
    # Real and effective user, real and effective group.
    assert facts["ids"] == "0 0 0 0\n"
    assert facts["ids_as33"] == "0 33 0 0\n"
    assert facts["ids_as77"] == "0 0 0 0\n"
    assert facts["ids_back"] == "33 0 0 0\n"
    facts = look_around(machine.start(without)).facts
    assert facts["ids"] == facts["ids_as33"] == facts["ids_as77"] == "0 0 0 0\n"
    assert facts["ids_back"] == "as\t33\tEINVAL\n"


def limits_in(text: str) -> dict[str, tuple[str, str]]:
    """Of /proc/PID/limits: name to soft and hard limit."""
    rows = text.splitlines()[1:]
    return {row[:26].strip(): (row[26:47].strip(), row[47:68].strip()) for row in rows}


def test_its_limits_are_the_machine_s_though_the_daemon_has_raised_its_own(world: World) -> None:
    daemon = world.machine.daemon
    assert daemon is not None
    ours = limits_in(Path(f"/proc/{daemon.pid}/limits").read_text())
    soft, hard = ours.pop("Max open files")
    assert soft == hard
    for seen in world.all:
        theirs = limits_in(seen.facts["limits"])
        assert theirs.pop("Max open files") == (str(min(1024, int(hard))), hard)
        assert theirs == ours
        assert int(seen.facts["oom_score_adj"]) == 0


# --- what it finds ------------------------------------------------------------------------------


def test_its_dev_is_its_own_and_minimal(world: World) -> None:
    for seen in world.all:
        # A runtime links core to the masked /proc/kcore where the kernel has one.
        assert set(seen.lines("dev")) - {"core"} == set(DEV.split())
        nodes = seen.lines("dev_nodes")
        assert {line.rsplit(" ", 1)[1] for line in nodes if line.startswith("character")} == {
            f"/dev/{name}"
            for name in ("null", "zero", "full", "random", "urandom", "tty", "pts/ptmx")
        }
        assert not [line for line in nodes if line.startswith("block")]
        assert seen.lines("dev_readable") == ["null", "zero", "full", "random", "urandom"]


def test_there_is_no_tree_of_devices_no_guest_device_and_no_configfs(world: World) -> None:
    for seen in world.all:
        assert seen.lines("sys") == ["/sys"]
        types = {line.partition(" - ")[2].split()[0] for line in seen.lines("mountinfo")}
        assert types <= {"overlay", "proc", "tmpfs", "devpts", "mqueue", "devtmpfs"}
        for line in seen.lines("mountinfo"):
            target = line.split()[4]
            # Single nodes of the machine's, as runtimes bind them, and no folder of them.
            if line.partition(" - ")[2].split()[0] == "devtmpfs":
                assert line.split()[3].count("/") == 1 and target.count("/") >= 2, line
        assert not inside(seen.pid, "/dev/tdx_guest").exists()


def test_its_folders_have_the_specified_modes_and_owners(world: World) -> None:
    for seen, users in ((world.plain, (0,)), (world.twin, (0,)), (world.asking, (0, 1000, 33))):
        assert seen.lines("folders") == [
            "1777 0 0 /tmp",
            "755 0 0 /run",
            "755 0 0 /run/user",
            *(f"700 {user} {user} /run/user/{user}" for user in users),
            # Nobody's who is mapped: all containers have it in common.
            "1777 65534 65534 /shared",
            "1777 0 0 /dev/shm",
        ]
        assert seen.lines("writable") == ["/tmp", "/run", "/run/user/0", "/shared", "/dev/shm"]


def test_shared_is_shared_but_only_what_was_opened_can_be_read_and_nothing_removed(
    world: World,
) -> None:
    refused = "Permission denied"
    kept = "Operation not permitted"

    def ends(lines: list[str]) -> list[str]:
        return [line.rpartition(": ")[2] for line in lines]

    assert [line for line in world.plain.lines("neighbours") if "*" not in line] == []
    assert ends(world.twin.lines("neighbours")) == ["open to all", kept, refused, kept]
    assert ends(world.asking.lines("neighbours")) == ["open to all", kept] * 2 + [refused, kept] * 2


def test_the_rest_is_read_only_unless_the_manifest_says_otherwise(world: World) -> None:
    read_only = ["/app/new Read-only file system", "/new Read-only file system"]
    for seen in (world.plain, world.twin):
        assert seen.lines("write_errors")[-2:] == read_only
    written = [
        line for line in world.asking.lines("write_errors") if line.endswith("/new is there")
    ]
    assert written == ["/app/new is there", "/new is there"]
    assert (
        inside(world.asking.pid, "/app/new").stat().st_uid
        == id_map(world.asking.facts["uid_map"])[0]
    )
    assert not inside(world.plain.pid, "/app/new").exists()


def test_settings_of_the_kernel_can_be_read_but_not_written(world: World) -> None:
    for seen in world.all:
        lines = [line for line in seen.lines("write_errors") if line.startswith("/proc/")]
        errors = {
            line.split()[0]: line.partition(" ")[2] for line in lines if "is there" not in line
        }
        assert len(errors) == 7
        if not Path("/proc/sysrq-trigger").exists():
            del errors["/proc/sysrq-trigger"]
        assert set(errors.values()) <= {"Read-only file system", "Permission denied"}
        # The one that belongs to its own ipc namespace, and so to its own root.
        assert errors["/proc/sys/kernel/msgmax"] == "Read-only file system"
        options = {line.split()[4]: line.split()[5] for line in seen.lines("mountinfo")}
        for name in {"sys", "irq", "bus", "fs"} & set(os.listdir("/proc")):
            assert "ro" in options[f"/proc/{name}"].split(","), name


def test_what_proc_tells_of_the_machine_is_masked(world: World) -> None:
    for seen in world.all:
        found = dict(line.split() for line in seen.lines("masked"))
        assert set(found) == {f"/proc/{name}" for name in MASKED & set(os.listdir("/proc"))}
        assert "/proc/keys" in found
        assert set(found.values()) == {"0"}
