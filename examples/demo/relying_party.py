"""The relying party: its policy, its client that accepts one key only, its verdicts."""

from __future__ import annotations

import hashlib
import http.client
import json
import secrets
import socket
import ssl
import time
import tomllib
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from machine import Machine
from owners import PROGRAMS, Owners
from stage import Argument, Done, SceneFailed, Stage

NONCE_BYTES = 32
CONNECT_TIMEOUT_S = 60
ANSWER_TIMEOUT_S = 60
MAX_ANSWER_BYTES = 64 << 20
RECORD = {
    "id": "patient-4711",
    "sex": "female",
    "age": 61,
    "total_cholesterol": 180,
    "hdl_cholesterol": 47,
    "systolic_pressure": 124,
    "treated_for_pressure": False,
    "smoker": True,
    "diabetic": False,
}


def fresh_nonce() -> str:
    return secrets.token_hex(NONCE_BYTES)


class Channel:
    """One TLS connection to whoever answers; `key_sha384` is of the key that it showed.

    Certificates are not checked against any authority: evidence is what counts. The same
    connection asks for evidence and sends the record, so nobody can step in between.
    """

    def __init__(self, port: int) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        self._tls = context.wrap_socket(_connect(port), server_hostname="gateway")
        certificate = self._tls.getpeercert(binary_form=True)
        if certificate is None:
            raise SceneFailed("the gateway showed no certificate")
        public_key = x509.load_der_x509_certificate(certificate).public_key()
        spki = public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        self.key_sha384 = hashlib.sha384(spki).hexdigest()

    def ask(self, method: str, path: str, body: object | None = None) -> tuple[int, bytes]:
        """One HTTP exchange on this very connection."""
        payload = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: gateway\r\nContent-Length: {len(payload)}\r\n"
        self._tls.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + payload)
        # http.client reads answers from anything that offers makefile().
        answer = http.client.HTTPResponse(self._tls, method=method)
        answer.begin()
        return answer.status, answer.read(MAX_ANSWER_BYTES)

    def close(self) -> None:
        self._tls.close()


def _items(value: object) -> list[dict[str, object]]:
    if not isinstance(value, list):
        raise SceneFailed(f"a list was expected, not {value!r}")
    return value


def _connect(port: int) -> socket.socket:
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=ANSWER_TIMEOUT_S)
        except OSError as error:
            if time.monotonic() > deadline:
                raise SceneFailed(f"nobody answers on port {port}: {error}") from error
            time.sleep(0.2)


class RelyingParty:
    """Trusts the simulator's root (said in every verdict), its own policy, and nothing else."""

    def __init__(self, stage: Stage, machine: Machine) -> None:
        self.stage = stage
        self.policy = stage.out / "policy.toml"
        self.collateral = stage.out / "collateral.json"
        self._root = machine.pki / "root.pem"
        stage.acon("sim", "collateral", "--pki", machine.pki, "-o", self.collateral)

    def write_policy(self, rehearsal: Path, machine: Machine, owners: Owners) -> list[str]:
        """From a rehearsal's evidence, compared line by line with what others published.

        Returns what was compared. `--follow-vendors` expects the CSP's layer by signer, name
        and minimum version, so that its updates need no new policy.
        """
        arguments: list[Argument] = [
            "policy",
            "init",
            rehearsal,
            "-o",
            self.policy,
            "--follow-vendors",
        ]
        self.stage.acon(*arguments, "--collateral", self.collateral, show=True)
        policy = tomllib.loads(self.policy.read_text())
        published = machine.description()
        identity = machine.identity()
        components = identity["components"]
        expected = {
            "MRTD and RTMR0-2 with the base image's builder": (
                [policy["base"][key] for key in ("mr_td", "rtmr0", "rtmr1", "rtmr2")],
                [published["mr_td"], *_items(published["rtmrs"])[:3]],
            ),
            "supervisor, plugins and their files with the supervisor's builder": (
                [policy["supervisor"], *policy["plugins"]],
                [
                    {key: each[key] for key in ("name", "version", "digest_sha384")}
                    for each in _items(components)
                ],
            ),
            "the configuration with the one agreed on": (
                policy["config"]["digest_sha384"],
                identity["config_digest_sha384"],
            ),
            "the five images with their owners": (
                [each["id"] for each in policy["images"]["executable"]],
                [self._image_id(owners, name) for name in PROGRAMS],
            ),
        }
        for what, (found, wanted) in expected.items():
            if found != wanted:
                raise SceneFailed(f"comparing {what}: {found} is not {wanted}")
        self._gateway = self._image_id(owners, "gateway")
        return list(expected)

    def speaking(self, channel: Channel) -> list[str]:
        """Who must speak: the gateway's image, with the very key that the connection shows."""
        return ["--expect-key", channel.key_sha384, "--expect-image", self._gateway]

    def _image_id(self, owners: Owners, name: str) -> str:
        shown = self.stage.acon("image", "show", owners.bundle(name), "--json").json()
        if not isinstance(shown, dict):
            raise SceneFailed("acon image show --json was to print an object")
        return str(shown["image_id"])

    def verify(
        self,
        evidence: Path,
        nonce: str,
        *more: Argument,
        simulated: bool = True,
        expect: int | None = None,
        show: bool = False,
    ) -> Done:
        arguments: list[Argument] = ["verify", evidence, "--nonce", nonce]
        arguments += ["--policy", self.policy, "--collateral", self.collateral]
        if simulated:
            arguments += ["--trust-simulated-root", self._root]
        return self.stage.acon(*arguments, *more, expect=expect, show=show)

    def failed_checks(
        self, evidence: Path, nonce: str, *more: Argument, simulated: bool = True
    ) -> dict[str, str]:
        """The innermost checks that fail: their ids, and all that they say."""
        done = self.verify(evidence, nonce, *more, "--json", simulated=simulated)
        if done.code != 1:
            raise SceneFailed(f"acon verify was to end with 1, not {done.code}: {done.said}")
        found: dict[str, str] = {}
        _collect(json.loads(done.out), found)
        return found

    def evidence_over(self, channel: Channel, nonce: str, name: str) -> Path:
        """Ask the gateway for evidence for its key, on the connection that shows the key."""
        deadline = time.monotonic() + CONNECT_TIMEOUT_S
        status, body = channel.ask("GET", f"/evidence?nonce={nonce}")
        while status == 503 and time.monotonic() < deadline:
            # The five have just been started, and wait for one another.
            time.sleep(0.5)
            status, body = channel.ask("GET", f"/evidence?nonce={nonce}")
        if status != 200:
            raise SceneFailed(f"the gateway answered {status}: {body[:300]!r}")
        path = self.stage.out / "evidence" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(body)
        return path


def _collect(node: object, found: dict[str, str]) -> bool:
    """Depth first; True if something below fails already."""
    if isinstance(node, list):
        return sum(_collect(each, found) for each in node) > 0
    if not isinstance(node, dict):
        return False
    below = sum(_collect(value, found) for value in node.values()) > 0
    if node.get("outcome") == "fail" and not below:
        name = str(node.get("id"))
        found[name] = found.get(name, "") + json.dumps(node)
    return below or node.get("outcome") == "fail"
