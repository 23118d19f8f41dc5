"""One listening Unix socket per container: the only way from inside to the supervisor."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import trio

from supervisor.errors import RuntimeFailed

BACKLOG = 64
# SO_PASSRIGHTS (`include/uapi/asm-generic/socket.h`, Linux 6.16): `socket` has no name for it.
_SO_PASSRIGHTS = 83


def prepare_socket_dir(path: Path) -> None:
    """Make the folder, and remove a predecessor's sockets. Raises `RuntimeFailed`."""
    try:
        # Others may pass through to a socket that they were given, but not list.
        path.mkdir(mode=0o711, parents=True, exist_ok=True)
        for stale in path.iterdir():
            stale.unlink()
    except OSError as error:
        raise RuntimeFailed(str(path), "must hold our sockets only", actual=error) from error


@contextmanager
def container_socket(path: Path) -> Iterator[trio.SocketListener]:
    """Listen at `path`, open to every id (only one container can reach the path).

    Nobody can send descriptors through it. We would never take them, but the kernel would
    close them in our thread, and what they are of decides how long that takes: a TCP socket
    with SO_LINGER could stop the whole supervisor. (Linux before 6.16 cannot refuse them.)
    Removes the socket at exit. Raises `RuntimeFailed`. Does not wait.
    """
    raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        try:
            path.unlink(missing_ok=True)
            raw.bind(str(path))
            path.chmod(0o666)
            # Connections have it from the listener.
            with suppress(OSError):
                raw.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
            raw.listen(BACKLOG)
        except OSError as error:
            raise RuntimeFailed(str(path), "the container's socket failed", actual=error) from error
        raw.setblocking(False)
        listening = trio.socket.from_stdlib_socket(raw)
        try:
            yield trio.SocketListener(listening)
        finally:
            listening.close()
    finally:
        raw.close()
        with suppress(OSError):
            path.unlink()
