"""What cannot be done to the supervisor through a container's socket."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from supervisor.container_socket import container_socket

SO_PASSRIGHTS = 83


def refuses_descriptors() -> bool:
    """Linux 6.16 and later."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
        except OSError:
            return False
    return True


@pytest.mark.skipif(not refuses_descriptors(), reason="the kernel lets everybody send descriptors")
@pytest.mark.parametrize("accepted", [False, True])
async def test_nobody_can_have_the_supervisor_close_descriptors(
    tmp_path: Path, accepted: bool
) -> None:
    """Of what was sent the last close is ours: one of a lingering TCP socket took as long as
    its sender wanted, and the whole supervisor stood still."""
    path = tmp_path / "1.sock"
    with container_socket(path) as listener, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        stream = await listener.accept() if accepted else None
        with pytest.raises(PermissionError):
            socket.send_fds(client, [b"G"], [client.fileno()])
        client.sendall(b"GET")
        if stream is None:
            stream = await listener.accept()
        async with stream:
            assert await stream.receive_some() == b"GET"
