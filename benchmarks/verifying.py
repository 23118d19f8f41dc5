"""What it costs to verify evidence, beside the cryptography that it cannot do without."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import msgspec
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from benchmarks.figures import Figure, Section, median_seconds
from benchmarks.ram import ram_folder
from plugins.tdx_sim import TdxSim
from plugins.tdx_sim.collateral import issue
from plugins.tdx_sim.pki import SimPki, ensure_pki
from plugins.tdx_sim.process import serve
from supervisor import ContainerRuntime, LayerStore, PluginContext, hookimpl
from supervisor.formats.base64_text import from_base64
from supervisor.formats.digest import digest_of
from supervisor.formats.evidence import decode_evidence
from supervisor.measurement import in_worker_thread
from supervisor.operations import ManifestUpload
from supervisor.testing import (
    InMemoryConfig,
    MemoryLayers,
    MemoryRuntime,
    Owner,
    manifest,
    plugin,
    running,
)
from verifier import parse_policy, policy_from_evidence, verify
from verifier.dcap import read_collateral_json, verified_claims_json

IMAGES = 5
LAYER = b"\0" * 1024  # an empty tar


class MemoryContainers:
    """Layers and containers in memory, beside the software TD's registers and quotes."""

    Config = InMemoryConfig

    def __init__(self, config: InMemoryConfig, context: PluginContext) -> None:
        self._layers = MemoryLayers()
        self._runtime = MemoryRuntime()

    @hookimpl
    async def layer_store(self) -> LayerStore:
        return self._layers

    @hookimpl
    async def container_runtime(self) -> ContainerRuntime:
        return self._runtime


class Given(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a relying party holds in its hands."""

    evidence: bytes
    nonce: bytes
    collateral: str
    at: datetime
    root_pem: bytes
    root_der: bytes
    images: tuple[ManifestUpload, ...]


def run(*, rounds: int = 50) -> Section:
    with ram_folder() as folder:
        given = trio.run(_sealed_machine, folder)
    policy = parse_policy(policy_from_evidence(given.evidence, collateral=given.collateral))

    def whole() -> bool:
        return verify(
            given.evidence,
            policy,
            nonce=given.nonce,
            collateral=given.collateral,
            at=given.at,
            trusted_root_pem=given.root_pem,
        ).ok

    if not whole():
        raise RuntimeError("the evidence satisfies the policy that was written from it")
    quote = from_base64(decode_evidence(given.evidence).quote, item="evidence.quote")
    quote_alone = median_seconds(
        lambda: verified_claims_json(
            quote,
            read_collateral_json(given.collateral),
            root_der=given.root_der,
            now_s=int(given.at.timestamp()),
        ),
        rounds=rounds,
    )
    signatures_alone = median_seconds(partial(_check_signatures, given.images), rounds=rounds)
    all_of_it = median_seconds(whole, rounds=rounds)
    return Section(
        name="verifying",
        title="Verifying evidence",
        method=(
            f"Evidence of a sealed software TD with {IMAGES} images, each running, "
            f"{len(given.evidence)} bytes: `verifier.verify` to its verdict. Beside it what "
            f"nobody can leave out: `dcap-qvl` verifying the quote, and {IMAGES} bare ECDSA P-384 "
            f"signatures. Median of {rounds}. For information; no goal."
        ),
        figures=(
            Figure(name="whole verdict", value=all_of_it * 1000, unit="ms"),
            Figure(name="dcap-qvl alone", value=quote_alone * 1000, unit="ms"),
            Figure(name="signatures alone", value=signatures_alone * 1000, unit="ms"),
            Figure(
                name="whole beside both",
                value=all_of_it / (quote_alone + signatures_alone),
                unit="times",
            ),
        ),
    )


async def _sealed_machine(folder: Path) -> Given:
    pki = ensure_pki(folder / "pki")
    td_socket = folder / "td" / "td.sock"
    owner = Owner("somebody")
    layer = digest_of("sha384", LAYER)
    images = tuple(
        owner.sign(
            manifest(name=f"app-{number}:1", layers=[str(layer)], accepts=[f"{owner.signer}/*"])
        )
        for number in range(IMAGES)
    )
    nonce = secrets.token_bytes(32)
    plugins = [
        plugin(TdxSim, folder, table={"socket": str(td_socket)}),
        plugin(MemoryContainers, folder),
    ]
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, td_socket, pki)
        async with running(plugins, folder, run_blocking=in_worker_thread) as supervisor:
            admitted = await supervisor.admit(images)
            upload = await supervisor.upload_layer(layer, size_bytes=len(LAYER))
            await upload.write(LAYER)
            await supervisor.finish_layer(layer, upload)
            for image_id in admitted.image_ids:
                await supervisor.start(image_id, [])
            await supervisor.seal()
            evidence = await supervisor.evidence(nonce)
        nursery.cancel_scope.cancel()
    return _given(evidence, nonce, pki, images)


def _given(evidence: bytes, nonce: bytes, pki: SimPki, images: tuple[ManifestUpload, ...]) -> Given:
    at = datetime.now(UTC)
    return Given(
        evidence=evidence,
        nonce=nonce,
        collateral=issue(pki, at),
        at=at,
        root_pem=pki.root.pem,
        root_der=pki.root_der,
        images=images,
    )


def _check_signatures(images: Sequence[ManifestUpload]) -> None:
    for image in images:
        key = x509.load_der_x509_certificate(image.certificate_der).public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise TypeError("owners of the benchmark sign with ECDSA")
        key.verify(image.signature, image.manifest, ec.ECDSA(hashes.SHA384()))
