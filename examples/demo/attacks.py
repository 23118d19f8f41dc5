"""What an operator, a host or a stranger would try. Each prints one line: what was tried,
what happened, which rule or check did it."""

from __future__ import annotations

import base64
import gzip
import json
import socketserver
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import trio
from images import GATEWAY_PORT, INTERPRETER
from images import PROGRAMS as PROGRAMS_DIR
from machine import Machine
from owners import PROGRAMS, Owners
from relying_party import Channel, RelyingParty, fresh_nonce
from stage import SceneFailed, Stage

from acon.bundle import Bundle
from acon.client import Client
from supervisor.errors import Refusal
from supervisor.formats.digest import Digest, digest_of, parse_digest
from supervisor.formats.event_log import assemble_log, split_log
from supervisor.operations import ManifestUpload

PROXY_PORT = 18443
WIDTH = 58
MAX_TOLD = 120
PATIENCE_S = 60
SIXTH_EXPOSED = {"images.expected.entry", "images.unexpected"}
# Inside there is no such thing, or it may not be made; the own socket knows no such call.
REFUSALS = {"ENOENT", "EPERM", "EROFS", "404"}


def perform(stage: Stage, owners: Owners, machine: Machine, relying_party: RelyingParty) -> None:
    attacks = Attacks(stage, owners, machine, relying_party)
    attacks.against_the_running_td()
    attacks.with_a_sixth_image()
    attacks.from_inside()
    attacks.with_layers()
    attacks.with_another_supervisor()
    stage.say(f"  {attacks.count} attacks, none succeeded")


