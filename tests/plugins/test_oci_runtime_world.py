"""A container's world, seen from inside a real one."""

from __future__ import annotations

import os
import socket
import stat
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from oci_runtime_rig import EXIT_WITH_ERRNO, Rig, call, one_call, running_rig, write_program

from plugins.oci_runtime import OciRuntime
from plugins.oci_runtime.seccomp import COMMON_PROFILE
from supervisor import ExitStatus, PolicyDenied

pytestmark = pytest.mark.root


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with running_rig(tmp_path) as rig:
        yield rig


def status_field(text: str, name: str) -> str:
    return dict(line.split(":", 1) for line in text.splitlines())[name].strip()


async def test_only_the_given_ids_are_mapped(rig: Rig) -> None:
    spec = rig.spec("/bin/cat", "/proc/self/uid_map", "/proc/self/gid_map", uids=(1000,))
    lines = [line.split() for line in (await rig.output_of(spec)).splitlines()]
    expected = [[str(inside), str(outside), "1"] for inside, outside in spec.id_map.pairs]
    assert lines == expected + expected


async def test_the_program_is_root_without_further_groups(rig: Rig) -> None:
    text = await rig.output_of(rig.spec("/bin/cat", "/proc/self/status"))
    assert status_field(text, "Uid").split() == ["0"] * 4
    assert status_field(text, "Gid").split() == ["0"] * 4
    assert status_field(text, "Groups") == ""


async def test_umask_session_and_group_are_as_the_specification_says(rig: Rig) -> None:
    text = await rig.output_of(rig.spec("/bin/cat", "/proc/self/status"))
    assert status_field(text, "Umask") == "0077"
    assert status_field(text, "NSpid") == "1"
    assert status_field(text, "NSsid") == "1"
    assert status_field(text, "NSpgid") == "1"


async def test_every_namespace_but_the_network_is_its_own(rig: Rig) -> None:
    names = ("user", "pid", "mnt", "ipc", "uts", "cgroup", "net")
    text = await rig.shell("for n in " + " ".join(names) + "; do readlink /proc/self/ns/$n; done")
    inside = dict(zip(names, text.split(), strict=True))
    outside = {name: os.readlink(f"/proc/self/ns/{name}") for name in names}
    assert {name for name in names if inside[name] == outside[name]} == {"net"}


async def test_privileges_are_bounded_and_cannot_grow(rig: Rig) -> None:
    text = await rig.output_of(rig.spec("/bin/cat", "/proc/self/status"))
    # CHOWN 0, DAC_OVERRIDE 1, FOWNER 3, FSETID 4, KILL 5, SETGID 6, SETUID 7, SETPCAP 8,
    # NET_BIND_SERVICE 10, SYS_CHROOT 18, SETFCAP 31 (capability.h)
    expected = sum(1 << bit for bit in (0, 1, 3, 4, 5, 6, 7, 8, 10, 18, 31))
    for name in ("CapPrm", "CapEff", "CapBnd"):
        assert int(status_field(text, name), 16) == expected
    for name in ("CapInh", "CapAmb"):
        assert int(status_field(text, name), 16) == 0
    assert status_field(text, "NoNewPrivs") == "1"
    assert status_field(text, "Seccomp") == "2"


async def test_new_privileges_are_possible_only_where_the_spec_says_so(rig: Rig) -> None:
    text = await rig.output_of(rig.spec("/bin/cat", "/proc/self/status", uids=(1000,)))
    assert status_field(text, "NoNewPrivs") == "0"
    assert status_field(text, "Seccomp") == "2"


async def test_what_is_mounted_is_exactly_this(rig: Rig) -> None:
    text = await rig.output_of(rig.spec("/bin/cat", "/proc/self/mounts"))
    targets = {line.split()[1] for line in text.splitlines()}
    devices = {f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "tty")}
    own = {"/", "/proc", "/dev", "/dev/pts", "/dev/shm", "/dev/mqueue"}
    scratch = {"/tmp", "/run", "/run/acon.sock", "/shared", "/shared/acon.sock"}
    hidden = {target for target in targets if target.startswith("/proc/")}
    assert targets - hidden == own | devices | scratch
    assert "/proc/sys" in hidden


