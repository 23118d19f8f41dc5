"""Complete evidence made in memory, honest unless a test alters one thing of it.

A `Scenario` holds everything that goes into one evidence file, as plain fields. A test
changes the fields that its adversary could change, and `build` does the rest as an honest
TD would: it encodes the log, extends the register, binds the request, signs the quote.
Two more hands are offered: `ship` alters the finished evidence, as whoever carries it
could, and `shipped_records` the log that is sent, while the register keeps the true one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding

from plugins.tdx_sim import collateral as sim_collateral
from plugins.tdx_sim import firmware, platform_identity
from plugins.tdx_sim.pki import SimPki
from supervisor.formats import canonical_json
from supervisor.formats.base64_text import to_base64
from supervisor.formats.delegation import AliasStatement, resolve_layers, statements_of
from supervisor.formats.event_log import (
    LogRecord,
    assemble_log,
    encode_record,
    extend,
    replay,
)
from supervisor.formats.evidence import (
    Evidence,
    EvidenceImage,
    EvidenceRequest,
    Proof,
    RequestContainer,
    encode_evidence,
    report_data_for,
    request_leaf,
)
from supervisor.formats.log_events import (
    AdmitImagesEvent,
    Component,
    LayerDelegation,
    LogEvent,
    SealEvent,
    StartContainerEvent,
    StartEvent,
    encode_event,
)
from supervisor.formats.merkle import inclusion_proof, root
from supervisor.formats.quote import (
    QeReport,
    QuoteAuth,
    build_header,
    pack_qe_report,
    pack_quote,
    pack_signed_part,
    qe_report_data,
)
from supervisor.formats.signature import SignedManifest, sign_manifest, verify_signed_manifest
from supervisor.formats.status import ContainerStatus, ImageStatus, Status, encode_status
from supervisor.formats.td_body import TdBody

AT = datetime(2026, 1, 15, 12, 0, tzinfo=UTC)
NONCE = bytes(range(32))
PYTHON_2 = "sha384/" + hashlib.sha384(b"python, build 2").hexdigest()
PYTHON_3 = "sha384/" + hashlib.sha384(b"python, build 3").hexdigest()
_APP_LAYER = "sha384/" + hashlib.sha384(b"an application").hexdigest()


# --- owners and images ----------------------------------------------------------------------


@cache
def signer(
    name: str, *, last_year: int = 2034, sha256: bool = False
) -> tuple[ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey, bytes]:
    """A key and its certificate (DER), the same for the same arguments."""
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .serial_number(1)
        .not_valid_before(datetime(2020, 1, 1))
        .not_valid_after(datetime(last_year, 1, 1))
    )
    if sha256:
        weak = ec.generate_private_key(ec.SECP256R1())
        certificate = builder.public_key(weak.public_key()).sign(weak, hashes.SHA256())
        return weak, certificate.public_bytes(Encoding.DER)
    key = ed25519.Ed25519PrivateKey.generate()
    certificate = builder.public_key(key.public_key()).sign(key, None)
    return key, certificate.public_bytes(Encoding.DER)


def signer_id(name: str) -> str:
    """`sha512/HEX`, since Ed25519 mandates SHA-512."""
    return "sha512/" + hashlib.sha512(signer(name)[1]).hexdigest()


def sign_image(owner: str, **fields: object) -> SignedManifest:
    key, certificate = signer(owner)
    raw = canonical_json.encode({"aconSpecVersion": [1, 0], **fields})
    return verify_signed_manifest(raw, sign_manifest(raw, key, certificate), certificate)


def program(
    owner: str,
    name: str,
    *,
    layers: Sequence[str] = (_APP_LAYER,),
    accepts: Sequence[str] | None = None,
    reject: bool = True,
    **fields: object,
) -> SignedManifest:
    """An executable image that accepts the two owners' images and rejects all others."""
    if accepts is None:
        accepts = [f"{signer_id(other)}/*" for other in ("alice", "bob")]
    return sign_image(
        owner,
        layers=list(layers),
        aliases={"self": {".": [f"{name}:1"]}},
        entrypoint=[f"/bin/{name}", "--serve"],
        env=["PORT=8080", "PORT", "DEBUG=", "MODE=fast"],
        policy={"accepts": list(accepts), "rejectUnaccepted": reject},
        **fields,
    )