class Attacks:
    """Attacks use the raw API where `acon` itself would already refuse to help."""

    def __init__(
        self, stage: Stage, owners: Owners, machine: Machine, relying_party: RelyingParty
    ) -> None:
        self.stage = stage
        self.owners = owners
        self.machine = machine
        self.relying_party = relying_party
        self.count = 0

    # --- how an attack is told ----------------------------------------------------------------

    def refused(self, tried: str, kind: str, attempt: Callable[[], object]) -> None:
        """The daemon must refuse with this kind of error."""
        try:
            attempt()
        except Refusal as error:
            if error.kind != kind:
                raise SceneFailed(f"{tried}: was to be refused as {kind}: {error}") from error
            self._line(tried, f"refused: {error.rule}")
            return
        raise SceneFailed(f"{tried}: was not refused")

    def exposed(
        self, tried: str, checks: set[str], failed: dict[str, str], naming: str = ""
    ) -> None:
        """The verdict must fail by exactly these checks, one of them naming the culprit."""
        if set(failed) != checks:
            raise SceneFailed(f"{tried}: {sorted(checks)} were to fail; failed: {sorted(failed)}")
        if not any(naming in text for text in failed.values()):
            raise SceneFailed(f"{tried}: no failed check names {naming}: {failed}")
        named = f", naming {naming[:40]}" if naming else ""
        self._line(tried, f"verdict FAILED by {', '.join(sorted(checks))}{named}")

    def failed_inside(self, tried: str, outcomes: list[str]) -> None:
        """Each way must have been refused: by the kernel, or with an HTTP status."""
        if not outcomes or not set(outcomes) <= REFUSALS:
            raise SceneFailed(f"{tried}: {outcomes} were to be among {sorted(REFUSALS)}")
        named = ", ".join(sorted(set(outcomes)))
        self._line(tried, f"refused: {len(outcomes)} ways, each with {named}")

    def _line(self, tried: str, happened: str) -> None:
        self.count += 1
        short = happened if len(happened) <= MAX_TOLD else happened[: MAX_TOLD - 1] + "…"
        self.stage.say(f"  {tried:{WIDTH}} {short}")

    # --- the tools of an operator ---------------------------------------------------------------

    def upload_of(self, bundle: Path) -> ManifestUpload:
        signed = Bundle(bundle).signed()
        return ManifestUpload(
            manifest=signed.manifest_bytes,
            signature=signed.signature,
            certificate_der=signed.certificate_der,
        )

    def admit(self, *bundles: Path) -> None:
        uploads = [self.upload_of(bundle) for bundle in bundles]

        async def send() -> None:
            async with Client.over_socket(self.stage.api) as client:
                await client.admit(uploads)

        trio.run(send)

    def send_layer(self, digest: Digest, tar: bytes) -> None:
        async def send() -> None:
            async with Client.over_socket(self.stage.api) as client:
                await client.upload_layer(digest, _Bytes(tar))

        trio.run(send)

    def start(self, bundle: Path) -> None:
        image_id = str(Bundle(bundle).signed().image_id)

        async def send() -> None:
            async with Client.over_socket(self.stage.api) as client:
                await client.start(image_id)

        trio.run(send)

    def outside_evidence(self, name: str) -> tuple[Path, str]:
        nonce = fresh_nonce()
        return self.machine.evidence(nonce, name), nonce

    # --- the attacks ------------------------------------------------------------------------------

    def against_the_running_td(self) -> None:
        """The TD of the last scene still runs: sealed, five containers, python:3."""
        late = self._by_another("late", "eve")
        self.refused("an image loaded after the seal", "conflict", lambda: self.admit(late))
        channel = Channel(GATEWAY_PORT)
        nonce = fresh_nonce()
        evidence = self.relying_party.evidence_over(channel, nonce, "attacked")
        key = self.relying_party.speaking(channel)
        channel.close()
        failed = self.relying_party.failed_checks
        self.exposed(
            "evidence replayed for another nonce",
            {"request.nonce"},
            failed(evidence, fresh_nonce(), *key),
        )
        dropped = self._altered(evidence, _drop_event, "event-dropped")
        checks = {"log.replay", "log.sealed", "status.sealed"}
        self.exposed("an event dropped from the log", checks, failed(dropped, nonce, *key))
        moved = self._altered(evidence, _swap_events, "event-moved")
        self.exposed("an event moved in the log", {"log.replay"}, failed(moved, nonce, *key))
        self.exposed(
            "a simulator's quote shown to one who trusts only Intel",
            {"quote.chain", "quote.trust_anchor"},
            failed(evidence, nonce, *key, simulated=False),
        )
        with _proxy(self.stage.out / "keys"):
            channel = Channel(PROXY_PORT)
            proxied = self.relying_party.evidence_over(channel, nonce, "proxied")
            found = failed(proxied, nonce, *self.relying_party.speaking(channel))
            channel.close()
        self.exposed("a proxy with its own key before the gateway", {"request.key"}, found)

    def _altered(self, evidence: Path, change: Callable[[list[bytes]], None], name: str) -> Path:
        document = json.loads(evidence.read_bytes())
        log = split_log(base64.b64decode(document["cc_eventlog"]))
        records = [record.raw for record in log.records]
        change(records)
        document["cc_eventlog"] = base64.b64encode(assemble_log(log.boot_log, records)).decode()
        path = evidence.with_name(f"{name}.json")
        path.write_text(json.dumps(document))
        return path

    def _by_another(self, name: str, signer: str, **fields: object) -> Path:
        """A program like `audit`, under another name and signed by somebody else."""
        aliases = {"self": {".": [f"{name}:1"]}}
        return self.owners.changed("audit", name, signer=signer, aliases=aliases, **fields)

    def with_a_sixth_image(self) -> None:
        bundles = [self.owners.bundle("python-2"), *self.owners.all_bundles()]
        sockets = [str(self.stage.api), str(self.stage.td_socket)]
        tries = [INTERPRETER, "-c", (PROGRAMS_DIR / "eve.py").read_text(), *sockets]
        sixth = self._by_another("sixth", "eve", entrypoint=tries)
        program = self._by_another("helper", "csp")
        self.machine.boot()
        self.admit(*bundles)
        tried = "a sixth image side-loaded before the seal"
        self.refused(tried, "policy", lambda: self.admit(sixth))
        self.refused("a program signed by the CSP", "policy", lambda: self.admit(program))
        tolerant = [
            self.owners.changed(
                name,
                f"tolerant-{name}",
                signer=self.owners.owner_of(name),
                policy={"rejectUnaccepted": False},
            )
            for name in PROGRAMS
        ]
        self.machine.boot()
        self.admit(self.owners.bundle("python-2"), *tolerant)
        self.admit(sixth)
        self.stage.acon("seal")
        evidence, nonce = self.outside_evidence("sixth-image")
        self.exposed(
            "the same among owners who do not reject it: admitted",
            SIXTH_EXPOSED,
            self.relying_party.failed_checks(evidence, nonce),
            naming=str(Bundle(sixth).signed().image_id),
        )

    def from_inside(self) -> None:
        """Eve's image was admitted; now it runs, and is root in its container."""
        self.machine.load([self.owners.bundle("sixth")])
        self.machine.start(["sixth"])
        outcomes = self._what_it_tried("sixth")
        self.failed_inside("a program of eve's that writes to the register", outcomes["register"])
        self.failed_inside("the same, giving orders to the supervisor", outcomes["management"])
        # Nothing came of it: log and register agree, and only eve's image is too many.
        evidence, nonce = self.outside_evidence("attacked-from-inside")
        failed = set(self.relying_party.failed_checks(evidence, nonce))
        running = self.stage.acon("ps", "--quiet").out.split()
        if failed != SIXTH_EXPOSED or len(running) != 1:
            raise SceneFailed(f"eve's program changed something: {sorted(failed)}, {running}")

    def _what_it_tried(self, name: str) -> dict[str, list[str]]:
        """By what it was after, how each way came out, as the program itself tells."""
        deadline = time.monotonic() + PATIENCE_S
        while "that is all" not in (told := self.stage.acon("logs", name).out):
            if time.monotonic() > deadline:
                raise SceneFailed(f"{name} was to tell what it tried, and told:\n{told}")
            time.sleep(0.1)
        outcomes: dict[str, list[str]] = {}
        for line in told.splitlines():
            way, _, outcome = line.partition("\t")
            outcomes.setdefault(way, []).append(outcome)
        return outcomes

    def with_layers(self) -> None:
        self.machine.boot()
        self.admit(*self.owners.all_bundles())
        layer, tar = self._program_layer("model")
        spoiled = bytearray(tar)
        spoiled[len(tar) // 2] ^= 1
        self.refused(
            "one changed byte in a layer", "digest", lambda: self.send_layer(layer, bytes(spoiled))
        )
        older = self.owners.vendor("python-1", 1, ["python:1"])
        forged = self.owners.vendor("python-eve", 3, ["python:2", "python:3"], signer="eve")
        model = self.owners.bundle("model")
        self.machine.load([older])
        tried = "the CSP's older interpreter, python:1"
        self.refused(tried, "delegation", lambda: self.start(model))
        self.machine.load([forged])
        self.refused("python:3 signed by another key", "delegation", lambda: self.start(model))

    def _program_layer(self, name: str) -> tuple[Digest, bytes]:
        """A pinned layer of a program, as uncompressed tar."""
        bundle = self.owners.bundle(name)
        sources = json.loads((bundle / "sources.json").read_bytes())["layers"]
        top = str(Bundle(bundle).signed().manifest.layers[-1])
        source = sources[top]
        blob = Path(bundle, source["file"])
        tar = gzip.decompress(blob.read_bytes())
        digest = parse_digest(top)
        if digest_of(digest.algorithm, tar) != digest:
            raise SceneFailed(f"{blob} does not hold {digest}")
        return digest, tar

    def with_another_supervisor(self) -> None:
        bundles = [self.owners.bundle("python-2"), *self.owners.all_bundles()]
        unsafe = self.stage.out / "unsafe.toml"
        self.machine.write_config(unsafe, more="unsafe_allow_swap = true")
        plugins = self._install_plugin()
        one_more = self.stage.out / "one-plugin-more.toml"
        self.machine.write_config(one_more, more_plugins=["acme_owner_rules"])
        setting, plugin = "unsafe_allow_swap", "acme_owner_rules"
        for tried, config, environment, check, naming in (
            ("one unsafe_ setting more", unsafe, None, "supervisor.unsafe_setting", setting),
            ("one plugin more", one_more, plugins, "supervisor.plugin_unexpected", plugin),
        ):
            self.machine.boot(config=config, environment=environment)
            self.machine.load([*bundles, "--together"])
            self.stage.acon("seal")
            evidence, nonce = self.outside_evidence(config.stem)
            failed = self.relying_party.failed_checks(evidence, nonce)
            expected = {"supervisor.config", check}
            self.exposed(f"a supervisor with {tried}", expected, failed, naming=naming)

    def _install_plugin(self) -> dict[str, str]:
        """Somebody else's plugin package, installed where only this daemon finds it."""
        package = Path(__file__).resolve().parents[1] / "owner_rules"
        target = self.stage.out / "somebody-elses-plugin"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
        command += ["--no-build-isolation", "--disable-pip-version-check", "--target", str(target)]
        subprocess.run([*command, str(package)], check=True, capture_output=True)
        return {"PYTHONPATH": str(target)}


class _Bytes:
    """`acon.tar_source.TarSource` over bytes in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    @property
    def size_bytes(self) -> int:
        return len(self._data)

    def chunks(self, offset: int) -> Generator[bytes, None, None]:
        for start in range(offset, len(self._data), 1 << 16):
            yield self._data[start : start + (1 << 16)]


def _drop_event(records: list[bytes]) -> None:
    del records[2]


def _swap_events(records: list[bytes]) -> None:
    records[-1], records[-2] = records[-2], records[-1]


@contextmanager
def _proxy(keys: Path) -> Iterator[None]:
    """The operator's own TLS in front of the gateway, passing everything on."""
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-nodes", "-sha384", "-days", "1"]
    command += ["-pkeyopt", "ec_paramgen_curve:P-384", "-subj", "/CN=gateway"]
    command += ["-keyout", str(keys / "proxy.pem"), "-out", str(keys / "proxy.crt")]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(keys / "proxy.crt", keys / "proxy.pem")

    class Relay(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with context.wrap_socket(self.request, server_side=True) as client:
                upstream = Channel(GATEWAY_PORT)
                request = client.recv(1 << 16).decode()
                path = request.split(" ")[1]
                status, body = upstream.ask("GET", path)
                upstream.close()
                head = f"HTTP/1.1 {status} OK\r\nContent-Length: {len(body)}\r\n\r\n"
                client.sendall(head.encode() + body)

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = True
        daemon_threads = True

    with Server(("127.0.0.1", PROXY_PORT), Relay) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
