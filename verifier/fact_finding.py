"""From the judged objects to the facts that a report shows. Nothing is parsed here."""

from __future__ import annotations

from collections.abc import Sequence

from supervisor.formats.base64_text import from_base64
from supervisor.formats.delegation import DelegationHop
from supervisor.formats.evidence import Evidence
from supervisor.formats.log_events import AdmitImagesEvent, StartContainerEvent
from supervisor.formats.signature import SignedManifest
from supervisor.formats.status import Status, attestation_data_bytes
from verifier.facts import (
    AttestationDataFact,
    BaseFact,
    ComponentFact,
    Facts,
    HopFact,
    ImageFact,
    LayerFact,
    SpeakerFact,
    StartFact,
    SupervisorFact,
    UnknownEventFact,
)
from verifier.images import ImageSet, names_of, subject_of
from verifier.log_reading import LogEntry, SupervisorLog
from verifier.quote_check import QuoteJudgement
from verifier.status_check import running
from verifier.supervisor_check import unsafe_settings


def find_facts(
    evidence: Evidence,
    judgement: QuoteJudgement,
    log: SupervisorLog,
    images: ImageSet,
    status: Status,
) -> Facts:
    """Everything that a report shows, in the log's order."""
    admitted = list(_admitted(log, images))
    return _facts(
        evidence,
        judgement,
        supervisors=tuple(
            SupervisorFact(
                position=entry.position,
                components=tuple(
                    ComponentFact(
                        role=component.role,
                        name=component.name,
                        version=component.version,
                        distribution=component.distribution,
                        digest_sha384=component.digest_sha384,
                    )
                    for component in event.components
                ),
                config_digest_sha384=event.config_digest_sha384,
            )
            for entry, event in log.starts
        ),
        images=tuple(image for image in admitted if image.executable),
        layer_only_images=tuple(image for image in admitted if not image.executable),
        starts=tuple(_start(entry, event, status) for entry, event in log.containers),
        sealed=log.sealed,
        unknown_events=tuple(
            UnknownEventFact(
                position=entry.position, operation=event.operation, critical=event.critical
            )
            for entry, event in log.unknown
        ),
    )


def bare_facts(evidence: Evidence, judgement: QuoteJudgement) -> Facts:
    """The facts of evidence whose quote or log could not be read: next to none."""
    return _facts(evidence, judgement)


def _facts(
    evidence: Evidence,
    judgement: QuoteJudgement,
    *,
    supervisors: tuple[SupervisorFact, ...] = (),
    images: tuple[ImageFact, ...] = (),
    layer_only_images: tuple[ImageFact, ...] = (),
    starts: tuple[StartFact, ...] = (),
    sealed: bool = False,
    unknown_events: tuple[UnknownEventFact, ...] = (),
) -> Facts:
    request, container = evidence.request, evidence.request.container
    return Facts(
        authentic=judgement.authentic,
        tcb_status=judgement.tcb_status,
        advisory_ids=judgement.advisory_ids,
        base=_base(judgement),
        supervisors=supervisors,
        config=evidence.config,
        unsafe_settings=unsafe_settings(evidence.config),
        images=images,
        layer_only_images=layer_only_images,
        starts=starts,
        sealed=sealed,
        unknown_events=unknown_events,
        speaker=None
        if container is None
        else SpeakerFact(
            container_id=container.container_id,
            image_id=container.image_id,
            start_event_digest_sha384=container.start_event_digest_sha384,
        ),
        public_key_sha384=request.public_key_sha384,
        user_data=None
        if request.user_data is None
        else from_base64(request.user_data, item="user_data"),
    )


def _base(judgement: QuoteJudgement) -> BaseFact | None:
    body = judgement.body
    if body is None:
        return None
    first, second, third, fourth = (rtmr.hex() for rtmr in body.rtmrs)
    return BaseFact(
        mr_td=body.mr_td.hex(),
        rtmrs=(first, second, third, fourth),
        mr_seam=body.mr_seam.hex(),
        td_attributes=body.td_attributes.hex(),
        xfam=body.xfam.hex(),
        tee_tcb_svn=body.tee_tcb_svn.hex(),
    )


def _admitted(log: SupervisorLog, images: ImageSet) -> list[ImageFact]:
    return [
        _image(entry, image_id, images.get(image_id))
        for entry, event in log.of(AdmitImagesEvent)
        for image_id in event.image_ids
    ]


def _image(entry: LogEntry, image_id: str, signed: SignedManifest | None) -> ImageFact:
    if signed is None:
        # Without its manifest only its id is known; it may be a program.
        return ImageFact(
            position=entry.position,
            image_id=image_id,
            signer=image_id.rpartition("/")[0],
            signer_subject="unknown: the evidence lacks its manifest",
            names=(),
            executable=True,
            layers=(),
        )
    return ImageFact(
        position=entry.position,
        image_id=image_id,
        signer=str(signed.signer),
        signer_subject=subject_of(signed),
        names=names_of(signed),
        executable=signed.manifest.is_executable,
        layers=tuple(str(layer) for layer in signed.manifest.layers),
    )


def _start(entry: LogEntry, event: StartContainerEvent, status: Status) -> StartFact:
    hops = {delegation.index: delegation.hops for delegation in event.delegations}
    containers = [
        container
        for container in running(status)
        if container.start_event_digest_sha384 == entry.digest_sha384
    ]
    return StartFact(
        position=entry.position,
        digest_sha384=entry.digest_sha384,
        image_id=event.image_id,
        argv=event.argv,
        environment=event.environment,
        layers=tuple(
            LayerFact(index=index, digest=digest, delegation=_hops(hops.get(index, ())))
            for index, digest in enumerate(event.layers)
        ),
        container_ids=tuple(container.container_id for container in containers),
        attestation_data=tuple(
            AttestationDataFact(
                container_id=container.container_id,
                kind=container.attestation_data.kind,
                data=attestation_data_bytes(container.attestation_data, item="attestation data"),
            )
            for container in containers
            if container.attestation_data is not None
        ),
    )


def _hops(hops: Sequence[DelegationHop]) -> tuple[HopFact, ...]:
    return tuple(
        HopFact(
            reference=hop.reference,
            signer=hop.signer,
            alias=hop.alias,
            svn=hop.svn,
            statement_digest_sha384=hop.statement_digest_sha384,
        )
        for hop in hops
    )
