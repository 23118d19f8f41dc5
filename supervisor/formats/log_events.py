"""What our log records say: the canonical JSON contents of the four operations.

Contents hold no time, no process or container id and nothing random, so that a register's
value can be computed before a TD is booted. Each says in its hashed bytes whether a reader
that does not know the operation may pass over it (`critical`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, TypeAlias, TypeVar

import msgspec

from supervisor.formats import canonical_json
from supervisor.formats.delegation import DelegationHop, ResolvedLayer
from supervisor.formats.digest import check_hex, parse_digest
from supervisor.formats.errors import FormatError
from supervisor.formats.event_log import MAX_CONTENT_BYTES
from supervisor.formats.ids import parse_image_id
from supervisor.formats.typed_json import to_object, to_struct

MAX_EVENT_DEPTH = 8
_OPERATION_PATTERN = re.compile(r"[A-Za-z][A-Za-z0-9]{0,63}")
_ZERO_REGISTER_HEX = "00" * 48


class Component(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The supervisor or one plugin: `digest_sha384` is hex over all its installed files."""

    name: str
    version: str
    digest_sha384: str
    role: Literal["supervisor", "plugin"]
    distribution: str


class StartEvent(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A supervisor began, or began again as another one.

    `register_at_start` is the register's value in hex when the very first one began, and
    only there if that was not zero. `components` has the supervisor first, then the plugins
    in config order; `config_digest_sha384` is hex over the effective configuration's
    canonical JSON.
    """

    critical: bool = True
    register_at_start: str | None = None
    components: tuple[Component, ...]
    config_digest_sha384: str


class AdmitImagesEvent(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A group of images was admitted, in this order."""

    critical: bool = True
    image_ids: tuple[str, ...]


class LayerDelegation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the layer at `index` was resolved: from the manifest's reference to a digest."""

    index: int
    hops: tuple[DelegationHop, ...]


class StartContainerEvent(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A container may run: exactly these layers (lowest first), arguments and environment.

    `layers` are `HASH/HEX`, `environment` `NAME=VALUE`, `delegations` in order of `index`.
    """

    critical: bool = True
    image_id: str
    layers: tuple[str, ...]
    delegations: tuple[LayerDelegation, ...]
    argv: tuple[str, ...]
    environment: tuple[str, ...]


class SealEvent(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """No image can be admitted from here on, but through `open_delegations` (none, today)."""

    critical: bool = True
    open_delegations: tuple[str, ...] = ()


class UnknownEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An operation of a later version; `content` is its canonical JSON.

    A reader must fail when `critical`, and may pass over it otherwise.
    """

    operation: str
    critical: bool
    content: bytes


LogEvent: TypeAlias = StartEvent | AdmitImagesEvent | StartContainerEvent | SealEvent
OPERATIONS: dict[str, type[LogEvent]] = {
    "Start": StartEvent,
    "AdmitImages": AdmitImagesEvent,
    "StartContainer": StartContainerEvent,
    "Seal": SealEvent,
}
_OPERATION_OF = {event_type: operation for operation, event_type in OPERATIONS.items()}
_E = TypeVar("_E", bound=LogEvent)


def start_container_event(
    image_id: str,
    layers: Sequence[ResolvedLayer],
    argv: Sequence[str],
    environment: Sequence[str],
) -> StartContainerEvent:
    """What a start with these layers says: the TD, `acon plan` and a verifier alike."""
    return StartContainerEvent(
        image_id=image_id,
        layers=tuple(str(layer.digest) for layer in layers),
        delegations=tuple(
            LayerDelegation(index=index, hops=layer.delegation)
            for index, layer in enumerate(layers)
            if layer.delegation
        ),
        argv=tuple(argv),
        environment=tuple(environment),
    )


def encode_event(event: LogEvent) -> tuple[str, bytes]:
    """The operation and its content, canonical JSON. Raises `FormatError` where `decode_event`
    would refuse the result, so that nothing unreadable is ever measured.
    """
    operation = _OPERATION_OF[type(event)]
    _checked(to_struct(to_object(event), type(event), item=operation), item=operation)
    content = _content(event)
    if len(content) > MAX_CONTENT_BYTES:
        raise FormatError(
            operation,
            "an event's content is bounded",
            expected=f"at most {MAX_CONTENT_BYTES} bytes",
            actual=len(content),
        )
    return operation, content


def _content(event: LogEvent) -> bytes:
    value = to_object(event)
    if (
        isinstance(event, StartEvent)
        and event.register_at_start is None
        and isinstance(value, dict)
    ):
        del value["register_at_start"]
    return canonical_json.encode(value)


def decode_event(operation: str, content: bytes) -> LogEvent | UnknownEvent:
    """Read one record's content. Raises `FormatError`.

    Strict for the known operations: every field there, none else, each of its type, in the
    one canonical form. Of unknown ones only the form and `critical` are looked at.
    """
    if _OPERATION_PATTERN.fullmatch(operation) is None:
        raise FormatError(
            "operation", "a letter followed by letters and digits", actual=ascii(operation[:64])
        )
    value = canonical_json.decode(
        content, item=operation, max_bytes=MAX_CONTENT_BYTES, max_depth=MAX_EVENT_DEPTH
    )
    if not isinstance(value, dict) or not isinstance(value.get("critical"), bool):
        raise FormatError(operation, "an event is an object that says whether it is `critical`")
    event_type = OPERATIONS.get(operation)
    if event_type is None:
        canonical = canonical_json.encode(value)
        event: LogEvent | UnknownEvent = UnknownEvent(
            operation=operation, critical=value["critical"], content=content
        )
    else:
        known = to_struct(value, event_type, item=operation)
        canonical = _content(known)
        event = _checked(known, item=operation)
    # Also refuses a default that is spelt out and a field that a nested Struct passed over.
    if canonical != content:
        raise FormatError(
            operation,
            "an event has one form, its canonical JSON",
            expected=ascii(canonical[:160]),
            actual=ascii(content[:160]),
        )
    return event


def _checked(event: _E, *, item: str) -> _E:
    """Refuse values that no supervisor writes, whatever their type."""
    match event:
        case StartEvent():
            _check_start(event, item=item)
        case AdmitImagesEvent():
            _check_admission(event, item=item)
        case StartContainerEvent():
            _check_container(event, item=item)
        case SealEvent():
            if "" in event.open_delegations:
                raise FormatError(f"{item}.open_delegations", "a delegation has a name")
    return event


def _check_start(event: StartEvent, *, item: str) -> None:
    if event.register_at_start is not None:
        check_hex("sha384", event.register_at_start, item=f"{item}.register_at_start")
        if event.register_at_start == _ZERO_REGISTER_HEX:
            raise FormatError(f"{item}.register_at_start", "left out when the register was zero")
    check_hex("sha384", event.config_digest_sha384, item=f"{item}.config_digest_sha384")
    roles = [component.role for component in event.components]
    if roles[:1] != ["supervisor"] or "supervisor" in roles[1:]:
        raise FormatError(
            f"{item}.components",
            "the supervisor comes first, once, then the plugins",
            actual=", ".join(roles[:20]),
        )
    names = [component.name for component in event.components]
    if len(set(names)) != len(names):
        raise FormatError(f"{item}.components", "each component comes once")
    for at, component in enumerate(event.components):
        where = f"{item}.components[{at}]"
        check_hex("sha384", component.digest_sha384, item=f"{where}.digest_sha384")
        if not (component.name and component.version and component.distribution):
            raise FormatError(where, "name, version and distribution are not empty")


def _check_admission(event: AdmitImagesEvent, *, item: str) -> None:
    if not event.image_ids or len(set(event.image_ids)) != len(event.image_ids):
        raise FormatError(f"{item}.image_ids", "at least one image, each once")
    for at, image_id in enumerate(event.image_ids):
        # Whether SHA-256 is acceptable is for the reader's policy, not for the log's form.
        parse_image_id(image_id, item=f"{item}.image_ids[{at}]", unsafe_allow_sha256=True)


def _check_container(event: StartContainerEvent, *, item: str) -> None:
    parse_image_id(event.image_id, item=f"{item}.image_id", unsafe_allow_sha256=True)
    for at, layer in enumerate(event.layers):
        parse_digest(layer, item=f"{item}.layers[{at}]", unsafe_allow_sha256=True)
    previous = -1
    for at, delegation in enumerate(event.delegations):
        where = f"{item}.delegations[{at}]"
        if not previous < delegation.index < len(event.layers) or not delegation.hops:
            raise FormatError(
                where,
                "each delegated layer once, in order, with the hops that resolved it",
                expected=f"{previous + 1}..{len(event.layers) - 1}",
                actual=delegation.index,
            )
        previous = delegation.index
        for hop in delegation.hops:
            check_hex("sha384", hop.statement_digest_sha384, item=f"{where}.hops")
    if not event.argv or not event.argv[0]:
        raise FormatError(f"{item}.argv", "the first argument is the program")
    for at, setting in enumerate(event.environment):
        name, equals, _ = setting.partition("=")
        if not name or not equals:
            raise FormatError(f"{item}.environment[{at}]", "NAME=VALUE", actual=setting[:80])
    if any("\x00" in text for text in (*event.argv, *event.environment)):
        raise FormatError(item, "no argument and no setting holds a NUL")
