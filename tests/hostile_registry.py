"""A registry on loopback that is honest until it is told to misbehave."""

from __future__ import annotations

import base64
import itertools
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qsl, urlsplit

import h11
import msgspec
import trio
from honest_registry import Contents, Reply, Request, error
from tls_files import TlsFiles

from plugins.image_store.config import RegistryConfig

Change = Callable[[Request, Reply], Reply]
PIECE_BYTES = 64 * 1024


class Fault(msgspec.Struct):
    """A change of honest replies: to the next `times` requests (None: all) that match."""

    change: Change
    method: str
    on: str
    times: int | None

    def matches(self, request: Request) -> bool:
        return self.times != 0 and self.method in ("", request.method) and self.on in request.path


class HostileRegistry:
    """A registry in this process, at `name` (127.0.0.1:PORT), over plain HTTP or TLS.

    Fill it through `contents` (`add_blob`, `add_manifest`), or push to it. `requests` has all
    that it saw, `logins` the Authorization headers among them (None where there was none).
    Say `demand = "basic"` or "bearer" to have it want `user` and `password`; tokens come from
    its own `/token` (`token_realm` names another one), also for the `identity_token`, and to
    strangers for pulling if `is_public`. `misbehave(cut(1000), times=1)` changes replies: the
    functions below say how. `config` is the table a client needs to reach it.
    """

    def __init__(self, port: int, tls: TlsFiles | None) -> None:
        self.name = f"127.0.0.1:{port}"
        self.url = f"{'http' if tls is None else 'https'}://{self.name}"
        self.ca_file: Path | None = None if tls is None else tls.certificate
        self.contents = Contents()
        self.requests: list[Request] = []
        self.demand: Literal["nothing", "basic", "bearer"] = "nothing"
        self.user, self.password, self.identity_token = "reader", "s3cret-pass", "refresh-t0ken"
        self.is_public = False
        self.token_realm = f"{self.url}/token"
        self.token_lifetime_s: int = 300
        self.tokens: dict[str, str] = {}
        self.connections = 0
        self._faults: list[Fault] = []
        self._numbers = itertools.count(1)

    @property
    def config(self) -> RegistryConfig:
        return RegistryConfig(ca_file=None if self.ca_file is None else str(self.ca_file))

    @property
    def logins(self) -> list[str | None]:
        return [request.authorization for request in self.requests]

    @property
    def basic(self) -> str:
        pair = f"{self.user}:{self.password}".encode()
        return f"Basic {base64.b64encode(pair).decode()}"

    def misbehave(
        self, change: Change, *, on: str = "/blobs/", method: str = "GET", times: int | None = None
    ) -> Fault:
        """Change the replies to requests of `method` ("": all) whose path holds `on`."""
        fault = Fault(change, method, on, times)
        self._faults.append(fault)
        return fault

    def behave(self) -> None:
        self._faults.clear()

    # --- answers ------------------------------------------------------------------------------

    def reply(self, request: Request) -> Reply:
        self.requests.append(request)
        refused = None if request.path == "/token" else self._unauthorized(request)
        if refused is not None:
            honest = refused
        elif request.path == "/token":
            honest = self._token(request)
        else:
            honest = self.contents.reply(request)
        for fault in self._faults:
            if fault.matches(request) and refused is None:
                honest = fault.change(request, honest)
                if fault.times is not None:
                    fault.times -= 1
        return honest

    def _unauthorized(self, request: Request) -> Reply | None:
        if self.demand == "nothing":
            return None
        given = request.authorization
        if self.demand == "basic":
            if given == self.basic:
                return None
            return error(401, "UNAUTHORIZED", **{"www-authenticate": 'Basic realm="here"'})
        name = request.path.removeprefix("/v2/").rsplit("/blobs/")[0].rsplit("/manifests/")[0]
        action = "pull" if request.method in ("GET", "HEAD") else "push"
        scope = self.tokens.get((given or "").removeprefix("Bearer "), "")
        if action in scope.rpartition(":")[2].split(","):
            return None
        demanded = (
            f'Bearer realm="{self.token_realm}",service="{self.name}",'
            f'scope="repository:{name}:{action}"'
        )
        return error(401, "UNAUTHORIZED", **{"www-authenticate": demanded})

    def _token(self, request: Request) -> Reply:
        form = dict(parse_qsl(request.body.decode()))
        asked = form if request.method == "POST" else request.query
        scope = asked.get("scope", "")
        knows = form.get("refresh_token") == self.identity_token or (
            request.authorization == self.basic
        )
        if not knows and not (self.is_public and scope.endswith(":pull")):
            return error(401, "UNAUTHORIZED", "wrong login")
        token = f"t0ken-{next(self._numbers)}"
        self.tokens[token] = scope
        field = "access_token" if request.method == "POST" else "token"
        body = msgspec.json.encode({field: token, "expires_in": self.token_lifetime_s})
        return Reply(status=200, headers={"content-type": "application/json"}, body=body)

    # --- the wire -----------------------------------------------------------------------------

    async def _serve(self, stream: trio.abc.Stream) -> None:
        self.connections += 1
        try:
            connection = h11.Connection(h11.SERVER)
            while (request := await _receive(connection, stream)) is not None:
                await self._send(connection, stream, request, self.reply(request))
                if connection.our_state is not h11.DONE:
                    break
                connection.start_next_cycle()
            await stream.aclose()
        except (trio.BrokenResourceError, trio.ClosedResourceError, h11.RemoteProtocolError):
            await trio.aclose_forcefully(stream)

    async def _send(
        self, connection: h11.Connection, stream: trio.abc.Stream, request: Request, reply: Reply
    ) -> None:
        headers = list(reply.headers.items())
        if reply.is_chunked:
            headers.append(("transfer-encoding", "chunked"))
        else:
            length = len(reply.body) if reply.length is None else reply.length
            headers.append(("content-length", str(length)))
        head = h11.Response(status_code=reply.status, headers=headers)
        await stream.send_all(connection.send(head) or b"")
        if request.method != "HEAD":
            whole = await _send_body(connection, stream, reply)
            if not whole:
                return
        try:
            await stream.send_all(connection.send(h11.EndOfMessage()) or b"")
        except h11.LocalProtocolError:
            # The body was shorter than its Content-Length said: the connection ends here.
            return


