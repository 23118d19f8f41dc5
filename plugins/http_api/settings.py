"""What the operator may set of the HTTP servers. Bounds are in bytes, times in seconds."""

from __future__ import annotations

from typing import Annotated

import msgspec

_Count = Annotated[int, msgspec.Meta(ge=1, le=65_536)]
_Bytes = Annotated[int, msgspec.Meta(ge=1_024, le=1 << 30)]
_Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]


class TcpSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """TLS on TCP. `address` is an IP literal; `certificate` and `key` are PEM files."""

    address: str
    port: Annotated[int, msgspec.Meta(ge=1, le=65_535)]
    certificate: str
    key: str


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`socket_mode` is octal, as chmod takes it. Without `tcp` there is no TCP at all."""

    socket: str = "/run/acond/api.sock"
    socket_mode: Annotated[str, msgspec.Meta(pattern="^0[0-7]{3}$")] = "0600"
    tcp: TcpSettings | None = None
    max_connections: _Count = 512
    max_requests: _Count = 256
    # One request's body; and all bodies, and what commands write, that are held in memory.
    max_request_bytes: _Bytes = 4 << 20
    max_buffered_bytes: _Bytes = 64 << 20
    # A whole request; one that waits for a command or a restart has it besides their time.
    request_deadline_s: _Seconds = 60.0
    # Layers: the whole request, the pause between two chunks, and how long bytes whose
    # sender went away wait for it to come back.
    transfer_deadline_s: _Seconds = 3_600.0
    upload_pause_s: _Seconds = 30.0
    upload_keep_s: _Seconds = 120.0
    max_uploads: _Count = 16
    # Those who follow a log or the events: an empty line so often that the vanished are
    # noticed, and after how long they are asked to come back.
    max_followers: _Count = 128
    follow_heartbeat_s: _Seconds = 15.0
    follow_deadline_s: _Seconds = 600.0
    kept_events_kib: Annotated[int, msgspec.Meta(ge=4, le=65_536)] = 256
    # Each container's own socket.
    container_max_connections: _Count = 16
    container_max_request_bytes: _Bytes = 64 << 10
    shutdown_s: _Seconds = 3.0
