"""The clients for programs in containers, against the plugin's own socket."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio
from http_fakes import IMAGE_ID, FakeContainer, container_served

from supervisor import Busy, FormatError
from supervisor.formats.status import AttestationData

INSIDE = Path(__file__).resolve().parents[2] / "examples" / "inside"
NONCE = "0f" * 16
PYTHON = (sys.executable, "-I", str(INSIDE / "acon_inside.py"))


async def run(
    socket: Path, *words: str, client: str = "", inside: Sequence[str] = PYTHON
) -> subprocess.CompletedProcess[bytes]:
    options = ["--socket", str(socket)] if inside == PYTHON else []
    environment = {**os.environ, "ACON_CONTAINER_SOCKET": str(socket), "ACON_CLIENT": client}
    with trio.fail_after(120):
        return await trio.run_process(
            [*inside, *options, *words],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            env=environment,
        )


# --- acon_inside.py ------------------------------------------------------------------------------


async def test_the_python_client_says_who_it_is(tmp_path: Path) -> None:
    async with container_served(FakeContainer(), tmp_path) as socket:
        done = await run(socket, "self")
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout) == {"container_id": 5, "image_id": IMAGE_ID}


async def test_the_python_client_gets_evidence_for_its_key_and_data(tmp_path: Path) -> None:
    container = FakeContainer()
    key = tmp_path / "key.der"
    key.write_bytes(b"a public key")
    async with container_served(container, tmp_path) as socket:
        full = await run(
            socket,
            *("evidence", "--nonce", NONCE, "--public-key", str(key), "--user-data", "caf\u00e9"),
        )
        bare = await run(socket, "evidence")
    assert full.stdout == bare.stdout == b'{"container":5}'
    (asked, by_itself) = container.asked
    digest = hashlib.sha384(b"a public key").hexdigest()
    assert asked == (bytes.fromhex(NONCE), digest, "caf\u00e9".encode())
    assert len(by_itself[0]) == 32
    assert by_itself[1:] == (None, None)


async def test_the_python_client_says_something_of_its_container_and_takes_it_back(
    tmp_path: Path,
) -> None:
    container = FakeContainer()
    binary = tmp_path / "binary"
    binary.write_bytes(b"\0\xff")
    async with container_served(container, tmp_path) as socket:
        for words in (["say", "ready"], ["say", "--binary", str(binary)], ["forget"]):
            done = await run(socket, *words)
            assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert container.said == [
        AttestationData(kind="text", data=base64.b64encode(b"ready").decode()),
        AttestationData(kind="binary", data="AP8="),
        None,
    ]


async def test_the_python_client_passes_on_why_it_was_refused(tmp_path: Path) -> None:
    container = FakeContainer()
    container.refusal = Busy("evidence", "too many requests wait for a quote")
    async with container_served(container, tmp_path) as socket:
        refused = await run(socket, "evidence")
        container.refusal = FormatError("attestation data.data", "attestation data is bounded")
        unsaid = await run(socket, "say", "x")
    nobody = await run(tmp_path / "nowhere.sock", "self")
    assert (refused.returncode, refused.stdout) == (1, b"")
    assert b"too many requests wait for a quote" in refused.stderr
    assert b"attestation data is bounded" in unsaid.stderr
    assert nobody.returncode == 1
    assert b"No such file" in nobody.stderr


# --- evidence.sh ---------------------------------------------------------------------------------

SHELL = ("sh", str(INSIDE / "evidence.sh"))


def why_not(client: str) -> str | None:
    """Why this machine cannot try the script's client."""
    program = shutil.which(client)
    if program is None:
        return f"needs {client}"
    if client == "nc":
        told = subprocess.run([program, "-h"], capture_output=True, timeout=10, check=False)
        return None if b"-U" in told.stdout + told.stderr else "this nc has no Unix sockets (-U)"
    if client == "busybox":
        command = [program, "nc", "local:/nonexistent/acon.sock"]
        told = subprocess.run(command, capture_output=True, timeout=10, check=False)
        missing = b"No such file" not in told.stderr
        return "this busybox has no Unix sockets (FEATURE_UNIX_LOCAL)" if missing else None
    return None


@pytest.mark.parametrize("client", ["curl", "nc", "busybox"])
async def test_the_shell_example_gets_evidence(tmp_path: Path, client: str) -> None:
    reason = why_not(client)
    if reason is not None:
        pytest.skip(reason)
    container = FakeContainer()
    async with container_served(container, tmp_path) as socket:
        chosen = await run(socket, NONCE, client=client, inside=SHELL)
        by_itself = await run(socket, client=client, inside=SHELL)
        container.refusal = Busy("evidence", "too many requests wait for a quote")
        refused = await run(socket, NONCE, client=client, inside=SHELL)
    assert (chosen.returncode, chosen.stdout.rstrip(b"\n"), chosen.stderr) == (
        0,
        b'{"container":5}',
        b"",
    )
    assert by_itself.stdout == chosen.stdout
    assert [len(asked[0]) for asked in container.asked] == [16, 32]
    assert container.asked[0] == (bytes.fromhex(NONCE), None, None)
    assert refused.returncode != 0
    assert b"too many requests wait for a quote" in refused.stdout
