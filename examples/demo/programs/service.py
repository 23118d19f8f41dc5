"""What the demo's five programs share: JSON over HTTP on localhost, and an orderly end.

Only Python's standard library: this file is part of every program's layer.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TypeAlias
from urllib.parse import parse_qs, urlsplit

Json: TypeAlias = dict[str, object]
# Takes the query (of a GET) or the body (of a POST).
Handler: TypeAlias = Callable[[Json], Json]
Routes: TypeAlias = dict[tuple[str, str], Handler]

MAX_BODY_BYTES = 1024 * 1024
REQUEST_TIMEOUT_S = 15.0
PEER_DEADLINE_S = 60.0
# A layer of the interpreter says here who built it; see examples/demo/images.py.
BUILD_FILE = Path(os.environ.get("PYTHON_BUILD_FILE", "/usr/lib/python-build-id"))


class BadRequest(Exception):
    """The caller's fault; its text is the answer."""


class PeerFailed(Exception):
    """The next program did not answer, or refused: the text says which and why."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


def interpreter() -> str:
    """The interpreter that runs this very program, with its builder's mark."""
    try:
        build = BUILD_FILE.read_text(encoding="utf-8").strip()
    except OSError:
        build = "no build mark"
    return f"{build}; {sys.version.splitlines()[0]}"


def setting(name: str) -> str:
    """An environment variable that the manifest fixes; its absence ends the program."""
    value = os.environ.get(name)
    if not value:
        raise SystemExit(f"the environment lacks {name}")
    return value