def lender(owner: str, layer: str, *aliases: str) -> SignedManifest:
    """An image without entry point that calls one layer by some names."""
    return sign_image(owner, aliases={"contents": {layer: list(aliases)}})


def delegated(owner: str, alias: str) -> str:
    return f"signer/{signer_id(owner)}/{alias}"


def gateway() -> SignedManifest:
    return program("alice", "gateway")


def model() -> SignedManifest:
    return program("bob", "model", layers=[delegated("csp", "python:2"), _APP_LAYER])


def python_3() -> SignedManifest:
    return lender("csp", PYTHON_3, "python:2", "python:3")


def start_of(
    signed: SignedManifest,
    admitted: Sequence[SignedManifest],
    environment: Sequence[str] = ("MODE=fast", "PORT=8080"),
) -> StartContainerEvent:
    """The start that an honest supervisor records, given what was admitted by then."""
    statements: list[AliasStatement] = [s for one in admitted for s in statements_of(one)]
    resolved = resolve_layers(signed.manifest.layers, statements)
    return StartContainerEvent(
        image_id=str(signed.image_id),
        layers=tuple(str(layer.digest) for layer in resolved),
        delegations=tuple(
            LayerDelegation(index=index, hops=layer.delegation)
            for index, layer in enumerate(resolved)
            if layer.delegation
        ),
        argv=signed.manifest.entrypoint,
        environment=tuple(environment),
    )


# --- the scenario ---------------------------------------------------------------------------


def component(name: str, role: str = "plugin") -> Component:
    return msgspec.convert(
        {
            "name": name,
            "version": "0.1.0",
            "digest_sha384": hashlib.sha384(name.encode()).hexdigest(),
            "role": role,
            "distribution": "attested-containers",
        },
        Component,
    )


def admit(*images: SignedManifest) -> AdmitImagesEvent:
    return AdmitImagesEvent(image_ids=tuple(str(image.image_id) for image in images))


@dataclass
class Scenario:
    """Everything that goes into one evidence file and its verification."""

    images: list[SignedManifest] = field(default_factory=list)
    config: dict[str, object] = field(default_factory=dict)
    components: list[Component] = field(default_factory=list)
    events: list[LogEvent | tuple[str, bytes]] = field(default_factory=list)
    base_image: firmware.BaseImage = field(default_factory=firmware.BaseImage)
    rtmr_index: int = 3
    has_boot_log: bool = True
    register_before: bytes = bytes(48)
    # What differs from an honest TD's report; signed all the same.
    body: dict[str, object] = field(default_factory=dict)
    quote_version: int = 4
    status: Status | None = None
    container: RequestContainer | None = None
    public_key_sha384: str | None = None
    user_data: bytes | None = None
    other_requests: int = 0
    # What whoever carries the evidence alters.
    shipped_records: Callable[[list[LogRecord]], list[LogRecord]] = list
    ship: Callable[[Evidence], Evidence] = lambda evidence: evidence
    ship_quote: Callable[[bytes], bytes] = bytes
    # What the verifier is given.
    at: datetime = AT
    nonce: bytes = NONCE
    platform_status: sim_collateral.PlatformStatus = "UpToDate"
    evaluation_number: int = 18
    pck_revoked: bool = False
    collateral: Callable[[str], str | None] = lambda text: text

    def start(self) -> StartEvent:
        """The `Start` of these components and this configuration."""
        before = self.register_before.hex()
        return StartEvent(
            register_at_start=before if any(self.register_before) else None,
            components=tuple(self.components),
            config_digest_sha384=hashlib.sha384(self.config_text.encode()).hexdigest(),
        )

    @property
    def config_text(self) -> str:
        return canonical_json.encode(self.config).decode()

    def records(self) -> list[LogRecord]:
        return [
            encode_record(
                self.rtmr_index, *(event if isinstance(event, tuple) else encode_event(event))
            )
            for event in self.events
        ]