async def test_what_is_mounted_is_restricted(rig: Rig) -> None:
    text = await rig.output_of(rig.spec("/bin/cat", "/proc/self/mountinfo"))
    options = {line.split()[4]: set(line.split()[5].split(",")) for line in text.splitlines()}
    for target in ("/tmp", "/run", "/shared", "/run/acon.sock", "/shared/acon.sock"):
        assert {"nosuid", "nodev"} <= options[target], target
    for target in ("/proc", "/dev/shm", "/dev/mqueue"):
        assert {"nosuid", "nodev", "noexec"} <= options[target], target
    for target in ("/dev", "/dev/pts"):
        assert {"nosuid", "noexec"} <= options[target], target


async def test_the_root_is_read_only_unless_writable(rig: Rig) -> None:
    denied = await rig.shell("touch place/file 2>&1 || echo refused")
    assert "Read-only file system" in denied
    assert "refused" in denied
    (rig.rootfs / "place").chmod(0o777)
    spec = rig.spec("/bin/touch", "place/file", writable_root=True)
    await rig.output_of(spec)
    assert (rig.rootfs / "place" / "file").stat().st_uid == spec.id_map.root


async def test_temporary_folders_have_their_modes_and_owners(rig: Rig) -> None:
    folders = "/tmp /run /run/user /run/user/0 /run/user/1000 /shared"
    text = await rig.shell(f"stat -c '%a %u %n' {folders}", uids=(1000,))
    assert text.splitlines() == [
        "1777 0 /tmp",
        "755 0 /run",
        "755 0 /run/user",
        "700 0 /run/user/0",
        "700 1000 /run/user/1000",
        "1777 65534 /shared",
    ]
    script = "for d in /tmp /run /run/user/0 /shared /dev/shm; do echo $d > $d/f && cat $d/f; done"
    assert (await rig.shell(script)).split() == [
        "/tmp",
        "/run",
        "/run/user/0",
        "/shared",
        "/dev/shm",
    ]


async def test_scratch_space_is_bounded(tmp_path: Path) -> None:
    config = OciRuntime.Config(scratch_size_mib=1, shared_size_mib=1)
    fill = (
        "dd if=/dev/zero of={0}/f bs=1M count=2",
        # Empty ones, which take no room but that of the kernel.
        "mkdir {0}/d && cd {0}/d && touch $(seq 1200)",
    )
    async with running_rig(tmp_path, config) as rig:
        for folder in ("/tmp", "/shared"):
            for script in fill:
                clear = f"rm -rf {folder}/f {folder}/d"
                line = f"({script.format(folder)}) > /tmp/words 2>&1 || echo full; {clear}"
                assert await rig.shell(line) == "full\n", (folder, script)


async def test_shared_is_shared_and_tmp_is_not(rig: Rig) -> None:
    first = "umask 0; echo hello > /shared/note; echo secret > /tmp/note"
    await rig.shell(first)
    text = await rig.shell("cat /shared/note; ls -A /tmp | wc -l; rm -f /shared/note 2>&1 || true")
    lines = text.splitlines()
    assert lines[:2] == ["hello", "0"]
    # Sticky: a neighbour's file cannot be removed.
    assert "not permitted" in lines[2]


async def test_nothing_of_the_machine_is_visible(rig: Rig) -> None:
    text = await rig.shell("find /sys | wc -l; find /dev -type b | wc -l; ls -A /dev")
    lines = text.split()
    assert lines[:2] == ["1", "0"]
    devices = "fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero"
    # A runtime links core to the masked /proc/kcore where the kernel has one.
    assert set(lines[2:]) - {"core"} == set(devices.split())
    gone = "/dev/tdx_guest /dev/kmsg /dev/mem /sys/kernel /sys/devices /sys/firmware"
    text = await rig.shell(f"for f in {gone}; do test -e $f && echo $f; done; true")
    assert text == ""


async def test_the_register_cannot_be_reached_by_mounting_or_making_devices(rig: Rig) -> None:
    attempts = (
        "mount -t sysfs sysfs /tmp",
        "mount -t configfs configfs /tmp",
        "mount -t devtmpfs devtmpfs /tmp",
        "mknod /tmp/tdx_guest c 10 125",
        "mknod /tmp/mem c 1 1",
        "unshare -U -m true",
        "unshare -m true",
        "echo 1 > /proc/sys/kernel/randomize_va_space",
        "cat /proc/1/root/../../sys/kernel",
        "umount /proc/sys",
    )
    for attempt in attempts:
        text = await rig.shell(f"({attempt}) 2>/dev/null && echo succeeded; true")
        assert text == "", attempt


