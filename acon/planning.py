"""What a TD's log will hold and RTMR[3] will be, computed without any TD.

What is measured is a function of configuration, images, order and arguments alone, so
the same functions that the daemon uses give the register's value beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from acon.grouping import groups_of
from supervisor.formats.delegation import ResolvedLayer, resolve_layers, statements_of
from supervisor.formats.environment import resolve_environment
from supervisor.formats.event_log import LOG_RTMR_INDEX, encode_record, extend
from supervisor.formats.log_events import (
    AdmitImagesEvent,
    LogEvent,
    SealEvent,
    StartContainerEvent,
    StartEvent,
    encode_event,
    start_container_event,
)
from supervisor.formats.signature import SignedManifest


class PlannedStart(msgspec.Struct, frozen=True):
    """One start of an image, with the environment that its caller asks for."""

    image: SignedManifest
    requested_environment: tuple[str, ...]


class Plan(msgspec.Struct, frozen=True):
    """Groups in order of admission, how each image's layers resolve, and the log's events."""

    groups: tuple[tuple[SignedManifest, ...], ...]
    layers: dict[str, tuple[ResolvedLayer, ...]]  # image id -> lowest first
    events: tuple[LogEvent, ...]  # without `Start`, which only the daemon's identity gives


class Step(msgspec.Struct, frozen=True):
    """One record of the log and what RTMR[3] is after it, in hex."""

    operation: str
    content: str
    digest_sha384: str
    rtmr3: str


def make_plan(
    images: Sequence[SignedManifest],
    starts: Sequence[PlannedStart],
    *,
    seal: bool,
    together: bool = False,
) -> Plan:
    """Load `images` into an empty TD, seal it, start. Raises `PolicyDenied` or
    `DelegationUnresolved` for what could not be done."""
    groups = groups_of((), images, together=together)
    statements = [one for image in images for one in statements_of(image)]
    layers = {
        str(image.image_id): resolve_layers(image.manifest.layers, statements)
        for image in images
        if image.manifest.is_executable
    }
    events: list[LogEvent] = [
        AdmitImagesEvent(image_ids=tuple(str(image.image_id) for image in group))
        for group in groups
    ]
    if seal:
        events.append(SealEvent())
    for start in starts:
        event = _start_event(start, layers[str(start.image.image_id)])
        # A start that says nothing new is not extended again.
        if event not in events:
            events.append(event)
    return Plan(groups, layers, tuple(events))


def predict(identity: StartEvent, events: Sequence[LogEvent]) -> tuple[Step, ...]:
    """RTMR[3] after each record, from zero or from what `identity` says it started at."""
    register = bytes.fromhex(identity.register_at_start or "00" * 48)
    steps = []
    for event in (identity, *events):
        operation, content = encode_event(event)
        record = encode_record(LOG_RTMR_INDEX, operation, content)
        register = extend(register, record.digest_sha384)
        steps.append(Step(operation, content.decode(), record.digest_sha384.hex(), register.hex()))
    return tuple(steps)


def _start_event(start: PlannedStart, layers: Sequence[ResolvedLayer]) -> StartContainerEvent:
    manifest = start.image.manifest
    return start_container_event(
        str(start.image.image_id),
        layers,
        manifest.entrypoint,
        resolve_environment(manifest.env, start.requested_environment),
    )
