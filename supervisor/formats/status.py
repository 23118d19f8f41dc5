"""The status document: what runs now. Evidence binds it by its hash; it is not in the log."""

from __future__ import annotations

import msgspec

from supervisor.formats import canonical_json
from supervisor.formats.digest import check_hex
from supervisor.formats.errors import FormatError
from supervisor.formats.ids import parse_image_id
from supervisor.formats.typed_json import to_object, to_struct

MAX_STATUS_BYTES = 8 * 1024 * 1024
MEASUREMENT_OK = "ok"
MEASUREMENT_HALTED_PREFIX = "halted: "
CONTAINER_STATES = ("starting", "running", "exited")


class ImageStatus(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An admitted image; it cannot start while `missing_layers` (references) is not empty."""

    image_id: str
    names: tuple[str, ...]
    executable: bool
    missing_layers: tuple[str, ...]


class ContainerStatus(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A container. `state` is "starting", "running" or "exited"; only then there may be an
    exit code or the signal that ended it, never both.
    """

    container_id: int
    image_id: str
    state: str
    exit_code: int | None = None
    signal: int | None = None
    start_event_digest_sha384: str


class Status(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`measurement` is "ok" or "halted: REASON"; images are in order of admission."""

    sealed: bool
    measurement: str
    images: tuple[ImageStatus, ...]
    containers: tuple[ContainerStatus, ...]
    notes: tuple[str, ...]


def encode_status(status: Status) -> bytes:
    """Canonical JSON; absent exit codes and signals are null. Raises `FormatError` for what
    `decode_status` would refuse.
    """
    value = to_object(status)
    _check(to_struct(value, Status, item="status"))
    return canonical_json.encode(value)


def decode_status(raw: bytes) -> Status:
    """Strict inverse of `encode_status`. Raises `FormatError`."""
    value = canonical_json.decode_canonical(raw, item="status", max_bytes=MAX_STATUS_BYTES)
    status = to_struct(value, Status, item="status")
    if encode_status(status) != raw:
        raise FormatError("status", "every field is spelt out")
    return status


def _check(status: Status) -> None:
    if status.measurement != MEASUREMENT_OK and not status.measurement.startswith(
        MEASUREMENT_HALTED_PREFIX
    ):
        raise FormatError(
            "status.measurement",
            "measurement goes on or has halted",
            expected=f"{MEASUREMENT_OK!r} or {MEASUREMENT_HALTED_PREFIX!r} and a reason",
            actual=status.measurement[:80],
        )
    for at, image in enumerate(status.images):
        parse_image_id(
            image.image_id, item=f"status.images[{at}].image_id", unsafe_allow_sha256=True
        )
    for at, container in enumerate(status.containers):
        where = f"status.containers[{at}]"
        parse_image_id(container.image_id, item=f"{where}.image_id", unsafe_allow_sha256=True)
        check_hex(
            "sha384", container.start_event_digest_sha384, item=f"{where}.start_event_digest_sha384"
        )
        if container.state not in CONTAINER_STATES:
            raise FormatError(
                f"{where}.state",
                "a known state",
                expected=", ".join(CONTAINER_STATES),
                actual=container.state[:80],
            )
        ends = (container.exit_code is not None) + (container.signal is not None)
        if ends > (container.state == "exited"):
            raise FormatError(
                where,
                "an exit code or a signal belongs to an exited container, one of the two",
                actual=f"{container.state}, {container.exit_code}, {container.signal}",
            )
