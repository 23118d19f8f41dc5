"""The door: HTTPS with a key that was made in here and that the evidence vouches for."""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import socket
import ssl
import subprocess
import sys
import tempfile
from pathlib import Path

from service import (
    MAX_BODY_BYTES,
    REQUEST_TIMEOUT_S,
    BadRequest,
    Json,
    PeerFailed,
    as_object,
    call,
    interpreter,
    serve,
    setting,
)

_NONCE = re.compile(r"(?:[0-9a-f]{2}){16,64}")
_OPENSSL_TIMEOUT_S = 30


def make_key() -> tuple[ssl.SSLContext, str]:
    """A fresh P-384 key with a certificate of its own; hex SHA-384 of its SPKI in DER.

    The key's file lies in the container's own tmpfs (/tmp), and only until it is loaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        key, certificate = Path(folder, "key.pem"), Path(folder, "cert.pem")
        config = Path(folder, "openssl.cnf")
        config.write_text("[req]\ndistinguished_name = name\n[name]\n", encoding="ascii")
        _openssl(
            *("req", "-x509", "-config", str(config), "-subj", "/CN=gateway", "-days", "2"),
            *("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-384", "-nodes", "-sha384"),
            *("-addext", "subjectAltName=DNS:gateway,DNS:localhost,IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(certificate)),
        )
        spki = _openssl("pkey", "-in", str(key), "-pubout", "-outform", "DER")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(certificate, key)
    return context, hashlib.sha384(spki).hexdigest()


def _openssl(*arguments: str) -> bytes:
    done = subprocess.run(
        ["openssl", *arguments], capture_output=True, timeout=_OPENSSL_TIMEOUT_S, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"openssl {arguments[0]}: {done.stderr.decode('utf-8', 'replace')}")
    return done.stdout


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=REQUEST_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(REQUEST_TIMEOUT_S)
        self.sock.connect(self._path)


def ask_evidence(socket_path: str, nonce: str, public_key_sha384: str) -> Json:
    """The supervisor's evidence for this container, this nonce and this key."""
    request = {"nonce": nonce, "public_key_sha384": public_key_sha384}
    connection = _UnixConnection(socket_path)
    try:
        connection.request(
            "POST", "/evidence", json.dumps(request), {"Content-Type": "application/json"}
        )
        answer = connection.getresponse()
        # Evidence holds manifests, logs and a quote: larger than what clients may send.
        raw = answer.read(64 * MAX_BODY_BYTES)
        if answer.status != 200:
            raise PeerFailed(raw.decode("utf-8", "replace"), 502)
        return as_object(raw)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise PeerFailed(f"{socket_path}: {error}", 502) from error
    finally:
        connection.close()


def main() -> int:
    intake, audit = setting("INTAKE_URL"), setting("AUDIT_URL")
    container_socket = setting("CONTAINER_SOCKET")
    tls, public_key_sha384 = make_key()

    def evidence(query: Json) -> Json:
        nonce = str(query.get("nonce", ""))
        if not _NONCE.fullmatch(nonce):
            raise BadRequest("nonce must be 16 to 64 bytes in lower-case hex")
        return ask_evidence(container_socket, nonce, public_key_sha384)

    def records(record: Json) -> Json:
        answer = call(f"{intake}/records", record)
        interpreters = answer.get("interpreters")
        if not isinstance(interpreters, dict):
            raise PeerFailed("intake: the answer names no interpreters", 502)
        interpreters["gateway"] = interpreter()
        return answer

    return serve(
        "gateway",
        {
            ("GET", "/evidence"): evidence,
            ("POST", "/records"): records,
            ("GET", "/audit"): lambda _query: call(f"{audit}/summary"),
        },
        address=(setting("LISTEN_ADDRESS"), int(setting("LISTEN_PORT"))),
        peers=(intake, audit),
        tls=tls,
    )


if __name__ == "__main__":
    sys.exit(main())
