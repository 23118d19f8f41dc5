"""TLS on TCP: only where configured, and never for callers inside this TD."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
import trio
from http_fakes import FakeOperations, ask, served
from tls_files import TlsFiles, make_tls_files

from acon.client import Client
from plugins.http_api.listeners import refuse_own_addresses, tls_context
from plugins.http_api.settings import TcpSettings
from supervisor import ConfigError, Denied


def free_port(address: str = "127.0.0.1") -> int:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
        return port


def tcp(files: TlsFiles, address: str, port: int) -> dict[str, object]:
    return {
        "address": address,
        "port": port,
        "certificate": str(files.certificate),
        "key": str(files.key),
    }


@pytest.mark.parametrize(
    ("listens_on", "connects_to"),
    [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.2"), ("::", "::1"), ("::", "127.0.0.1")],
)
async def test_a_caller_from_this_machines_own_addresses_is_refused(
    tmp_path: Path, listens_on: str, connects_to: str
) -> None:
    files = make_tls_files(tmp_path, connects_to)
    port = free_port(listens_on)
    operations = FakeOperations()
    shown = f"[{connects_to}]" if ":" in connects_to else connects_to
    async with served(operations, tmp_path, tcp=tcp(files, listens_on, port)) as unix_socket:
        async with Client.over_url(f"https://{shown}:{port}", ca_file=files.certificate) as client:
            with pytest.raises(Denied) as caught:
                await client.seal()
        assert (await ask(unix_socket, "GET", "/api/v2/images")).status == 200
    assert caught.value.actual in ("127.0.0.1", "::1", "::ffff:127.0.0.1")
    assert not operations.sealed


async def test_tcp_speaks_tls_1_3_and_nothing_else(tmp_path: Path) -> None:
    files = make_tls_files(tmp_path, "127.0.0.1")
    port = free_port()
    old = ssl.create_default_context(cafile=files.certificate)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    async with served(FakeOperations(), tmp_path, tcp=tcp(files, "127.0.0.1", port)):
        async with await trio.open_tcp_stream("127.0.0.1", port) as plain:
            with trio.fail_after(5):
                await plain.send_all(b"GET /api/v2/images HTTP/1.1\r\nHost: td\r\n\r\n")
                answer = b""
                try:
                    while chunk := await plain.receive_some(4096):
                        answer += chunk
                except trio.BrokenResourceError:
                    pass
        assert b"HTTP" not in answer
        stream = await trio.open_ssl_over_tcp_stream("127.0.0.1", port, ssl_context=old)
        async with stream:
            with trio.fail_after(5), pytest.raises(trio.BrokenResourceError):
                await stream.do_handshake()


async def test_without_tcp_settings_nothing_listens_on_tcp(tmp_path: Path) -> None:
    async with served(FakeOperations(), tmp_path):
        own = {
            os.readlink(f"/proc/self/fd/{name}")
            for name in os.listdir("/proc/self/fd")
            if os.path.lexists(f"/proc/self/fd/{name}")
        }
        inodes = {link[8:-1] for link in own if link.startswith("socket:[")}
        tcp_table = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
    listening = {
        fields[9] for fields in map(str.split, tcp_table.splitlines()) if fields[3] == "0A"
    }
    assert not inodes & listening


class _Peer:
    """A connected socket as the judge sees it."""

    def __init__(self, family: int, peer: tuple[object, ...] | None) -> None:
        self.family = family
        self.socket = self
        self._peer = peer

    def getpeername(self) -> tuple[object, ...]:
        if self._peer is None:
            raise OSError(errno.ENOTCONN, "gone")
        return self._peer


@pytest.mark.parametrize(
    ("family", "peer", "refused"),
    [
        (socket.AF_INET, ("127.0.0.1", 9), True),
        (socket.AF_INET, ("127.8.9.10", 9), True),
        (socket.AF_INET, ("192.0.2.1", 9), False),
        (socket.AF_INET6, ("::1", 9, 0, 0), True),
        (socket.AF_INET6, ("::ffff:127.0.0.1", 9, 0, 0), True),
        (socket.AF_INET6, ("::ffff:192.0.2.1", 9, 0, 0), False),
        (socket.AF_INET6, ("2001:db8::1", 9, 0, 0), False),
        (socket.AF_INET, ("no address", 9), True),
        (socket.AF_INET, None, True),
    ],
)
def test_own_addresses_are_known_in_every_form(
    family: int, peer: tuple[object, ...] | None, refused: bool
) -> None:
    stream = cast("trio.SocketStream", _Peer(family, peer))
    assert isinstance(refuse_own_addresses(stream), Denied) == refused


@pytest.mark.parametrize(
    ("change", "item"),
    [
        ({"address": "localhost"}, "plugin.http_api.tcp.address"),
        ({"address": "192.0.2.1"}, "plugin.http_api.tcp.address"),
        ({"certificate": "/nowhere"}, "plugin.http_api.tcp"),
        ({"key": "swapped"}, "plugin.http_api.tcp"),
    ],
)
async def test_wrong_tcp_settings_end_the_start_by_name(
    tmp_path: Path, change: dict[str, str], item: str
) -> None:
    files = make_tls_files(tmp_path, "127.0.0.1")
    settings = {**tcp(files, "127.0.0.1", free_port()), **change}
    if settings["key"] == "swapped":
        settings["key"] = str(files.certificate)
    with pytest.RaisesGroup(ConfigError, flatten_subgroups=True) as caught:
        async with served(FakeOperations(), tmp_path, tcp=settings):
            raise RuntimeError("served with wrong settings")
    [error] = caught.value.exceptions
    assert isinstance(error, ConfigError)
    assert error.item == item
    assert not (tmp_path / "api.sock").exists()


def test_a_certificate_file_that_is_no_certificate_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.pem"
    broken.write_text("nothing")
    settings = TcpSettings(address="127.0.0.1", port=1, certificate=str(broken), key=str(broken))
    with pytest.raises(ConfigError, match=r"broken\.pem"):
        tls_context(settings)


@pytest.fixture
def neighbour() -> Iterator[str]:
    """A network namespace of its own, wired to this one: another machine, in effect."""
    if shutil.which("ip") is None:
        pytest.skip("ip (iproute2), which wires up another machine, is not installed")
    name = f"acontest{secrets.token_hex(3)}"
    inside, outside = f"i{name[-6:]}", f"o{name[-6:]}"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)

    ip("netns", "add", name)
    try:
        ip("link", "add", outside, "type", "veth", "peer", "name", inside, "netns", name)
        ip("addr", "add", "198.51.100.1/30", "dev", outside)
        ip("link", "set", outside, "up")
        ip("-n", name, "addr", "add", "198.51.100.2/30", "dev", inside)
        ip("-n", name, "link", "set", inside, "up")
        yield name
    finally:
        ip("netns", "del", name)


_SEAL_FROM_THERE = """
import sys, trio
from pathlib import Path
from acon.client import Client
async def main() -> None:
    async with Client.over_url(sys.argv[1], ca_file=Path(sys.argv[2])) as client:
        await client.seal()
trio.run(main)
"""


@pytest.mark.root
async def test_a_caller_from_another_machine_is_served(tmp_path: Path, neighbour: str) -> None:
    files = make_tls_files(tmp_path, "198.51.100.1")
    port = free_port("198.51.100.1")
    operations = FakeOperations()
    command = [
        *("ip", "netns", "exec", neighbour, sys.executable, "-c", _SEAL_FROM_THERE),
        *(f"https://198.51.100.1:{port}", str(files.certificate)),
    ]
    async with served(operations, tmp_path, tcp=tcp(files, "198.51.100.1", port)):
        with trio.fail_after(60):
            await trio.run_process(command, cwd=Path(__file__).parents[2])
    assert operations.sealed
