"""What a real container can say through its own socket, and to whom it cannot speak."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import secrets
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from integration_images import Image, ImageMaker
from integration_machine import Machine, failed_checks, wait_until

from plugins.tdx_sim.wire import owner_socket_path
from supervisor.formats.evidence import decode_evidence

pytestmark = pytest.mark.root

SPEAK = Path(__file__).resolve().parents[1] / "speak_from_inside.py"
OWN_SOCKET = "/run/acon.sock"
# The same one, where ACON's clients look.
ALSO_OWN_SOCKET = "/shared/acon.sock"
FINDS_SOCKETS = """\
find / -type s > /tmp/found.new 2> /dev/null; mv /tmp/found.new /tmp/found
trap 'exit 0' TERM
while :; do sleep 1 & wait $!; done
"""


def speak(pid: int, path: object, said: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, str(SPEAK), str(pid), str(path)]
    return subprocess.run(command, input=said, capture_output=True, check=False, timeout=90)


def request(pid: int, method: str, path: str, body: object | None = None) -> tuple[int, bytes]:
    """One HTTP exchange with the container's own socket, from inside."""
    payload = b"" if body is None else json.dumps(body).encode()
    head = (
        f"{method} {path} HTTP/1.0\r\nHost: acond\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\n\r\n"
    )
    done = speak(pid, OWN_SOCKET, head.encode() + payload)
    assert done.returncode == 0, done.stderr
    answered, _, content = done.stdout.partition(b"\r\n\r\n")
    return int(answered.split()[1]), content


def test_evidence_through_the_own_socket_is_bound_to_the_container_and_its_key(
    machine: Machine, patient: Image, other: Image
) -> None:
    machine.start_daemon()
    machine.load(patient, other)
    machine.seal()
    views = [machine.start(image) for image in (patient, other)]
    policy = machine.new_policy()
    pid = views[0].pid
    assert pid is not None
    code, body = request(pid, "GET", "/self")
    assert (code, json.loads(body)) == (
        200,
        {"container_id": views[0].container_id, "image_id": patient.image_id},
    )
    nonce = secrets.token_bytes(32)
    key_sha384 = hashlib.sha384(b"a key that was made inside").hexdigest()
    code, raw = request(
        pid,
        "POST",
        "/evidence",
        {
            "nonce": nonce.hex(),
            "public_key_sha384": key_sha384,
            "user_data": base64.b64encode(b"and a word").decode(),
        },
    )
    assert code == 200, raw
    bound = decode_evidence(raw).request.container
    assert bound is not None
    assert bound.container_id == views[0].container_id
    assert bound.start_event_digest_sha384 == views[0].start_event_digest_sha384

    honest = machine.judge(
        nonce,
        raw,
        policy,
        key_sha384=key_sha384,
        user_data=b"and a word",
        image_id=patient.image_id,
    )
    assert honest.ok, failed_checks(honest)
    another_key = hashlib.sha384(b"another key").hexdigest()
    for verdict, check in (
        (machine.judge(nonce, raw, policy, image_id=other.image_id), "image"),
        (machine.judge(nonce, raw, policy, key_sha384=another_key), "key"),
        (machine.judge(nonce, raw, policy, user_data=b"another word"), "user_data"),
    ):
        assert not verdict.ok
        (failed,) = failed_checks(verdict)
        assert check in failed.partition(":")[0]


def test_a_container_cannot_speak_for_another(
    machine: Machine, patient: Image, other: Image
) -> None:
    machine.start_daemon()
    machine.load(patient, other)
    views = [machine.start(image) for image in (patient, other)]
    for view, image in zip(views, (patient, other), strict=True):
        assert view.pid is not None
        _, body = request(view.pid, "GET", "/self")
        assert json.loads(body)["image_id"] == image.image_id
    # Where the other's socket lies in the machine, there is nothing inside.
    sockets = machine.runtime_dir / "sockets"
    theirs = sockets / f"{views[1].container_id}.sock"
    assert theirs.is_socket()
    assert views[0].pid is not None
    assert speak(views[0].pid, theirs).stderr.strip() == b"ENOENT"
    # It cannot name a container to speak for, nor manage anything.
    nonce = secrets.token_hex(32)
    wrong = {"nonce": nonce, "container_id": views[1].container_id}
    assert request(views[0].pid, "POST", "/evidence", wrong)[0] == 400
    assert request(views[0].pid, "POST", "/api/v2/seal", {})[0] == 404
    assert not machine.status().sealed


