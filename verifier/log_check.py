"""Is the log the one that the register vouches for, and is its order one that can be?"""

from __future__ import annotations

from collections.abc import Iterator

from supervisor.formats.event_log import ZERO_REGISTER, extend, replay
from supervisor.formats.log_events import (
    AdmitImagesEvent,
    SealEvent,
    StartContainerEvent,
    StartEvent,
)
from supervisor.formats.td_body import TdBody
from verifier.images import ImageSet
from verifier.log_reading import SupervisorLog
from verifier.policy import Policy
from verifier.verdict import Check, equal, group, judge, unmade

LOG_ANCHOR = "the log, replayed to the register"


def check_log(
    log: SupervisorLog, body: TdBody, policy: Policy, *, rtmr_index: int, anchor: str
) -> Check:
    """Replay, start value, known events, seal. `anchor` is what makes the quote believable."""
    return group(
        "log",
        "The supervisor's log",
        [
            equal(
                "log.register",
                "The log is kept in the register that the policy names",
                expected=f"RTMR{policy.log.register_index}",
                actual=f"RTMR{rtmr_index}",
                anchor="the caller",
                policy_rule="log.register_index",
            ),
            _replay(log, body, rtmr_index, anchor),
            equal(
                "log.register_at_start",
                "Nothing was measured into the register before the supervisor",
                expected=policy.log.register_at_start,
                actual=log.at_start.hex(),
                anchor=LOG_ANCHOR,
                policy_rule="log.register_at_start",
            ),
            _known_events(log),
            _sealed(log, policy),
            _open_delegations(log),
        ],
    )


def _replay(log: SupervisorLog, body: TdBody, rtmr_index: int, anchor: str) -> Check:
    expected = body.rtmrs[rtmr_index]
    actual = replay((entry.record.digest_sha384 for entry in log.entries), log.at_start)
    explanation = "" if actual == expected else _divergence(log, expected)
    return judge(
        "log.replay",
        f"The log replays to RTMR{rtmr_index}: nothing was added, dropped, moved or changed",
        holds=actual == expected,
        expected=expected.hex(),
        actual=actual.hex() + explanation,
        anchor=anchor,
    )


def _divergence(log: SupervisorLog, expected: bytes) -> str:
    """In words, where log and register parted, if the log's beginning still explains it."""
    register = log.at_start
    if register == expected:
        return " (the register holds none of these records)"
    for entry in log.entries:
        register = extend(register, entry.record.digest_sha384)
        if register == expected:
            return f" (the register holds the records up to {entry.position} and none behind it)"
    if expected == ZERO_REGISTER:
        return " (the register is zero: nothing was ever measured into it)"
    return " (no beginning of this log explains the register)"


def _known_events(log: SupervisorLog) -> Check:
    critical = [
        f"record {entry.position} ({event.operation})"
        for entry, event in log.unknown
        if event.critical
    ]
    passed_over = sum(1 for _ in log.unknown) - len(critical)
    return judge(
        "log.known_events",
        "Every event that matters is one that this verifier understands",
        holds=not critical,
        expected="no unknown event that calls itself critical",
        actual=", ".join(critical) or f"none ({passed_over} informative ones are shown)",
        anchor=LOG_ANCHOR,
    )


def _sealed(log: SupervisorLog, policy: Policy) -> Check:
    id, title = "log.sealed", "Loading of images has ended for good"
    actual = "sealed" if log.sealed else "not sealed: more images can be admitted later"
    if not policy.log.seal_required and not log.sealed:
        return unmade(
            id,
            title,
            why="the policy does not require a seal",
            actual=actual,
            left_open=True,
            policy_rule="log.seal_required",
        )
    return judge(
        id,
        title,
        holds=log.sealed,
        expected="sealed",
        actual=actual,
        anchor=LOG_ANCHOR,
        policy_rule="log.seal_required",
    )


def _open_delegations(log: SupervisorLog) -> Check:
    still_open = [name for _, event in log.of(SealEvent) for name in event.open_delegations]
    return judge(
        "log.open_delegations",
        "The seal leaves no delegation open",
        holds=not still_open,
        expected="none",
        actual=", ".join(still_open) or "none",
        anchor=LOG_ANCHOR,
    )


# --- order ----------------------------------------------------------------------------------


def check_order(log: SupervisorLog, images: ImageSet) -> Check:
    """The order of events, each impossible one a named failure."""
    return group(
        "order",
        "The order of events",
        [
            _rule(
                "order.start_first",
                "The supervisor measured itself before anything else",
                "the first record is a Start",
                _not_started_first(log),
            ),
            _rule(
                "order.register_at_start_once",
                "Only the first Start says what the register held before",
                "no later Start that says so",
                (
                    f"record {entry.position}"
                    for entry, event in log.starts
                    if entry.position > 0 and event.register_at_start is not None
                ),
            ),
            _rule(
                "order.admitted_once",
                "No image was admitted twice",
                "each image id once",
                _admitted_twice(log),
            ),
            _rule(
                "order.start_before_admission",
                "No container was started before its image was admitted",
                "each start after its image's admission",
                _started_before_admission(log),
            ),
            _rule(
                "order.start_without_entry_point",
                "No container was started of an image without an entry point",
                "starts of executable images only",
                _starts_without_entry_point(log, images),
            ),
            _rule(
                "order.admission_after_seal",
                "No image was admitted after the seal",
                "no admission behind the seal",
                _after_seal(log, AdmitImagesEvent),
            ),
            _rule(
                "order.second_seal",
                "There is one seal at most",
                "no second seal",
                _after_seal(log, SealEvent),
            ),
        ],
    )


def _rule(id: str, title: str, expected: str, offenders: Iterator[str]) -> Check:
    found = list(offenders)
    return judge(
        id,
        title,
        holds=not found,
        expected=expected,
        actual=", ".join(found) or "as it must be",
        anchor=LOG_ANCHOR,
    )


def _not_started_first(log: SupervisorLog) -> Iterator[str]:
    if not log.entries:
        yield "the log is empty"
    elif not isinstance(log.entries[0].event, StartEvent):
        yield f"record 0 is {log.entries[0].record.operation}"


def _admitted_twice(log: SupervisorLog) -> Iterator[str]:
    seen: set[str] = set()
    for entry, event in log.of(AdmitImagesEvent):
        for image_id in event.image_ids:
            if image_id in seen:
                yield f"record {entry.position} admits {image_id} again"
            seen.add(image_id)


def _started_before_admission(log: SupervisorLog) -> Iterator[str]:
    admitted: set[str] = set()
    for entry in log.entries:
        match entry.event:
            case AdmitImagesEvent(image_ids=image_ids):
                admitted.update(image_ids)
            case StartContainerEvent(image_id=image_id) if image_id not in admitted:
                yield f"record {entry.position} starts {image_id}"


def _starts_without_entry_point(log: SupervisorLog, images: ImageSet) -> Iterator[str]:
    for entry, event in log.containers:
        signed = images.get(event.image_id)
        if signed is not None and not signed.manifest.is_executable:
            yield f"record {entry.position} starts {event.image_id}"


def _after_seal(
    log: SupervisorLog, kind: type[AdmitImagesEvent] | type[SealEvent]
) -> Iterator[str]:
    sealed_at: int | None = None
    for entry in log.entries:
        if sealed_at is not None and isinstance(entry.event, kind):
            yield f"record {entry.position}, behind the seal at {sealed_at}"
        if isinstance(entry.event, SealEvent) and sealed_at is None:
            sealed_at = entry.position