async def test_masked_parts_of_proc_are_empty_and_read_only(rig: Rig) -> None:
    paths = {"keys", "timer_list", "kcore", "interrupts"} & set(os.listdir("/proc"))
    assert paths
    for path in (f"/proc/{name}" for name in paths):
        assert await rig.shell(f"head -c 10 {path}") == "", path
    assert "Read-only" in await rig.shell("touch /proc/sys/kernel/hostname 2>&1 || true")


async def test_other_processes_of_the_machine_are_invisible(rig: Rig) -> None:
    text = await rig.shell("ls -d /proc/[0-9]* | wc -l")
    assert int(text) <= 4


async def test_hostname_and_working_directory_are_its_own(rig: Rig) -> None:
    spec = rig.spec("/bin/sh", "-c", "hostname; pwd", working_dir="/place")
    assert (await rig.output_of(spec)).split() == [f"acon-{spec.container_id}", "/place"]


async def test_the_environment_is_exact_whatever_the_runtime_adds(rig: Rig) -> None:
    (rig.rootfs / "etc").mkdir()
    (rig.rootfs / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    for environment in (
        (),
        ("A=1", "B=two words", "EMPTY=", "PATH=/bin", "UNICODE=ü"),
        ("A=1", "HOME=/nowhere"),
        ("HOME=", "Z=1", "A=2", "A=1"),
    ):
        spec = rig.spec("/bin/cat", "/proc/self/environ", environment=environment)
        seen = await rig.output_of(spec)
        assert seen == "".join(f"{entry}\0" for entry in environment)


async def test_arguments_are_exact(rig: Rig) -> None:
    argv = ("/bin/cat", "--", "/proc/self/cmdline")
    assert (await rig.output_of(rig.spec(*argv))) == "".join(f"{word}\0" for word in argv)


async def test_standard_input_is_empty_and_no_other_descriptor_is_open(rig: Rig) -> None:
    # ls itself holds one more: the folder that it lists.
    text = await rig.shell("cat | wc -c; ls /proc/self/fd")
    assert text.split() == ["0", "0", "1", "2", "3"]


async def test_log_descriptors_are_open_and_the_gaps_between_them_are_not(rig: Rig) -> None:
    script = "ls /proc/$$/fd; echo three >&3; echo five >&5; (echo four >&4) 2>/dev/null || true"
    container = await rig.start(rig.spec("/bin/sh", "-c", script, log_fds=(1, 3, 5)))
    status = await container.wait()
    await container.destroy()
    assert status == ExitStatus(exit_code=0)
    assert container.log.text(1).split() == [b"0", b"1", b"2", b"3", b"5"]
    assert container.log.text(3) == b"three\n"
    assert container.log.text(5) == b"five\n"
    assert {fd for fd, _ in container.log.chunks} == {1, 3, 5}


async def test_log_descriptors_above_what_can_be_given_are_refused(rig: Rig) -> None:
    spec = rig.spec("/bin/sh", "-c", "echo last >&63", log_fds=(63,))
    assert await rig.output_of(spec) == "last\n"
    with pytest.raises(PolicyDenied) as caught:
        await rig.start(rig.spec("/bin/true", log_fds=(64,)))
    assert caught.value.expected == "0 to 63"
    assert rig.remains() == []


async def test_both_places_of_the_socket_show_the_container_s_own(rig: Rig) -> None:
    text = await rig.shell("stat -c '%F %i' /run/acon.sock /shared/acon.sock")
    first, second = text.splitlines()
    assert first.startswith("socket ")
    assert first == second


async def test_no_container_can_take_the_socket_s_place_away(rig: Rig) -> None:
    attempts = (
        "rm -f /run/acon.sock",
        "rm -f /shared/acon.sock",
        "mv /shared/acon.sock /shared/other",
        "ln -sf /tmp/evil /shared/acon.sock",
        "mv /run/acon.sock /run/other",
        "umount /shared/acon.sock",
    )
    for attempt in attempts:
        assert await rig.shell(f"({attempt}) 2>/dev/null && echo done; true") == "", attempt


async def test_the_machine_s_own_folders_stay_closed(rig: Rig) -> None:
    assert stat.S_IMODE(rig.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((rig.folder / "bundles").stat().st_mode) == 0o700
    assert stat.S_IMODE((rig.folder / "state").stat().st_mode) == 0o700


# --- system calls: a program that makes one and exits with its errno -------------------------

EPERM, EBADF, ENOSYS, EAFNOSUPPORT = 1, 9, 38, 97
CLONE_NEWUSER, SIGCHLD = 0x10000000, 17


def connect_as(user: int) -> bytes:
    """Become `user`, connect to /run/acon.sock, exit with the errno of that."""
    address = struct.pack("<H", 1) + b"/run/acon.sock\0"

    def program(address_at: int) -> bytes:
        return (
            call(117, user, user, user)  # setresuid
            + call(41, 1, 1, 0)  # socket: descriptor 3
            + call(42, 3, address_at, len(address))  # connect
            + EXIT_WITH_ERRNO
        )

    code_at = 0x400000 + 64 + 56
    return program(code_at + len(program(0))) + address


async def test_any_mapped_user_can_connect_to_the_container_s_socket(rig: Rig) -> None:
    for user in (0, 1000):
        program = write_program(rig.rootfs, f"connect{user}", connect_as(user))
        spec = rig.spec(program, uids=(1000,))
        assert await rig.output_of(spec) == ""
        listener = rig.sockets[spec.container_id]
        listener.setblocking(False)
        connection, _ = listener.accept()
        with connection:
            peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        assert struct.unpack("<iII", peer)[1] == dict(spec.id_map.pairs)[user]


CALLS = {
    "mount": (165, (0, 0, 0, 0, 0), EPERM),
    "umount2": (166, (0, 0), EPERM),
    "unshare": (272, (CLONE_NEWUSER,), EPERM),
    "setns": (308, (99, 0), EPERM),
    "keyctl": (250, (0, 0xFFFFFFFD, 1), EPERM),
    "add_key": (248, (0, 0, 0, 0, 0), EPERM),
    "bpf": (321, (0, 0, 0), EPERM),
    "ptrace": (101, (0, 0, 0, 0), EPERM),
    "userfaultfd": (323, (1,), EPERM),
    "perf_event_open": (298, (0, 0, 0, 0, 0), EPERM),
    "io_uring_setup": (425, (1, 0), EPERM),
    "open_by_handle_at": (304, (0, 0, 0), EPERM),
    "fsopen": (430, (0, 0), EPERM),
    "init_module": (175, (0, 0, 0), EPERM),
    "kexec_load": (246, (0, 0, 0, 0), EPERM),
    "clone3": (435, (0, 0), ENOSYS),
}


@pytest.mark.parametrize("profile", ["auto", "builtin"])
async def test_dangerous_system_calls_are_refused_by_the_filter(
    tmp_path: Path, profile: str
) -> None:
    # auto refuses what it does not list with ENOSYS, builtin names its own errors.
    if profile == "auto" and not COMMON_PROFILE.exists():
        pytest.skip(f"{COMMON_PROFILE} (golang-github-containers-common) is not installed")
    builtin = profile == "builtin"
    calls = {
        # Controls: the program reports what the kernel says, and ordinary calls pass.
        "close": (3, (99,), EBADF),
        "socket_unix": (41, (1, 1, 0), 256 - 3),
        "socket_inet": (41, (2, 1, 0), 256 - 3),
        **CALLS,
        "clone_newuser": (56, (CLONE_NEWUSER | SIGCHLD, 0), EPERM if builtin else ENOSYS),
        "socket_vsock": (41, (40, 1, 0), EAFNOSUPPORT if builtin else ENOSYS),
        "socket_alg": (41, (38, 5, 0), EAFNOSUPPORT if builtin else ENOSYS),
    }
    results = {}
    async with running_rig(tmp_path, OciRuntime.Config(seccomp_profile=profile)) as rig:
        for name, (number, arguments, _) in calls.items():
            program = write_program(rig.rootfs, f"call_{name}", one_call(number, *arguments))
            container = await rig.start(rig.spec(program, log_fds=()))
            results[name] = (await container.wait()).exit_code
            await container.destroy()
    assert results == {name: expected for name, (_, _, expected) in calls.items()}


async def test_a_program_of_another_system_call_table_is_killed(rig: Rig) -> None:
    # mov eax, 1 (32-bit exit); xor ebx, ebx; int 0x80
    code = bytes.fromhex("b80100000031dbcd80")
    container = await rig.start(rig.spec(write_program(rig.rootfs, "call32", code), log_fds=()))
    status = await container.wait()
    await container.destroy()
    assert (status.exit_code, status.signal) == (None, 31)
