"""Owners, vendors and OCI images, small enough to be made for each test."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio
from acon_daemon import Bundles, Daemon, running_daemon
from acon_helpers import Acon, MakeLayout, MakeSigner, Signer
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from acon import cli


@pytest.fixture
def make_signer(tmp_path: Path) -> MakeSigner:
    def make(name: str, *, hash_algorithm: hashes.SHA256 | hashes.SHA384 | None = None) -> Signer:
        key = ec.generate_private_key(ec.SECP384R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=30))
            .sign(key, hash_algorithm or hashes.SHA384())
        )
        signer = Signer(
            tmp_path / f"{name}.key", tmp_path / f"{name}.pem", tmp_path / f"{name}.der"
        )
        signer.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        signer.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        signer.certificate_der.write_bytes(certificate.public_bytes(serialization.Encoding.DER))
        return signer

    return make


@pytest.fixture
def make_layout(tmp_path: Path) -> MakeLayout:
    """Writes an OCI layout of gzip layers; returns its folder."""

    def make(
        name: str,
        layers: list[bytes],
        *,
        config: dict[str, object] | None = None,
        tag: str = "1",
    ) -> Path:
        folder = tmp_path / "layouts" / name
        blobs = folder / "blobs" / "sha256"
        blobs.mkdir(parents=True)

        def put(raw: bytes, media_type: str) -> dict[str, object]:
            digest = hashlib.sha256(raw).hexdigest()
            (blobs / digest).write_bytes(raw)
            return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(raw)}

        image = "application/vnd.oci.image"
        manifest = {
            "schemaVersion": 2,
            "config": put(
                json.dumps(
                    {
                        "architecture": "amd64",
                        "os": "linux",
                        "config": config or {},
                        "rootfs": {
                            "type": "layers",
                            "diff_ids": [
                                f"sha256:{hashlib.sha256(tar).hexdigest()}" for tar in layers
                            ],
                        },
                    }
                ).encode(),
                f"{image}.config.v1+json",
            ),
            "layers": [
                put(gzip.compress(tar, mtime=0), f"{image}.layer.v1.tar+gzip") for tar in layers
            ],
        }
        descriptor = put(json.dumps(manifest).encode(), f"{image}.manifest.v1+json")
        descriptor["annotations"] = {"org.opencontainers.image.ref.name": tag}
        index = {"schemaVersion": 2, "manifests": [descriptor]}
        (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
        (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}', encoding="utf-8")
        return folder

    return make


@pytest.fixture
def acon() -> Acon:
    """Runs a command line in this process; argparse's exits count as exit codes.

    In an async test it blocks the test's own loop: for commands that talk to a server in it
    there is `Daemon.acon`.
    """

    def run(*words: object) -> int:
        try:
            return cli.main([str(word) for word in words])
        except SystemExit as error:
            return int(error.code or 0)

    def run_anywhere(*words: object) -> int:
        if not trio.lowlevel.in_trio_run():
            return run(*words)
        # Commands start a loop of their own.
        with ThreadPoolExecutor(max_workers=1) as thread:
            return thread.submit(run, *words).result()

    return run_anywhere


@pytest.fixture
async def daemon(tmp_path: Path, acon: Acon) -> AsyncIterator[Daemon]:
    async with running_daemon(tmp_path, acon) as one:
        yield one


@pytest.fixture
def bundles(tmp_path: Path, make_layout: MakeLayout, acon: Acon) -> Bundles:
    return Bundles(tmp_path, make_layout, acon)