def honest() -> Scenario:
    """Gateway (alice) and model (bob) with a layer left to the CSP; loaded, started, sealed."""
    scenario = Scenario()
    scenario.images = [python_3(), gateway(), model()]
    scenario.config = {
        "plugins": {"order": ["tdx_sim", "image_store"]},
        "admission": {"unsafe_allow_sha256": False},
        "plugin": {"image_store": {"limit": 5}},
    }
    scenario.components = [
        component("supervisor", "supervisor"),
        component("tdx_sim"),
        component("image_store"),
    ]
    rewrite_log(scenario)
    return scenario


def rewrite_log(scenario: Scenario) -> None:
    """An honest log and status for the scenario's images, components and configuration."""
    lenders = [image for image in scenario.images if not image.manifest.is_executable]
    programs = [image for image in scenario.images if image.manifest.is_executable]
    starts = [start_of(image, scenario.images) for image in programs]
    scenario.events = [
        scenario.start(),
        *(admit(image) for image in lenders),
        *([admit(*programs)] if programs else []),
        *starts,
        SealEvent(),
    ]
    scenario.status = status_of(scenario)


def status_of(scenario: Scenario) -> Status:
    """All images, and one running container for each start in the log."""
    containers: list[ContainerStatus] = []
    for event, record in zip(scenario.events, scenario.records(), strict=True):
        if isinstance(event, StartContainerEvent):
            containers.append(
                ContainerStatus(
                    container_id=len(containers) + 1,
                    image_id=event.image_id,
                    state="running",
                    start_event_digest_sha384=record.digest_sha384.hex(),
                )
            )
    return Status(
        sealed=any(isinstance(event, SealEvent) for event in scenario.events),
        measurement="ok",
        images=tuple(
            ImageStatus(
                image_id=str(image.image_id),
                names=image.manifest.self_aliases,
                executable=image.manifest.is_executable,
                missing_layers=(),
            )
            for image in scenario.images
        ),
        containers=tuple(containers),
        notes=(),
    )


def speak_as(scenario: Scenario, container_id: int) -> RequestContainer:
    """Let this container of the status be the one that asks."""
    if scenario.status is None:
        raise ValueError("a container speaks only where there is a status")
    one = next(c for c in scenario.status.containers if c.container_id == container_id)
    scenario.container = RequestContainer(
        container_id=container_id,
        image_id=one.image_id,
        start_event_digest_sha384=one.start_event_digest_sha384,
    )
    return scenario.container


# --- building -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Built:
    """Bytes as a relying party gets them."""

    evidence: bytes
    collateral: str | None
    root_pem: bytes


def build(scenario: Scenario, pki: SimPki) -> Built:
    records = scenario.records()
    register = replay((record.digest_sha384 for record in records), scenario.register_before)
    if scenario.status is None:
        raise ValueError("evidence binds a status")
    status = encode_status(scenario.status)
    request = EvidenceRequest(
        nonce=NONCE.hex(),
        status_digest_sha384=hashlib.sha384(status).hexdigest(),
        container=scenario.container,
        public_key_sha384=scenario.public_key_sha384,
        user_data=None if scenario.user_data is None else to_base64(scenario.user_data),
    )
    leaves = [
        request_leaf(request),
        *(
            request_leaf(msgspec.structs.replace(request, nonce=bytes([n]).hex() * 16))
            for n in range(scenario.other_requests)
        ),
    ]
    report_data = report_data_for(root(leaves))
    body = _body(scenario, register, report_data)
    evidence = Evidence(
        request=request,
        proof=Proof(
            index=0,
            size=len(leaves),
            path=tuple(node.hex() for node in inclusion_proof(leaves, 0)),
        ),
        quote=to_base64(scenario.ship_quote(sign_quote(pki, body, scenario.quote_version))),
        cc_eventlog=to_base64(
            assemble_log(
                firmware.event_log(firmware.boot_events(scenario.base_image))
                if scenario.has_boot_log
                else None,
                [record.raw for record in scenario.shipped_records(records)],
            )
        ),
        rtmr_index=scenario.rtmr_index,
        config=scenario.config_text,
        images=tuple(evidence_image(image) for image in scenario.images),
        status=status.decode(),
    )
    collateral = sim_collateral.issue(
        pki,
        AT,
        platform_status=scenario.platform_status,
        evaluation_data_number=scenario.evaluation_number,
        pck_revoked=scenario.pck_revoked,
    )
    return Built(
        encode_evidence(scenario.ship(evidence)), scenario.collateral(collateral), pki.root.pem
    )


