"""Sockets to listen on: a Unix socket with exact permissions, and TLS on TCP."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import ssl
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from supervisor import ConfigError, Denied, Refusal

if TYPE_CHECKING:
    from plugins.http_api.settings import TcpSettings

_BACKLOG = 256
_SETTING = "plugin.http_api"


@contextmanager
def unix_listener(path: Path, mode: int) -> Iterator[trio.SocketListener]:
    """Listen on `path`; closes and removes it at the end, unless it is another's by then.

    The socket gets its permissions before it gets its name, so there is no moment in
    which a stranger could connect. A socket that a dead daemon left is replaced; one on
    which somebody listens is not. Raises `ConfigError`.
    """
    item = f"{_SETTING}.socket"
    _refuse_if_taken(path, item)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished.unlink(missing_ok=True)
            sock.bind(os.fspath(unfinished))
            unfinished.chmod(mode)
            sock.listen(_BACKLOG)
            unfinished.rename(path)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise ConfigError(
                item, "must be a path where a socket can be made", actual=f"{path}: {error}"
            ) from error
        own_inode = path.stat().st_ino
        sock.setblocking(False)
        try:
            yield trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        finally:
            if path.exists() and path.stat().st_ino == own_inode:
                path.unlink()
    finally:
        sock.close()


def _refuse_if_taken(path: Path, item: str) -> None:
    try:
        is_socket = stat.S_ISSOCK(path.lstat().st_mode)
    except OSError:
        return  # nothing there; binding says what else is wrong
    if not is_socket:
        raise ConfigError(item, "must not be a file of another kind", actual=path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except OSError as error:
            if error.errno == errno.ECONNREFUSED:
                return
            # EAGAIN: its backlog is full, so somebody holds it open.
        raise ConfigError(item, "must not be another daemon's socket", actual=path)


@contextmanager
def tcp_listener(settings: TcpSettings) -> Iterator[trio.SocketListener]:
    """Listen on the configured address; closes at the end. Raises `ConfigError`."""
    item = f"{_SETTING}.tcp.address"
    try:
        address = ipaddress.ip_address(settings.address)
    except ValueError:
        raise ConfigError(item, "must be an IP address", actual=settings.address) from None
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((settings.address, settings.port))
            sock.listen(_BACKLOG)
        except OSError as error:
            raise ConfigError(
                item,
                "must be an address of this machine with a free port",
                actual=f"{settings.address} port {settings.port}: {error}",
            ) from error
        sock.setblocking(False)
        yield trio.SocketListener(trio.socket.from_stdlib_socket(sock))
    finally:
        sock.close()


def tls_context(settings: TcpSettings) -> ssl.SSLContext:
    """TLS 1.3 with the configured certificate. Raises `ConfigError`."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(settings.certificate, settings.key)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(
            f"{_SETTING}.tcp",
            "certificate and key must be PEM files that belong together",
            actual=f"{settings.certificate}, {settings.key}: {error}",
        ) from error
    return context


def refuse_own_addresses(stream: trio.SocketStream) -> Refusal | None:
    """Containers share the TD's network: whoever comes from its own addresses may be one.

    A peer that has gone already counts as own. (Design, "Trust".)
    """
    try:
        peer = stream.socket.getpeername()
    except OSError:
        own, shown = True, "unknown"
    else:
        own, shown = _is_own_address(stream.socket.family, peer), str(peer[0])
    if not own:
        return None
    return Denied(
        "management API",
        "is not for callers inside this TD: they are not authenticated; use the Unix socket",
        actual=shown,
    )


def _is_own_address(family: int, peer: tuple[object, ...]) -> bool:
    # The kernel knows all addresses of this machine, loopback and IPv4-mapped ones too:
    # it lets a socket be bound to those only. Any other failure counts as own.
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((peer[0], 0, *peer[2:]))
        except OSError as error:
            return error.errno != errno.EADDRNOTAVAIL
    return True
