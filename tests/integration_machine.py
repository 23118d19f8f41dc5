"""A whole machine for a test: a software TD, the daemon in it, both real processes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import trio
from integration_images import Image, layers_of, upload_of

from acon.client import Client
from acon.container_client import Occurrence
from plugins.oci_runtime.hierarchies import MOUNTINFO, visible_hierarchies
from plugins.tdx_sim.client import SimRegisters
from plugins.tdx_sim.collateral import issue
from plugins.tdx_sim.pki import ensure_pki
from supervisor.formats.base64_text import from_base64
from supervisor.formats.event_log import LogRecord, replay, split_log
from supervisor.formats.evidence import Evidence, decode_evidence
from supervisor.formats.status import Status
from supervisor.operations import ContainerView, ImageView
from verifier import Verdict, parse_policy, policy_from_evidence, verify

BIN = Path(sys.executable).parent
PLUGINS = ("tdx_sim", "image_store", "csp_delegation", "oci_runtime", "http_api")
RTMR_INDEX = 3
# Only a hang takes so long: the machine may be slow and shared.
PATIENCE_S = 90
T = TypeVar("T")


def wait_until(holds: Callable[[], object], what: str) -> None:
    """Poll until `holds()` is true; a test waits for what it needs, never for a time."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, f"did not come about: {what}"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether a process still runs (one that nobody has reaped yet does not)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def uid_in_machine(pid: int) -> int:
    """The uid that the machine sees a process under."""
    status = Path(f"/proc/{pid}/status").read_text()
    match = re.search(r"^Uid:\s+(\d+)", status, re.MULTILINE)
    assert match is not None
    return int(match[1])