def call(url: str, body: Json | None = None) -> Json:
    """POST `body` (or GET) and return the JSON object of the answer. Raises `PeerFailed`."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as answer:
            return as_object(answer.read(MAX_BODY_BYTES))
    except urllib.error.HTTPError as error:
        # A peer's refusal of the record is the caller's to read; anything else is ours.
        text = error.read(MAX_BODY_BYTES).decode("utf-8", "replace")
        raise PeerFailed(text, 400 if error.code == 400 else 502) from error
    except (OSError, ValueError) as error:
        raise PeerFailed(f"{url}: {error}", 502) from error


def as_object(raw: bytes) -> Json:
    """A JSON object from bytes. Raises `ValueError`."""
    value = json.loads(raw)
    if not isinstance(value, dict):
        raise ValueError("must be a JSON object")
    return value


def number(record: Json, name: str) -> float:
    """A numeric field. Raises `BadRequest`."""
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRequest(f"{name} must be a number, got {value!r}")
    return float(value)


def wait_for(url: str, *, deadline_s: float = PEER_DEADLINE_S) -> None:
    """Until the peer at `url` answers its health check. Ends the program at the deadline."""
    end = time.monotonic() + deadline_s
    while True:
        try:
            call(f"{url}/health")
            return
        except PeerFailed as error:
            if time.monotonic() > end:
                raise SystemExit(f"{url} did not appear in {deadline_s:.0f} s: {error}") from None
        time.sleep(0.1)


def serve(
    name: str,
    routes: Routes,
    *,
    address: tuple[str, int],
    peers: tuple[str, ...] = (),
    tls: ssl.SSLContext | None = None,
) -> int:
    """Answer requests until SIGTERM; returns the exit code.

    `GET /health` is answered from the beginning; everything else with 503 until
    every peer has answered once.
    """
    ending = threading.Event()
    for number_ in (signal.SIGTERM, signal.SIGINT):
        # As pid 1 of a container a program without a handler would not even notice.
        signal.signal(number_, lambda *_: ending.set())
    ready = threading.Event()
    server = _Server(address, _handler(name, routes, ready), tls)
    threading.Thread(target=server.serve_forever, name="serve", daemon=True).start()
    failed: list[str] = []

    def meet() -> None:
        try:
            for peer in peers:
                wait_for(peer)
        except SystemExit as error:
            failed.append(str(error))
            ending.set()
            return
        ready.set()
        sys.stdout.write(f"{name}: ready on {address[0]}:{address[1]}\n")
        sys.stdout.flush()

    threading.Thread(target=meet, name="meet", daemon=True).start()
    ending.wait()
    server.shutdown()
    server.server_close()
    if failed:
        sys.stderr.write(f"{name}: {failed[0]}\n")
    return 1 if failed else 0


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # Connections wait in the kernel's queue, not in ours.
    request_queue_size = 128

    def __init__(
        self,
        address: tuple[str, int],
        handler: type[BaseHTTPRequestHandler],
        tls: ssl.SSLContext | None,
    ) -> None:
        super().__init__(address, handler)
        self._tls = tls

    def server_bind(self) -> None:
        # Not HTTPServer's: that looks up this machine's name, for which a container has no DNS.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def finish_request(
        self, request: socket.socket | tuple[bytes, socket.socket], client_address: object
    ) -> None:
        # Here, in the connection's own thread: a client that is slow to shake hands
        # delays nobody else.
        if not isinstance(request, socket.socket):
            raise TypeError("a TCP server's request is a socket")
        request.settimeout(REQUEST_TIMEOUT_S)
        if self._tls is None:
            super().finish_request(request, client_address)
            return
        with self._tls.wrap_socket(request, server_side=True) as secure:
            super().finish_request(secure, client_address)

    def handle_error(self, request: object, client_address: object) -> None:
        # A client that left or spoke no TLS; it is told nothing and nothing else suffers.
        sys.stderr.write(f"connection from {client_address}: {sys.exc_info()[1]}\n")


def _handler(name: str, routes: Routes, ready: threading.Event) -> type[BaseHTTPRequestHandler]:
    class Answering(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = REQUEST_TIMEOUT_S

        def do_GET(self) -> None:
            query = parse_qs(urlsplit(self.path).query)
            self._answer(lambda: {key: values[0] for key, values in query.items()})

        def do_POST(self) -> None:
            self._answer(self._body)

        def _body(self) -> Json:
            raw = self._read_body()
            try:
                return as_object(raw)
            except ValueError as error:
                raise BadRequest(f"the body must be a JSON object: {error}") from None

        def _read_body(self) -> bytes:
            try:
                length = int(self.headers.get("Content-Length", ""))
            except ValueError:
                length = -1
            if not 0 <= length <= MAX_BODY_BYTES:
                # Where the next request would begin is unknown, or too far away to go there.
                self.close_connection = True
                raise BadRequest(f"Content-Length must be given, at most {MAX_BODY_BYTES}")
            return self.rfile.read(length)

        def _answer(self, argument: Callable[[], Json]) -> None:
            path = urlsplit(self.path).path
            handler = routes.get((self.command, path))
            if (self.command, path) == ("GET", "/health"):
                self._send(200, {"service": name, "ready": ready.is_set()})
            elif handler is None:
                self._refuse(404, f"{self.command} {path}: no such thing")
            elif not ready.is_set():
                self._refuse(503, f"{name} waits for its peers")
            else:
                self._send(*_outcome(handler, argument))

        def _refuse(self, status: int, words: str) -> None:
            # A body that stays unread would make the kernel reset the connection, and the
            # client never see why.
            if self.command == "POST":
                with contextlib.suppress(BadRequest):
                    self._read_body()
            self._send(status, {"error": words})

        def _send(self, status: int, value: Json) -> None:
            raw = json.dumps(value, sort_keys=True).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, format: str, *args: object) -> None:
            # Requests are patients' data: nothing about them is logged.
            pass

    return Answering


def _outcome(handler: Handler, argument: Callable[[], Json]) -> tuple[int, Json]:
    try:
        return 200, handler(argument())
    except BadRequest as error:
        return 400, {"error": str(error)}
    except PeerFailed as error:
        try:
            return error.status, as_object(str(error).encode())
        except ValueError:
            return error.status, {"error": str(error)}
