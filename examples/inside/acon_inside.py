#!/usr/bin/env python3
"""What a program in a container may ask of its supervisor. One file, no dependencies.

    import acon_inside
    evidence = acon_inside.evidence(nonce, public_key_der=my_public_key)

or from a shell:

    acon_inside.py self
    acon_inside.py evidence --nonce HEX --public-key KEY.der > evidence.json
    acon_inside.py say "ready"            # what later evidence for anybody says of this container
    acon_inside.py say --binary FILE
    acon_inside.py forget

The socket knows which container asks: there is nothing to log in with. A program that was
asked for evidence passes on the asker's nonce; a key that it binds should be made in the
container, and never leave it.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import http.client
import json
import secrets
import socket
import sys
from pathlib import Path

SOCKET = "/run/acon.sock"
# A quote takes from milliseconds to some seconds, depending on the hardware's service.
TIMEOUT_S = 90.0
MAX_ANSWER_BYTES = 64 * 1024 * 1024


class Refused(Exception):
    """The supervisor said no. `kind` is for programs, the text for people (docs/formats.md)."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class _Connection(http.client.HTTPConnection):
    """HTTP over the container's own socket."""

    def __init__(self, path: str) -> None:
        super().__init__("supervisor", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def call(method: str, target: str, value: object = None, *, path: str = SOCKET) -> bytes:
    """One call: a JSON value there, the answer's bytes back.

    Raises `Refused`; `OSError` and `http.client.HTTPException` when there is no supervisor.
    """
    connection = _Connection(path)
    try:
        body = None if value is None else json.dumps(value)
        connection.request(method, target, body)
        answer = connection.getresponse()
        content = answer.read(MAX_ANSWER_BYTES)
        if answer.status != 200:
            error = json.loads(content)["error"]
            raise Refused(error["kind"], error["message"])
        return content
    finally:
        connection.close()


def identity(*, path: str = SOCKET) -> dict[str, object]:
    """`container_id` (a number) and `image_id` of this container."""
    answer: dict[str, object] = json.loads(call("GET", "/self", path=path))
    return answer


def evidence(
    nonce: bytes,
    *,
    public_key_der: bytes | None = None,
    user_data: bytes | None = None,
    path: str = SOCKET,
) -> bytes:
    """An evidence file about this container, for `acon verify`.

    `nonce` has 16 to 64 bytes, from whoever asks. `public_key_der` is a SubjectPublicKeyInfo,
    whose SHA-384 is bound; `user_data` has at most 4,096 bytes.
    """
    request: dict[str, str] = {"nonce": nonce.hex()}
    if public_key_der is not None:
        request["public_key_sha384"] = hashlib.sha384(public_key_der).hexdigest()
    if user_data is not None:
        request["user_data"] = base64.b64encode(user_data).decode()
    return call("POST", "/evidence", request, path=path)


def say(data: str | bytes, *, path: str = SOCKET) -> None:
    """Let later evidence say this of the container, whoever asks for it: at most 4,096 bytes.

    Verifiers show it as the program's own words. It ends with the program.
    """
    kind, raw = ("text", data.encode()) if isinstance(data, str) else ("binary", data)
    said = {"kind": kind, "data": base64.b64encode(raw).decode()}
    call("PUT", "/attestation-data", said, path=path)


def forget(*, path: str = SOCKET) -> None:
    """Take back what was said."""
    call("DELETE", "/attestation-data", path=path)


def main(arguments: list[str] | None = None) -> int:
    """The command. Exit status 0 done, 1 refused or no supervisor, 2 wrong usage."""
    options = _parser().parse_args(arguments)
    try:
        sys.stdout.buffer.write(_run(options))
        sys.stdout.buffer.flush()
    except (Refused, OSError, http.client.HTTPException) as error:
        print(f"acon_inside: {error}", file=sys.stderr)
        return 1
    return 0


def _run(options: argparse.Namespace) -> bytes:
    path: str = options.socket
    if options.command == "self":
        return json.dumps(identity(path=path)).encode() + b"\n"
    if options.command == "evidence":
        return evidence(
            secrets.token_bytes(32) if options.nonce is None else bytes.fromhex(options.nonce),
            public_key_der=None if options.public_key is None else options.public_key.read_bytes(),
            user_data=None if options.user_data is None else options.user_data.encode(),
            path=path,
        )
    if options.command == "say":
        say(options.text if options.binary is None else options.binary.read_bytes(), path=path)
    else:
        forget(path=path)
    return b""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Ask this container's supervisor.")
    parser.add_argument("--socket", default=SOCKET, help=f"default {SOCKET}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("self", help="which container this is")
    ask = commands.add_parser("evidence", help="evidence about this container")
    ask.add_argument("--nonce", metavar="HEX", help="16 to 64 bytes; without it a random one")
    ask.add_argument("--public-key", metavar="FILE", type=Path, help="SubjectPublicKeyInfo, DER")
    ask.add_argument("--user-data", metavar="TEXT")
    words = commands.add_parser("say", help="what later evidence says of this container")
    either = words.add_mutually_exclusive_group(required=True)
    either.add_argument("text", nargs="?")
    either.add_argument("--binary", metavar="FILE", type=Path)
    commands.add_parser("forget", help="take it back")
    return parser


if __name__ == "__main__":
    sys.exit(main())