class Machine:
    """One software TD and at most one daemon in it. `close` proves that nothing is left."""

    def __init__(self, folder: Path, pki: Path) -> None:
        self.folder = folder
        self.pki = pki
        # Short, since socket paths are; passable for containers; and in RAM wherever /run is.
        self.run_dir = Path(tempfile.mkdtemp(prefix="acon-it-", dir="/run"))
        mount = ["mount", "-t", "tmpfs", "-o", "mode=0711,size=512m", "acon-it", str(self.run_dir)]
        subprocess.run(mount, check=True)
        self.runtime_dir = self.run_dir / "d"
        self.api = self.runtime_dir / "api.sock"
        self.td_socket = self.run_dir / "td" / "td.sock"
        self.config = folder / "acond.toml"
        self.log = folder / "acond.log"
        self.td: subprocess.Popen[bytes] | None = None
        self.daemon: subprocess.Popen[bytes] | None = None
        self._processes: list[subprocess.Popen[bytes]] = []
        self._collateral = issue(ensure_pki(pki), datetime.now(UTC))
        self.write_config()

    # --- its processes --------------------------------------------------------------------

    def write_config(self, *, top: str = "", http: str = "", sim: str = "", more: str = "") -> None:
        self.config.write_text(
            f'runtime_dir = "{self.runtime_dir}"\nunsafe_allow_swap = true\n'
            f"{top}\n"
            f"[plugins]\norder = {json.dumps(PLUGINS)}\n\n"
            f'[plugin.tdx_sim]\nsocket = "{self.td_socket}"\n{sim}\n\n'
            f'[plugin.http_api]\nsocket = "{self.api}"\n{http}\n\n{more}\n'
        )

    def power_on(self) -> None:
        """Start the software TD; its registers live until it ends or is booted."""
        with (self.folder / "td.log").open("ab") as log:
            self.td = subprocess.Popen(
                [BIN / "acon", "sim", "run", "--pki", self.pki, "--td-socket", self.td_socket],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._processes.append(self.td)
        td = self.td
        wait_until(lambda: self.td_socket.is_socket() or td.poll() is not None, "the software TD")
        assert td.poll() is None, (self.folder / "td.log").read_text()

    def spawn_daemon(self) -> subprocess.Popen[bytes]:
        """Start a daemon and wait for nothing."""
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [BIN / "acond", "--config", self.config],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._processes.append(process)
        return process

    def start_daemon(self) -> None:
        """Start the daemon and wait until it serves."""
        before = self.log_events("ready")
        self.daemon = daemon = self.spawn_daemon()
        wait_until(
            lambda: len(self.log_events("ready")) > len(before) or daemon.poll() is not None,
            "a daemon that is ready",
        )
        assert daemon.poll() is None, self.log.read_text()

    def log_events(self, event: str) -> list[dict[str, object]]:
        """The daemon's log lines of one kind, from all of its lives."""
        if not self.log.exists():
            return []
        found = []
        for line in self.log.read_bytes().splitlines():
            if line.startswith(b"{"):
                entry = json.loads(line)
                if entry.get("event") == event:
                    found.append(entry)
        return found

    def kill_daemon(self) -> None:
        """As a crash would: no handler runs."""
        assert self.daemon is not None
        self.daemon.kill()
        self.daemon.wait(PATIENCE_S)
        self.daemon = None

    def stop_daemon(self) -> int:
        """SIGTERM; returns the exit status."""
        assert self.daemon is not None
        self.daemon.terminate()
        code = self.daemon.wait(PATIENCE_S)
        self.daemon = None
        return code

    def boot(self) -> None:
        """Boot the TD: its registers fall to zero, whatever runs in it."""
        self.acon("sim", "boot", "--td-socket", self.td_socket)

    def acon(self, *arguments: object, expect: int = 0) -> str:
        """A command of its own; returns its stdout."""
        done = subprocess.run(
            [BIN / "acon", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
            env={**os.environ, "ACON_SOCKET": str(self.api)},
        )
        assert done.returncode == expect, done.stdout + done.stderr
        return done.stdout

    def acond(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """A daemon that is to end by itself."""
        return subprocess.run(
            [BIN / "acond", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )

    # --- what its clients do ----------------------------------------------------------------

    def ask(self, work: Callable[[Client], Awaitable[T]]) -> T:
        """One conversation with the daemon."""

        async def converse() -> T:
            async with Client.over_socket(self.api) as client:
                return await work(client)

        return trio.run(converse)

    def load(self, *images: Image, together: bool = False) -> None:
        """Admit the images, one after the other or as a group, and upload their layers."""

        async def work(client: Client) -> None:
            groups = [images] if together else [(image,) for image in images]
            for group in groups:
                await client.admit([upload_of(image) for image in group])
            for layer in layers_of(*images):
                await client.upload_layer(layer.digest, layer)

        self.ask(work)

    def load_layers(self, *images: Image) -> None:
        """Upload the layers of images that are admitted already."""

        async def work(client: Client) -> None:
            for layer in layers_of(*images):
                await client.upload_layer(layer.digest, layer)

        self.ask(work)

    def start(self, image: Image, *environment: str) -> ContainerView:
        """Start a container and return how it is listed."""

        async def work(client: Client) -> ContainerView:
            container_id = await client.start(image.image_id, environment)
            return next(
                one for one in await client.containers() if one.container_id == container_id
            )

        return self.ask(work)

    def images(self) -> tuple[ImageView, ...]:
        return self.ask(lambda client: client.images())

    def containers(self) -> tuple[ContainerView, ...]:
        return self.ask(lambda client: client.containers())

    def status(self) -> Status:
        return self.ask(lambda client: client.status())

    def events(self) -> list[Occurrence]:
        """What this daemon has told of itself since it began."""

        async def work(client: Client) -> list[Occurrence]:
            async with client.events() as happened:
                return [one async for one in happened if isinstance(one, Occurrence)]

        return self.ask(work)

    def seal(self) -> None:
        self.ask(lambda client: client.seal())

    def fetch_evidence(self) -> tuple[bytes, bytes]:
        """(nonce, evidence file)."""
        nonce = secrets.token_bytes(32)
        return nonce, self.ask(lambda client: client.evidence(nonce))

    def new_policy(self) -> str:
        """What the machine shows now, taken for what is expected."""
        _, raw = self.fetch_evidence()
        return policy_from_evidence(raw, collateral=self._collateral)

    def judge(
        self,
        nonce: bytes,
        raw: bytes,
        policy: str,
        *,
        key_sha384: str | None = None,
        user_data: bytes | None = None,
        image_id: str | None = None,
    ) -> Verdict:
        """As a relying party that trusts the simulator's root."""
        return verify(
            raw,
            parse_policy(policy.encode()),
            nonce=nonce,
            collateral=self._collateral,
            at=datetime.now(UTC),
            trusted_root_pem=(self.pki / "root.pem").read_bytes(),
            expected_container_key_sha384=key_sha384,
            expected_user_data=user_data,
            expected_container_image_id=image_id,
        )

    def register(self) -> bytes:
        """The live register, as the software TD says."""
        return self._registers.read()

    def extend_behind_its_back(self) -> None:
        """What any other program in the TD could do."""
        self._registers.extend(hashlib.sha384(b"somebody else").digest())

    @property
    def _registers(self) -> SimRegisters:
        return SimRegisters(self.td_socket, RTMR_INDEX, timeout_s=PATIENCE_S)

    def require_agreement(self, policy: str | None = None) -> tuple[LogRecord, ...]:
        """Log, register, images and status agree: verified as a relying party would, and
        compared with the live register. Returns the log's records."""
        nonce, raw = self.fetch_evidence()
        records = records_of(decode_evidence(raw))
        assert replay(record.digest_sha384 for record in records) == self.register()
        # No policy expects that nothing at all may run, so a verdict needs an image.
        if "AdmitImages" in operations_of(records):
            expected = policy or policy_from_evidence(raw, collateral=self._collateral)
            verdict = self.judge(nonce, raw, expected)
            assert verdict.ok, failed_checks(verdict)
        return records

    # --- what must be gone ------------------------------------------------------------------

    def container_processes(self) -> set[int]:
        """Whoever lives in a control group of this machine's daemon."""
        found: set[int] = set()
        for group in self.groups():
            for folder, _, _ in os.walk(group):
                found.update(map(int, Path(folder, "cgroup.procs").read_text().split()))
        return {pid for pid in found if is_alive(pid)}

    def groups(self) -> list[Path]:
        """The control groups of this machine's daemon."""
        # Named after the plugin's folder, as the runtime's passages are.
        instance = hashlib.sha256(
            str(self.runtime_dir / "plugins" / "oci_runtime").encode()
        ).hexdigest()[:12]
        groups = [one.mount_point / f"acond-{instance}" for one in visible_hierarchies()]
        return [group for group in groups if group.is_dir()]

    def mounts(self) -> list[str]:
        lines = MOUNTINFO.read_text().splitlines()
        return [line.split(" ")[4] for line in lines if f"{self.run_dir}/" in line]

    def sockets(self) -> list[Path]:
        return [path for path in self.run_dir.rglob("*") if path.is_socket()]

    def processes(self) -> list[str]:
        """Command lines that name this machine's folders: runtimes, daemons, simulators."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    line = (entry / "cmdline").read_bytes()
                except (FileNotFoundError, ProcessLookupError):
                    continue
                if os.fsencode(self.run_dir) in line or os.fsencode(self.config) in line:
                    found.append(line.replace(b"\0", b" ").decode())
        return found

    def require_nothing_left(self) -> None:
        """After the daemon's end in order: mounts, groups, processes, sockets, uploads."""
        assert self.mounts() == []
        assert self.groups() == []
        assert [path for path in self.sockets() if path.parent != self.td_socket.parent] == []
        assert [line for line in self.processes() if "acon sim" not in line] == []

    def close(self) -> None:
        """End everything. What a test killed is ended by a last daemon, as an operator would."""
        try:
            if self.daemon is not None and self.daemon.poll() is None:
                self.stop_daemon()
            if self.groups() or self.mounts():
                if self.td is None or self.td.poll() is not None:
                    self.power_on()
                self.start_daemon()
                self.stop_daemon()
            self.require_nothing_left()
        finally:
            for process in reversed(self._processes):
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
                    try:
                        process.wait(PATIENCE_S)
                    except subprocess.TimeoutExpired:
                        process.kill()
                        process.wait()
            subprocess.run(["umount", "--lazy", str(self.run_dir)], check=True)
            self.run_dir.rmdir()


@contextmanager
def machine_in(folder: Path, pki: Path) -> Iterator[Machine]:
    machine = Machine(folder, pki)
    try:
        yield machine
    finally:
        machine.close()


def records_of(evidence: Evidence) -> tuple[LogRecord, ...]:
    raw = from_base64(evidence.cc_eventlog, item="cc_eventlog")
    return split_log(raw, rtmr_index=evidence.rtmr_index).records


def failed_checks(verdict: Verdict) -> list[str]:
    """The innermost checks that did not pass."""
    return [
        f"{check.id}: expected {check.expected}, found {check.actual}"
        for root in verdict.checks
        for check in root.leaves()
        if check.outcome.value == "fail"
    ]


def operations_of(records: Sequence[LogRecord]) -> list[str]:
    return [record.operation for record in records]