def test_acons_clients_find_each_container_its_own_socket_in_the_folder_that_all_share(
    machine: Machine, patient: Image, other: Image
) -> None:
    machine.start_daemon()
    machine.load(patient, other)
    views = [machine.start(image) for image in (patient, other)]
    for view, image in zip(views, (patient, other), strict=True):
        assert view.pid is not None
        ask = b"GET /self HTTP/1.0\r\nHost: td\r\n\r\n"
        answer = json.loads(speak(view.pid, ALSO_OWN_SOCKET, ask).stdout.partition(b"\r\n\r\n")[2])
        assert answer == {"container_id": view.container_id, "image_id": image.image_id}


def test_what_a_program_says_of_itself_is_in_the_verdict_on_others_evidence_until_it_ends(
    machine: Machine, patient: Image, other: Image
) -> None:
    machine.start_daemon()
    machine.load(patient, other)
    views = [machine.start(image) for image in (patient, other)]
    policy = machine.new_policy()

    def said() -> dict[int, tuple[str, bytes]]:
        nonce, raw = machine.fetch_evidence()
        verdict = machine.judge(nonce, raw, policy)
        assert failed_checks(verdict) == []
        return {
            one.container_id: (one.kind, one.data)
            for start in verdict.facts.starts
            for one in start.attestation_data
        }

    one, two = (view.container_id for view in views)
    assert views[0].pid is not None and views[1].pid is not None
    assert said() == {}
    words = {"kind": "text", "data": base64.b64encode(b"ready").decode()}
    assert request(views[0].pid, "PUT", "/attestation-data", words) == (200, b"{}")
    binary = struct.pack("<iIi", 2, 14, 1) + b"\xff\0"  # ACON's protocol
    assert speak(views[1].pid, ALSO_OWN_SOCKET, binary).stdout == struct.pack("<iI", 3, 8)
    assert said() == {one: ("text", b"ready"), two: ("binary", b"\xff\0")}
    assert request(views[0].pid, "DELETE", "/attestation-data")[0] == 200
    assert said() == {two: ("binary", b"\xff\0")}
    os.kill(views[1].pid, signal.SIGKILL)
    wait_until(lambda: machine.containers()[1].state == "exited", "the end of a container")
    assert said() == {}


def test_the_only_socket_that_a_container_can_reach_is_its_own(
    machine: Machine, images: ImageMaker
) -> None:
    image = images.make("finds-sockets", FINDS_SOCKETS)
    machine.start_daemon()
    machine.load(image)
    pid = machine.start(image).pid
    assert pid is not None
    found = Path(f"/proc/{pid}/root/tmp/found")
    wait_until(found.exists, "a container that has looked everywhere")
    # /proc shows the own root again and again; nothing else there is a file.
    seen = {line for line in found.read_text().split() if not line.startswith("/proc/")}
    assert seen == {OWN_SOCKET, ALSO_OWN_SOCKET}
    targets = machine.sockets()
    assert {machine.api, machine.td_socket, owner_socket_path(machine.td_socket)} < set(targets)
    for target in targets:
        assert speak(pid, target).stderr.strip() == b"ENOENT", target
    # The network is the TD's own, so sockets without a file would be reachable.
    abstract = [
        line
        for line in Path("/proc/net/unix").read_text().splitlines()
        if "@" in line and machine.run_dir.name in line
    ]
    assert abstract == []


def test_the_containers_user_may_not_open_the_machines_sockets(
    machine: Machine, patient: Image
) -> None:
    """Even if a path led there: the modes alone keep the container's user out."""
    machine.start_daemon()
    machine.load(patient)
    view = machine.start(patient)
    assert view.pid is not None
    uid = int(Path(f"/proc/{view.pid}/uid_map").read_text().split()[1])
    connect = (
        "import os, socket, sys; os.setgroups([]); os.setgid(int(sys.argv[1]));"
        "os.setuid(int(sys.argv[1]));"
        "socket.socket(socket.AF_UNIX).connect(sys.argv[2])"
    )
    for target in (machine.api, machine.td_socket, owner_socket_path(machine.td_socket)):
        done = subprocess.run(
            [sys.executable, "-c", connect, str(uid), str(target)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert "PermissionError" in done.stderr, target
