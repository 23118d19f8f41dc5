"""The demo's images, and its five programs as plain processes on localhost."""

from __future__ import annotations

import base64
import gzip
import hashlib
import http.client
import io
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from acon import cli

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"
NONCE = "5a" * 32
READY_S = 30
# Worked examples of the model's own paper (D'Agostino et al. 2008, "Clinical application").
WOMAN = {
    "id": "w-61",
    "sex": "female",
    "age": 61,
    "total_cholesterol": 180,
    "hdl_cholesterol": 47,
    "systolic_pressure": 124,
    "treated_for_pressure": False,
    "smoker": True,
    "diabetic": False,
}
MAN = {
    **WOMAN,
    "id": "m-53",
    "sex": "male",
    "age": 53,
    "total_cholesterol": 161,
    "hdl_cholesterol": 55,
    "systolic_pressure": 125,
    "treated_for_pressure": True,
    "smoker": False,
    "diabetic": True,
}


# --- the images -----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def demo_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for packages; skips visibly where apt cannot fetch any."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        pytest.skip("the demo's images are made with apt and dpkg, which are not here")
    cache = tmp_path_factory.mktemp("debs")
    command = ["apt-get", "download", "busybox-static", "-o", "APT::Sandbox::User=root"]
    tried = subprocess.run(command, cwd=cache, capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        pytest.skip(f"apt is out of reach: {tried.stderr.strip()}")
    return cache


@pytest.fixture(scope="session")
def built(demo_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, object]:
    """A folder with the gateway's and the audit's layouts and the vendor's, and what was said."""
    out = tmp_path_factory.mktemp("layouts")
    return out, build(out, demo_cache, "--image", "gateway", "--image", "audit")


def build(out: Path, cache: Path, *options: str) -> dict[str, str]:
    command = [sys.executable, str(DEMO / "images.py"), str(out), "--cache", str(cache), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    sources = json.loads(done.stdout)
    assert isinstance(sources, dict)
    return sources


def document(layout: Path, digest: str) -> bytes:
    return (layout / "blobs" / digest.replace(":", "/")).read_bytes()


def layers_of(layout: Path) -> list[tuple[str, bytes]]:
    """Digest and uncompressed tar of each layer, lowest first."""
    index = json.loads((layout / "index.json").read_text())
    manifest = json.loads(document(layout, index["manifests"][0]["digest"]))
    return [
        (one["digest"], gzip.decompress(document(layout, one["digest"])))
        for one in manifest["layers"]
    ]


def paths_of(tar: bytes) -> set[str]:
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        return set(archive.getnames())


def unpack(layers: list[tuple[str, bytes]], root: Path) -> None:
    for _digest, tar in layers:
        with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
            # As it was written. The argument `filter` is newer than Debian 12's Python.
            archive.extraction_filter = lambda member, _path: member
            archive.extractall(root)


@pytest.mark.root
def test_the_gateways_image_is_built_converted_and_runs_its_own_interpreter(
    built: tuple[Path, object], tmp_path: Path
) -> None:
    out, sources = built
    assert isinstance(sources, dict)
    assert sources["gateway"] == f"oci:{out / 'gateway'}:1"
    bundle = tmp_path / "bundle"
    assert cli.main(["image", "convert", sources["gateway"], "-o", str(bundle)]) == 0
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    assert manifest["entrypoint"] == ["/usr/bin/python3", "/app/gateway.py"]

    layers = layers_of(out / "gateway")
    assert [f"sha384/{hashlib.sha384(tar).hexdigest()}" for _, tar in layers] == manifest["layers"]
    base, interpreter, openssl, program = (paths_of(tar) for _, tar in layers)
    assert {"bin", "lib", "usr/bin/sh"} <= base
    assert {"usr/bin/python3", "usr/lib/python-build-id"} <= interpreter
    assert "usr/bin/openssl" in openssl
    assert program == {"app", "app/gateway.py", "app/service.py"}
    assert not any(path.startswith("usr/share/doc") for path in interpreter)

    unpack(layers, tmp_path / "root")
    code = "import ssl, http.server, urllib.request; print(open('/usr/lib/python-build-id').read())"
    chroot = shutil.which("chroot", path="/usr/sbin:/usr/bin:/sbin:/bin")
    assert chroot is not None
    for command in (["/usr/bin/python3", "-c", code], ["/bin/sh", "-c", "openssl version"]):
        done = subprocess.run(
            [chroot, str(tmp_path / "root"), *command],
            capture_output=True,
            text=True,
            env={"PATH": "/usr/bin:/bin"},
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert "python:2" in done.stdout or "OpenSSL" in done.stdout


def test_vendors_builds_differ_in_their_mark_and_the_same_build_is_the_same_bytes(
    built: tuple[Path, object], demo_cache: Path, tmp_path: Path
) -> None:
    (once, _), again = built, tmp_path / "again"
    build(again, demo_cache, "--image", "audit", "--interpreter", "3")
    digests = {}
    for version in (1, 2, 3):
        ((digest, tar),) = layers_of(once / f"interpreter-{version}")
        with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
            mark = archive.extractfile("usr/lib/python-build-id")
            assert mark is not None
            assert f"python:{version} " in mark.read().decode()
        digests[version] = digest
    assert len(set(digests.values())) == 3
    image = [digest for digest, _ in layers_of(once / "audit")]
    assert image[1] == digests[2]
    assert image == [digest for digest, _ in layers_of(again / "audit")]
    assert layers_of(again / "interpreter-3")[0][0] == digests[3]


# --- the programs ---------------------------------------------------------------------------


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class ContainerSocket(BaseHTTPRequestHandler):
    """Answers as the supervisor's own socket does: with what it was asked."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        raw = json.dumps({"path": self.path, "request": asked}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    do_PUT = do_POST

    def log_message(self, format: str, *args: object) -> None:
        pass


class Chain:
    """The five programs, and a client that speaks TLS to the gateway."""

    def __init__(self, processes: dict[str, subprocess.Popen[bytes]], port: int) -> None:
        self.processes = processes
        self.port = port

    def ask(self, method: str, path: str, body: object | None = None) -> tuple[int, object]:
        connection = http.client.HTTPSConnection(
            "127.0.0.1", self.port, timeout=20, context=self.context()
        )
        try:
            raw = None if body is None else json.dumps(body)
            connection.request(method, path, raw)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    @staticmethod
    def context() -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context

    def public_key_sha384(self) -> str:
        """Of the key that the gateway's TLS really uses."""
        with (
            socket.create_connection(("127.0.0.1", self.port), timeout=20) as plain,
            self.context().wrap_socket(plain) as secure,
        ):
            der = secure.getpeercert(binary_form=True)
        assert der is not None
        spki = x509.load_der_x509_certificate(der).public_key()
        raw = spki.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return hashlib.sha384(raw).hexdigest()


@contextmanager
def programs(folder: Path, *, leave_out: str | None = None) -> Iterator[Chain]:
    names = ("gateway", "intake", "features", "model", "audit")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    build_file = folder / "python-build-id"
    build_file.write_text("vendor build python:2 of this test\n")
    environment = {
        "PATH": os.environ["PATH"],
        "LISTEN_ADDRESS": "127.0.0.1",
        "PYTHON_BUILD_FILE": str(build_file),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": str(DEMO.parent / "inside"),
        "TRAIL_FILE": str(folder / "trail"),
        "CONTAINER_SOCKET": str(folder / "acon.sock"),
        **{f"{name.upper()}_URL": f"http://127.0.0.1:{port}" for name, port in ports.items()},
    }
    with (
        ThreadingUnixStreamServer(str(folder / "acon.sock"), ContainerSocket) as server,
        ExitStack() as stack,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        stack.callback(server.shutdown)
        processes = {}
        for name in names:
            if name == leave_out:
                continue
            command = [sys.executable, str(DEMO / "programs" / f"{name}.py")]
            process = stack.enter_context(
                subprocess.Popen(
                    command,
                    env={**environment, "LISTEN_PORT": str(ports[name])},
                    stdout=subprocess.PIPE,
                )
            )
            stack.callback(process.kill)
            processes[name] = process
        yield Chain(processes, ports["gateway"])


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    with programs(tmp_path_factory.mktemp("chain")) as running:
        for process in running.processes.values():
            assert process.stdout is not None
            assert b": ready on " in process.stdout.readline()
        yield running


@pytest.mark.parametrize(("record", "risk"), [(WOMAN, 0.105), (MAN, 0.156)])
def test_a_record_goes_through_all_five_and_comes_back_with_the_papers_risk(
    chain: Chain, record: dict[str, object], risk: float
) -> None:
    status, answer = chain.ask("POST", "/records", record)
    assert status == 200
    assert isinstance(answer, dict)
    assert answer["id"] == record["id"]
    assert answer["ten_year_risk"] == pytest.approx(risk, abs=0.001)
    assert set(answer["interpreters"]) == {"gateway", "intake", "features", "model", "audit"}
    assert all(
        text.startswith("vendor build python:2 of this test; 3.")
        for text in answer["interpreters"].values()
    )


def test_audit_counts_and_chains_what_was_scored(chain: Chain) -> None:
    _, before = chain.ask("GET", "/audit")
    _, answer = chain.ask("POST", "/records", MAN)
    status, after = chain.ask("GET", "/audit")
    assert status == 200
    assert isinstance(before, dict)
    assert isinstance(answer, dict)
    assert isinstance(after, dict)
    assert after["entries"] == before["entries"] + 1
    assert answer["audit"]["number"] == after["entries"]
    assert answer["audit"]["chain_sha384"] == after["chain_sha384"] != before["chain_sha384"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"age": 12}, "age"),
        ({"age": "61"}, "age"),
        ({"age": True}, "age"),
        ({"sex": "unknown"}, "sex"),
        ({"smoker": 1}, "smoker"),
        ({"id": ""}, "id"),
        ({"name": "somebody"}, "name"),
    ],
)
def test_a_record_that_is_not_right_is_refused_at_the_door_with_its_field(
    chain: Chain, change: dict[str, object], word: str
) -> None:
    _, before = chain.ask("GET", "/audit")
    status, answer = chain.ask("POST", "/records", {**WOMAN, **change})
    assert status == 400
    assert isinstance(answer, dict)
    assert word in answer["error"]
    assert chain.ask("GET", "/audit")[1] == before


def test_evidence_is_asked_for_the_nonce_and_the_key_that_tls_really_uses(chain: Chain) -> None:
    status, answer = chain.ask("GET", f"/evidence?nonce={NONCE}")
    assert status == 200
    assert answer == {
        "path": "/evidence",
        "request": {"nonce": NONCE, "public_key_sha384": chain.public_key_sha384()},
    }


@pytest.mark.parametrize("nonce", ["", "5A" * 32, "5a" * 15, "5a" * 65, "xx" * 32])
def test_a_nonce_that_is_none_is_refused(chain: Chain, nonce: str) -> None:
    assert chain.ask("GET", f"/evidence?nonce={nonce}")[0] == 400


def test_other_paths_and_bodies_are_refused_and_the_gateway_goes_on(chain: Chain) -> None:
    assert chain.ask("GET", "/etc/passwd")[0] == 404
    assert chain.ask("POST", "/records", ["no", "object"])[0] == 400
    with socket.create_connection(("127.0.0.1", chain.port), timeout=5) as rude:
        rude.sendall(base64.b64decode("AAAA"))
    assert chain.ask("GET", "/health")[0] == 200


def test_a_silent_client_delays_nobody(chain: Chain) -> None:
    with socket.create_connection(("127.0.0.1", chain.port), timeout=5):
        begin = time.monotonic()
        assert chain.ask("GET", "/health")[0] == 200
        assert time.monotonic() - begin < 5


def test_each_program_ends_on_sigterm_with_0(tmp_path: Path) -> None:
    with programs(tmp_path) as running:
        for process in running.processes.values():
            assert process.stdout is not None
            assert b": ready on " in process.stdout.readline()
        for process in running.processes.values():
            process.send_signal(signal.SIGTERM)
        assert {name: one.wait(10) for name, one in running.processes.items()} == dict.fromkeys(
            running.processes, 0
        )


def test_a_program_waits_for_its_peers_and_answers_503_until_then(tmp_path: Path) -> None:
    with programs(tmp_path, leave_out="intake") as running:
        deadline = time.monotonic() + READY_S
        while True:
            try:
                status, answer = running.ask("GET", "/health")
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        assert (status, answer) == (200, {"service": "gateway", "ready": False})
        assert running.ask("POST", "/records", WOMAN)[0] == 503
        running.processes["gateway"].send_signal(signal.SIGTERM)
        assert running.processes["gateway"].wait(10) == 0
