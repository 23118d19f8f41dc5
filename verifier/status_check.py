"""What runs now, as the status says, against what the log ever allowed to run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from supervisor.formats.status import MEASUREMENT_OK, ContainerStatus, Status
from verifier.images import ImageSet
from verifier.log_reading import SupervisorLog
from verifier.verdict import Check, group, judge

_STATUS = "the status, whose digest the quote binds"


def check_status(status: Status, log: SupervisorLog, images: ImageSet) -> Check:
    """The status may be a moment older than the log's end, never ahead of it."""
    return group(
        "status",
        "What runs now",
        [
            judge(
                "status.measurement",
                "The supervisor still measures",
                holds=status.measurement == MEASUREMENT_OK,
                expected=MEASUREMENT_OK,
                actual=status.measurement,
                anchor=_STATUS,
            ),
            judge(
                "status.sealed",
                "The status claims no seal that the log does not hold",
                holds=log.sealed or not status.sealed,
                expected="sealed" if log.sealed else "not sealed",
                actual="sealed" if status.sealed else "not sealed",
                anchor=_STATUS,
            ),
            _clear(
                "status.images",
                "Every image of the status was admitted, and is what its manifest says",
                "images of the log",
                _strange_images(status, log, images),
            ),
            _clear(
                "status.containers",
                "Everything that runs or ran was allowed by an entry of the log",
                "only what the log allows",
                _strange_containers(status, log),
            ),
            _clear(
                "status.instances",
                "No image runs more often than its manifest allows",
                "at most maxInstances of each",
                _too_many(status, images),
            ),
        ],
    )


def running(status: Status) -> tuple[ContainerStatus, ...]:
    """The containers that have not ended."""
    return tuple(one for one in status.containers if one.state != "exited")


def _clear(id: str, title: str, expected: str, problems: Iterable[str]) -> Check:
    found = list(problems)
    return judge(
        id,
        title,
        holds=not found,
        expected=expected,
        actual="; ".join(found) or expected,
        anchor=_STATUS,
    )


def _strange_images(status: Status, log: SupervisorLog, images: ImageSet) -> Iterable[str]:
    admitted = set(log.admitted())
    for image in status.images:
        signed = images.get(image.image_id)
        if image.image_id not in admitted:
            yield f"{image.image_id} was never admitted"
        elif signed is not None and image.executable != signed.manifest.is_executable:
            yield f"{image.image_id} is {'not ' if image.executable else ''}executable"


def _strange_containers(status: Status, log: SupervisorLog) -> Iterable[str]:
    allowed = {entry.digest_sha384: event.image_id for entry, event in log.containers}
    seen: set[int] = set()
    for container in status.containers:
        what = f"container {container.container_id} of {container.image_id}"
        permitted = allowed.get(container.start_event_digest_sha384)
        if permitted is None:
            yield f"{what}: no log entry {container.start_event_digest_sha384} starts a container"
        elif permitted != container.image_id:
            yield f"{what}: its log entry starts {permitted}"
        if container.container_id in seen:
            yield f"{what}: that id is there twice"
        seen.add(container.container_id)


def _too_many(status: Status, images: ImageSet) -> Iterable[str]:
    for image_id, count in Counter(one.image_id for one in running(status)).items():
        signed = images.get(image_id)
        if signed is None:
            continue
        limit = signed.manifest.max_instances  # 0: no limit
        if limit and count > limit:
            yield f"{image_id} runs {count} times, of {limit}"
