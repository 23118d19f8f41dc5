"""An image that ACON's own client made and signed, loaded as that client does (API v1)."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from integration_machine import Machine, operations_of, wait_until

from supervisor.formats.log_events import StartContainerEvent, decode_event
from supervisor.formats.signature import matching_form

pytestmark = pytest.mark.root

TIMEOUT_S = 90
VENDOR_LAYER = (
    "e1a42254892e1fc70efa7de64f5f12a22da1c9831983b613653bf08fc60e9c6f"
    "de65500876ddc7527fe0ba631bc9a4db"
)
APP_LAYER = (
    "09fbfab89474208e3df994d1397b1f25093e4df1316d3a6f2ef06a3f7de7737f"
    "aa959c8aba173ab4d9bc46d502e1cff2"
)


def read_image(folder: Path) -> tuple[bytes, bytes, bytes]:
    """(manifest in the form that was signed, signature, certificate)."""
    signature = (folder / "signature").read_bytes()
    certificate = (folder / "signer.cer").read_bytes()
    form, manifest = matching_form((folder / "acon.json").read_bytes(), signature, certificate)
    assert form in ("canonical", "go")  # never as it lies in the repository, with white space
    return manifest, signature, certificate


def test_a_real_repository_of_acons_client_is_loaded_started_and_verified(
    machine: Machine, vectors: Path
) -> None:
    repository = vectors / "acon" / "aconcli_repo"
    folders = {folder.name: folder for folder in (repository / "manifests" / "sha384").iterdir()}
    vendor, app = (
        next(folder for name, folder in folders.items() if name.startswith(prefix))
        for prefix in ("ac3152d6", "b1c8b25c")
    )
    machine.start_daemon()
    transport = httpx.HTTPTransport(uds=str(machine.api))
    with httpx.Client(transport=transport, base_url="http://acond", timeout=TIMEOUT_S) as client:

        def add(folder: Path) -> str:
            manifest, signature, certificate = read_image(folder)
            files = {
                "manifest": ("acon.json", manifest, "application/octet-stream"),
                "sig": ("signature", signature, "application/octet-stream"),
                "cert": ("signer.cer", certificate, "application/octet-stream"),
            }
            answer = client.post("/api/v1/manifest", files=files)
            assert answer.status_code == 200, answer.text
            image_id = str(answer.json()["image_id"])
            assert image_id.endswith("/" + folder.name)
            return image_id

        def put(digest: str) -> None:
            content = (repository / "blobs" / "sha384" / f"{digest}.tar").read_bytes()
            answer = client.put(f"/api/v1/blob/{digest}.tar", params={"alg": 2}, content=content)
            assert answer.status_code == 200, answer.text

        vendor_id = add(vendor)
        put(VENDOR_LAYER)
        app_id = add(app)
        put(APP_LAYER)
        assert client.post("/api/v1/manifest/finalize").status_code == 200
        started = client.post(
            "/api/v1/container/start",
            params={"image_id": app_id},
            files={"env": (None, "A=1\nB=x\n")},
        )
        assert started.status_code == 200, started.text
        container_id = started.json()["container_id"]
        (info,) = client.get("/api/v1/container/inspect").json()["info"]
        assert (info["container_id"], info["image_id"]) == (container_id, app_id)
        assert info["exe_path"] == "/app.sh"

        (view,) = machine.containers()
        assert view.pid is not None
        process = Path(f"/proc/{view.pid}")
        # As its app.sh says: it greets, and then becomes this.
        wait_until(
            lambda: (process / "cmdline").read_bytes() == b"sleep\x001000\x00", "a sleeping app"
        )
        environment = (process / "environ").read_bytes().split(b"\0")
        assert {b"PATH=/bin", b"A=1", b"B=x"} <= set(environment)
        policy = machine.new_policy()
        records = machine.require_agreement(policy)
        assert operations_of(records) == [
            "Start",
            "AdmitImages",
            "AdmitImages",
            "Seal",
            "StartContainer",
        ]
        start = decode_event(records[-1].operation, records[-1].content)
        assert isinstance(start, StartContainerEvent)
        assert start.layers == (f"sha384/{VENDOR_LAYER}", f"sha384/{APP_LAYER}")
        (delegation,) = start.delegations
        assert delegation.index == 0
        assert [hop.alias for hop in delegation.hops] == ["busybox:1"]
        assert vendor_id.split("/")[1] in delegation.hops[0].signer

        # 15 is not among its signals, -9 is.
        kill = f"/api/v1/container/{container_id}/kill"
        assert client.post(kill, data={"signal_num": "15"}).status_code == 401
        assert client.post(kill, data={"signal_num": "-9"}).status_code == 200
        inspect = f"/api/v1/container/{container_id}/inspect"
        wait_until(
            lambda: client.get(inspect).json()["info"][0]["wstatus"] == 9, "a container killed by 9"
        )
        assert json.loads(client.get(inspect).text)["info"][0]["state"] == 0
    machine.require_agreement(policy)
