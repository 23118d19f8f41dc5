"""The status document: what runs now. Evidence binds it by its hash; it is not in the log."""

from __future__ import annotations

import msgspec

from supervisor.formats import canonical_json
from supervisor.formats.base64_text import from_base64
from supervisor.formats.digest import check_hex
from supervisor.formats.errors import FormatError
from supervisor.formats.ids import parse_image_id
from supervisor.formats.typed_json import to_object, to_struct

MAX_STATUS_BYTES = 8 * 1024 * 1024
MAX_ATTESTATION_DATA_BYTES = 4096
ATTESTATION_DATA_KINDS = ("binary", "text")
MEASUREMENT_OK = "ok"
MEASUREMENT_HALTED_PREFIX = "halted: "
CONTAINER_STATES = ("starting", "running", "exited")


class ImageStatus(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An admitted image; it cannot start while `missing_layers` (references) is not empty."""

    image_id: str
    names: tuple[str, ...]
    executable: bool
    missing_layers: tuple[str, ...]


class AttestationData(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a container says of itself to whoever asks outside: nobody checked it, but nobody
    else could have said it. `kind` is "binary" or "text"; `data` is standard base64 of at most
    MAX_ATTESTATION_DATA_BYTES (of UTF-8 for a text, without control characters other than tab,
    line feed and carriage return).
    """

    kind: str
    data: str


class ContainerStatus(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A container. `state` is "starting", "running" or "exited"; only then there may be an
    exit code or the signal that ended it, never both. `attestation_data` is the running
    program's own.
    """

    container_id: int
    image_id: str
    state: str
    exit_code: int | None = None
    signal: int | None = None
    restarts: int = 0
    attestation_data: AttestationData | None = None
    start_event_digest_sha384: str


class Status(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`measurement` is "ok" or "halted: REASON"; images are in order of admission."""

    sealed: bool
    measurement: str
    images: tuple[ImageStatus, ...]
    containers: tuple[ContainerStatus, ...]
    notes: tuple[str, ...]


def attestation_data_bytes(data: AttestationData, *, item: str) -> bytes:
    """What was said, out of its base64. Raises `FormatError` for data that breaks a rule of
    `AttestationData`.
    """
    if data.kind not in ATTESTATION_DATA_KINDS:
        raise FormatError(
            f"{item}.kind",
            "a known kind of attestation data",
            expected=", ".join(ATTESTATION_DATA_KINDS),
            actual=data.kind[:80],
        )
    raw = from_base64(data.data, item=f"{item}.data")
    if len(raw) > MAX_ATTESTATION_DATA_BYTES:
        raise FormatError(
            f"{item}.data",
            "attestation data is bounded",
            expected=f"at most {MAX_ATTESTATION_DATA_BYTES} bytes",
            actual=len(raw),
        )
    if data.kind == "text":
        _check_text(raw, item=f"{item}.data")
    return raw


def _check_text(raw: bytes, *, item: str) -> None:
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        raise FormatError(item, "a text is UTF-8", actual=f"offset {error.start}") from None
    # JSON writes each of these as six characters, so a few texts would fill any document.
    control = next((at for at, byte in enumerate(raw) if byte < 0x20 and byte not in b"\t\n\r"), -1)
    if control >= 0:
        raise FormatError(
            item,
            "a text has no control characters but tabs and line breaks",
            actual=f"0x{raw[control]:02x} at offset {control}",
        )


def encode_status(status: Status) -> bytes:
    """Canonical JSON; absent exit codes and signals are null. Raises `FormatError` for what
    `decode_status` would refuse.
    """
    value = to_object(status)
    _check(to_struct(value, Status, item="status"))
    raw = canonical_json.encode(value)
    if len(raw) > MAX_STATUS_BYTES:
        raise FormatError(
            "status",
            "must not be larger than its limit",
            expected=f"{MAX_STATUS_BYTES} bytes",
            actual=len(raw),
        )
    return raw


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
        if container.restarts < 0:
            raise FormatError(
                f"{where}.restarts", "a number of restarts", actual=container.restarts
            )
        if container.attestation_data is not None:
            if container.state == "exited":
                raise FormatError(
                    f"{where}.attestation_data", "only a program that runs says something"
                )
            attestation_data_bytes(container.attestation_data, item=f"{where}.attestation_data")
