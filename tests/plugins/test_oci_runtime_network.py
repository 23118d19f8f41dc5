"""Whose network a container has, and which ports it may listen on there."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from oci_runtime_rig import EXIT_WITH_ERRNO, Rig, call, running_rig, write_program

from plugins.oci_runtime import OciRuntime, network
from plugins.oci_runtime.network import PORT_START, machine_ports_from
from supervisor import ExitStatus, RuntimeFailed

pytestmark = pytest.mark.root
EACCES, ECONNREFUSED, ENETUNREACH = 13, 111, 101
OWN = OciRuntime.Config(network="own")


def address_program(number: int, address: bytes, *, family: int) -> bytes:
    """A program that makes a stream socket and one call (bind, connect) with this address."""

    def program(address_at: int) -> bytes:
        return (
            call(41, family, 1, 0)  # socket: descriptor 3
            + call(number, 3, address_at, len(address))
            + EXIT_WITH_ERRNO
        )

    code_at = 0x400000 + 64 + 56
    return program(code_at + len(program(0))) + address


def inet(host: str, port: int) -> bytes:
    return (
        struct.pack("<H", socket.AF_INET)
        + struct.pack(">H", port)
        + socket.inet_aton(host)
        + bytes(8)
    )


def connecting(address: bytes, family: int) -> bytes:
    return address_program(42, address, family=family)


def listening_at(port: int) -> bytes:
    return address_program(49, inet("0.0.0.0", port), family=socket.AF_INET)


async def exit_code_of(rig: Rig, code: bytes, *, uids: tuple[int, ...] = ()) -> int | None:
    program = write_program(rig.rootfs, "trial", code)
    container = await rig.start(rig.spec(program, log_fds=(), uids=uids))
    status = await container.wait()
    await container.destroy()
    assert status == ExitStatus(exit_code=status.exit_code)
    return status.exit_code


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Somebody on the TD's localhost."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        yield one


@pytest.fixture
def abstract_listener() -> Iterator[bytes]:
    """Somebody with an abstract name in the TD's network."""
    name = f"\0acon-test-{os.getpid()}".encode()
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(name)
        one.listen()
        yield struct.pack("<H", socket.AF_UNIX) + name


async def test_a_network_of_its_own_has_lo_alone_and_it_is_up(tmp_path: Path) -> None:
    async with running_rig(tmp_path, OWN) as rig:
        text = await rig.shell(
            "readlink /proc/self/ns/net; cat /proc/net/dev; cat /proc/net/fib_trie"
        )
    assert os.readlink("/proc/self/ns/net") not in text
    devices = [line.split(":")[0].strip() for line in text.splitlines() if ":" in line]
    assert [name for name in devices if not name.startswith(("net", "Main", "Local"))] == ["lo"]
    # Its addresses are there once it is up.
    assert "127.0.0.1" in text


async def test_a_network_of_its_own_reaches_nothing(
    tmp_path: Path, listener: socket.socket, abstract_listener: bytes
) -> None:
    port = listener.getsockname()[1]
    attempts = {
        "localhost": connecting(inet("127.0.0.1", port), socket.AF_INET),
        "elsewhere": connecting(inet("192.0.2.1", port), socket.AF_INET),
        "abstract": connecting(abstract_listener, socket.AF_UNIX),
    }
    async with running_rig(tmp_path, OWN) as rig:
        own = {name: await exit_code_of(rig, code) for name, code in attempts.items()}
    async with running_rig(tmp_path) as rig:
        shared = {
            name: await exit_code_of(rig, attempts[name]) for name in ("localhost", "abstract")
        }
    assert own == {
        "localhost": ECONNREFUSED,
        "elsewhere": ENETUNREACH,
        "abstract": ECONNREFUSED,
    }
    # Which the TD's network would have let through.
    assert shared == {"localhost": 0, "abstract": 0}


async def test_neighbours_do_not_share_a_network_of_their_own(tmp_path: Path) -> None:
    async with running_rig(tmp_path, OWN) as rig:
        both = [await rig.start(rig.spec("/bin/sleep", "60")) for _ in range(2)]
        names = {os.readlink(f"/proc/{one.pid}/ns/net") for one in both}
        for one in both:
            await one.destroy()
    assert len(names) == 2


@pytest.fixture
def usual_ports() -> Iterator[None]:
    """The kernel's own default, whatever a daemon that was killed here has left."""
    before = PORT_START.read_text()
    PORT_START.write_text("1024\n")
    yield
    PORT_START.write_text(before)


async def test_ports_below_1024_are_open_only_where_the_configuration_says_so(
    tmp_path: Path, usual_ports: None
) -> None:
    before = PORT_START.read_text()
    results = {}
    for start in (None, 80):
        config = OciRuntime.Config(unprivileged_port_start=start)
        async with running_rig(tmp_path, config) as rig:
            results[start] = [
                await exit_code_of(rig, listening_at(port)) for port in (79, 81, 1025)
            ]
    assert results == {None: [EACCES, EACCES, 0], 80: [EACCES, 0, 0]}
    assert PORT_START.read_text() == before


async def test_the_first_port_of_a_network_of_its_own_is_no_setting_of_the_td_s(
    tmp_path: Path,
) -> None:
    before = PORT_START.read_text()
    config = OciRuntime.Config(network="own", unprivileged_port_start=80)
    async with running_rig(tmp_path, config) as rig:
        assert PORT_START.read_text() == before
        assert await rig.shell("cat /proc/sys/net/ipv4/ip_unprivileged_port_start") == "80\n"


def test_a_first_port_that_cannot_be_set_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "PORT_START", tmp_path / "nowhere" / "file")
    with pytest.raises(RuntimeFailed) as caught, machine_ports_from(80):
        pass
    assert caught.value.expected == "80"