def evidence_image(image: SignedManifest) -> EvidenceImage:
    return EvidenceImage(
        manifest=to_base64(image.manifest_bytes),
        signature=to_base64(image.signature),
        certificate=to_base64(image.certificate_der),
    )


def booted(base_image: firmware.BaseImage) -> list[bytes]:
    """RTMR 0 to 3 when the supervisor begins."""
    rtmrs = [bytes(48)] * 4
    for event in firmware.boot_events(base_image):
        rtmrs[event.rtmr_index] = extend(rtmrs[event.rtmr_index], event.digest_sha384)
    return rtmrs


def _body(scenario: Scenario, register: bytes, report_data: bytes) -> TdBody:
    rtmrs = booted(scenario.base_image)
    rtmrs[scenario.rtmr_index] = register
    is_td15 = scenario.quote_version == 5
    honest_body = TdBody(
        tee_tcb_svn=platform_identity.TEE_TCB_SVN,
        mr_seam=platform_identity.MR_SEAM,
        mr_signer_seam=platform_identity.MR_SIGNER_SEAM,
        seam_attributes=platform_identity.SEAM_ATTRIBUTES,
        td_attributes=platform_identity.TD_ATTRIBUTES,
        xfam=platform_identity.XFAM,
        mr_td=firmware.mr_td(scenario.base_image),
        mr_config_id=platform_identity.MR_CONFIG_ID,
        mr_owner=platform_identity.MR_OWNER,
        mr_owner_config=platform_identity.MR_OWNER_CONFIG,
        rtmrs=(rtmrs[0], rtmrs[1], rtmrs[2], rtmrs[3]),
        report_data=report_data,
        tee_tcb_svn2=platform_identity.TEE_TCB_SVN if is_td15 else None,
        mr_service_td=bytes(48) if is_td15 else None,
        extended=None,
    )
    changes = {
        name: value(getattr(honest_body, name)) if callable(value) else value
        for name, value in scenario.body.items()
    }
    return msgspec.structs.replace(honest_body, **changes)


def sign_quote(pki: SimPki, body: TdBody, version: int) -> bytes:
    """A quote of whatever is asked for: no hardware stands between."""
    key = ec.generate_private_key(ec.SECP256R1())
    point = key.public_key().public_numbers()
    public_key = _raw_pair(point.x, point.y)
    auth_data = bytes(range(32))
    qe_report = pack_qe_report(
        QeReport(
            cpu_svn=platform_identity.CPU_SVN,
            misc_select=platform_identity.QE_MISC_SELECT,
            attributes=platform_identity.QE_ATTRIBUTES,
            mr_enclave=platform_identity.QE_MR_ENCLAVE,
            mr_signer=platform_identity.QE_MR_SIGNER,
            isv_prod_id=platform_identity.QE_ISV_PROD_ID,
            isv_svn=platform_identity.QE_ISV_SVN,
            report_data=qe_report_data(public_key, auth_data),
        )
    )
    header = build_header(version=version)
    return pack_quote(
        header,
        body,
        QuoteAuth(
            signature=_raw_signature(key, pack_signed_part(header, body)),
            attestation_public_key=public_key,
            qe_report=qe_report,
            qe_report_signature=_raw_signature(pki.pck.private_key, qe_report),
            qe_auth_data=auth_data,
            certificate_chain_pem=pki.pck_chain_pem,
        ),
    )


def _raw_signature(key: ec.EllipticCurvePrivateKey, data: bytes) -> bytes:
    return _raw_pair(*decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256()))))


def _raw_pair(first: int, second: int) -> bytes:
    return first.to_bytes(32, "big") + second.to_bytes(32, "big")
