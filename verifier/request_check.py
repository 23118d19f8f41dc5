"""Is this the answer to the question that was asked, and who gave it?"""

from __future__ import annotations

import hashlib

import msgspec

from supervisor.formats.base64_text import from_base64
from supervisor.formats.errors import FormatError
from supervisor.formats.evidence import (
    EVIDENCE_FORMAT,
    MAX_NONCE_BYTES,
    MIN_NONCE_BYTES,
    Evidence,
    RequestContainer,
    request_leaf,
)
from supervisor.formats.merkle import NODE_BYTES, verify_inclusion
from supervisor.formats.status import Status
from verifier.images import ImageSet, matches
from verifier.log_check import LOG_ANCHOR
from verifier.log_reading import SupervisorLog
from verifier.policy import ImageEntry, Policy
from verifier.status_check import running
from verifier.verdict import Check, equal, group, judge, unmade

_REQUEST = "the request, which the quote's REPORTDATA binds"


class Expectations(msgspec.Struct, frozen=True, kw_only=True):
    """What the caller asked, and expects of whoever answers. Hex is lower case."""

    nonce: bytes
    container_key_sha384: str | None = None
    user_data: bytes | None = None
    container_image_id: str | None = None

    def __post_init__(self) -> None:
        if not MIN_NONCE_BYTES <= len(self.nonce) <= MAX_NONCE_BYTES:
            raise FormatError(
                "nonce",
                "a nonce that was really asked with",
                expected=f"{MIN_NONCE_BYTES} to {MAX_NONCE_BYTES} bytes",
                actual=len(self.nonce),
            )

    @property
    def of_a_container(self) -> bool:
        """Whether anything is expected that only a container can have bound."""
        return (self.container_key_sha384, self.user_data, self.container_image_id) != (
            None,
            None,
            None,
        )


def check_binding(
    evidence: Evidence, report_data: bytes, expected: Expectations, anchor: str
) -> Check:
    """That the quote was made for this very request, and the request for this very caller."""
    request, proof = evidence.request, evidence.proof
    checks = [
        equal(
            "request.format_tag",
            "The quote was made as evidence of this format, and for nothing else",
            expected=EVIDENCE_FORMAT.encode().hex(),
            actual=report_data[NODE_BYTES:].hex(),
            anchor=anchor,
        ),
        judge(
            "request.proof",
            "The request is one of those that the quote answers",
            holds=verify_inclusion(
                request_leaf(request),
                proof.index,
                proof.size,
                proof.path_nodes,
                report_data[:NODE_BYTES],
            ),
            expected=f"the root {report_data[:NODE_BYTES].hex()}",
            actual=f"request {proof.index} of {proof.size}, a proof of {len(proof.path)} nodes",
            anchor=anchor,
        ),
        equal(
            "request.nonce",
            "The evidence was made for the caller's nonce: it is fresh",
            expected=expected.nonce.hex(),
            actual=request.nonce,
            anchor=_REQUEST,
        ),
        equal(
            "request.status",
            "The status in the evidence is the one that the request binds",
            expected=request.status_digest_sha384,
            actual=hashlib.sha384(evidence.status.encode()).hexdigest(),
            anchor=_REQUEST,
        ),
    ]
    checks += _bound_values(evidence, expected)
    return group("request", "The request", checks)


def _bound_values(evidence: Evidence, expected: Expectations) -> list[Check]:
    request = evidence.request
    user_data = request.user_data
    got_data = None if user_data is None else from_base64(user_data, item="user_data").hex()
    wanted_data = None if expected.user_data is None else expected.user_data.hex()
    return [
        *_bound("key", "public key", request.public_key_sha384, expected.container_key_sha384),
        *_bound("user_data", "user data", got_data, wanted_data),
    ]


def _bound(name: str, what: str, got: str | None, wanted: str | None) -> list[Check]:
    id = f"request.{name}"
    if wanted is not None:
        return [
            equal(
                id,
                f"The container bound the {what} that the caller expects",
                expected=wanted or "empty",
                actual="none" if got is None else got or "empty",
                anchor=_REQUEST,
            )
        ]
    if got is None:
        return []
    return [
        unmade(
            id,
            f"The container bound a {what}; the caller expects none",
            why="the caller did not say what to expect",
            actual=got or "empty",
            left_open=True,
        )
    ]


def check_speaker(
    evidence: Evidence,
    expected: Expectations,
    policy: Policy,
    log: SupervisorLog,
    images: ImageSet,
    status: Status,
) -> Check:
    """Which container asked, if any: started by the log, running, and of the expected image."""
    id, title = "speaker", "Who asked for this evidence"
    container = evidence.request.container
    if container is None:
        return judge(
            id,
            title,
            holds=not expected.of_a_container,
            expected="a container, through its own socket"
            if expected.of_a_container
            else "anyone: it speaks for the TD as a whole",
            actual="the management API, which speaks for no container",
            anchor=_REQUEST,
        )
    return group(
        id,
        title,
        [
            _started(container, log),
            _running(container, status),
            *_of_image(container, expected, policy, images),
        ],
    )


def _started(container: RequestContainer, log: SupervisorLog) -> Check:
    started = {entry.digest_sha384: event.image_id for entry, event in log.containers}
    image_id = started.get(container.start_event_digest_sha384)
    return judge(
        "speaker.started",
        "The container that asked is one that the log allows to run",
        holds=image_id == container.image_id,
        expected=f"a start of {container.image_id} with digest "
        f"{container.start_event_digest_sha384}",
        actual="no such log entry" if image_id is None else f"a start of {image_id}",
        anchor=LOG_ANCHOR,
    )


def _running(container: RequestContainer, status: Status) -> Check:
    found = [
        one
        for one in running(status)
        if (one.container_id, one.image_id, one.start_event_digest_sha384)
        == (container.container_id, container.image_id, container.start_event_digest_sha384)
    ]
    return judge(
        "speaker.running",
        "The container that asked was running when it did",
        holds=bool(found),
        expected=f"container {container.container_id} among those that run",
        actual="it runs" if found else "not among those that run",
        anchor="the status, whose digest the quote binds",
    )


def _of_image(
    container: RequestContainer, expected: Expectations, policy: Policy, images: ImageSet
) -> list[Check]:
    id, title = "speaker.image", "The container that asked runs the expected image"
    checks = []
    if expected.container_image_id is not None:
        checks.append(
            equal(
                id,
                title,
                expected=expected.container_image_id,
                actual=container.image_id,
                anchor=_REQUEST,
            )
        )
    if isinstance(policy.speaker, ImageEntry):
        checks.append(
            judge(
                id,
                title,
                holds=matches(policy.speaker, container.image_id, images.get(container.image_id)),
                expected=str(policy.speaker),
                actual=container.image_id,
                anchor=_REQUEST,
                policy_rule="speaker",
            )
        )
    if checks:
        return checks
    # Whoever relies on a container's key must say whose: any other container of this TD
    # can get evidence for a key of its own. Otherwise nothing rests on who asked.
    relied_upon = expected.of_a_container
    return [
        unmade(
            id,
            title,
            why='the policy says "unpinned"'
            if policy.speaker is not None
            else "neither the policy (speaker) nor the caller says which image may answer",
            actual=container.image_id,
            left_open=policy.speaker is not None or not relied_upon,
            policy_rule="speaker",
        )
    ]