async def _send_body(connection: h11.Connection, stream: trio.abc.Stream, reply: Reply) -> bool:
    """Whether the message may go on to its proper end."""
    body = reply.body if reply.stop_at is None else reply.body[: reply.stop_at]
    piece_bytes, pause_s = reply.pace or (PIECE_BYTES, 0.0)
    while True:
        for at in range(0, len(body), piece_bytes):
            await stream.send_all(connection.send(h11.Data(body[at : at + piece_bytes])) or b"")
            await trio.sleep(pause_s)
        if not reply.is_endless:
            break
    if reply.then == "stall":
        await trio.sleep_forever()
    return reply.then == "end"


async def _receive(connection: h11.Connection, stream: trio.abc.Stream) -> Request | None:
    """The next request; None at the end of the connection."""
    head: h11.Request | None = None
    body = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(bytes(await stream.receive_some(PIECE_BYTES)))
        elif isinstance(event, h11.Request):
            head = event
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage) and head is not None:
            target = urlsplit(head.target.decode())
            return Request(
                method=head.method.decode(),
                path=target.path,
                query=dict(parse_qsl(target.query)),
                headers={name.decode(): value.decode() for name, value in head.headers},
                body=bytes(body),
            )
        else:
            return None


@asynccontextmanager
async def hostile_registry(*, tls: TlsFiles | None = None) -> AsyncIterator[HostileRegistry]:
    """It runs while the body does. `tls`: from `tls_files.make_tls_files(…, "127.0.0.1")`."""
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    registry = HostileRegistry(listener.socket.getsockname()[1], tls)
    listeners: list[trio.SocketListener | trio.SSLListener[trio.SocketStream]] = [listener]
    if tls is not None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(tls.certificate, tls.key)
        listeners = [trio.SSLListener(listener, context, https_compatible=True)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, registry._serve, listeners)
        try:
            yield registry
        finally:
            nursery.cancel_scope.cancel()


# --- how to misbehave -------------------------------------------------------------------------


def answered(status: int, code: str = "UNAVAILABLE", message: str = "", **headers: str) -> Change:
    """An error's status instead; `_` in header names stands for `-`."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda request, reply: error(status, code, message, **named)


def other_body(body: bytes) -> Change:
    """Other bytes under the same name."""
    return lambda request, reply: msgspec.structs.replace(reply, body=body)


def flipped() -> Change:
    """One bit of the body is wrong."""
    return lambda request, reply: msgspec.structs.replace(
        reply, body=bytes([reply.body[0] ^ 1]) + reply.body[1:]
    )


def longer(by: bytes, *, is_chunked: bool = False) -> Change:
    """More bytes after the right ones; said by Content-Length unless `is_chunked`."""
    return lambda request, reply: msgspec.structs.replace(
        reply, body=reply.body + by, is_chunked=is_chunked
    )


def shorter(by: int, *, is_chunked: bool = False) -> Change:
    """The last bytes are left out, and the message ends properly."""
    return lambda request, reply: msgspec.structs.replace(
        reply, body=reply.body[: len(reply.body) - by], is_chunked=is_chunked
    )


def endless() -> Change:
    """The body again and again, chunked."""
    return lambda request, reply: msgspec.structs.replace(reply, is_endless=True, is_chunked=True)


def cut(at: int) -> Change:
    """The connection breaks after so many bytes of the body."""
    return lambda request, reply: msgspec.structs.replace(reply, stop_at=at, then="close")


def stalled(at: int) -> Change:
    """Nothing more comes after so many bytes of the body."""
    return lambda request, reply: msgspec.structs.replace(reply, stop_at=at, then="stall")


def trickling(piece_bytes: int, every_s: float) -> Change:
    """The body comes in drops."""
    return lambda request, reply: msgspec.structs.replace(reply, pace=(piece_bytes, every_s))


def without_ranges(contents: Contents, *, status: int = 200) -> Change:
    """Range is not known: all of the blob is sent (200), or nothing (another status)."""

    def change(request: Request, reply: Reply) -> Reply:
        if "range" not in request.headers:
            return reply
        if status != 200:
            return Reply(status=status)
        return Reply(status=200, body=contents.blobs[request.path.rpartition("/")[2]])

    return change


def with_headers(**headers: str) -> Change:
    """Further or other headers; `_` in their names stands for `-`."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda request, reply: msgspec.structs.replace(reply, headers={**reply.headers, **named})


def redirected(to: str, *, status: int = 307) -> Change:
    """To `to`; the request's own path is added if that ends in an origin's port or host."""

    def change(request: Request, reply: Reply) -> Reply:
        has_path = "/" in to.removeprefix("http://").removeprefix("https://")
        location = to if has_path else to + request.path
        return Reply(status=status, headers={"location": location})

    return change
