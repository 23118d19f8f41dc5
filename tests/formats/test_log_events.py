"""Event contents: one form for one meaning, and nothing that a supervisor never writes."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.formats.delegation import DelegationHop
from supervisor.formats.errors import FormatError
from supervisor.formats.event_log import encode_record, parse_records
from supervisor.formats.log_events import (
    OPERATIONS,
    AdmitImagesEvent,
    Component,
    LayerDelegation,
    LogEvent,
    SealEvent,
    StartContainerEvent,
    StartEvent,
    UnknownEvent,
    decode_event,
    encode_event,
)

HASH = "0123456789abcdef" * 6
SIGNER = f"sha384/{'a' * 96}"
IMAGE = f"{SIGNER}/{'b' * 96}"
LAYER = f"sha384/{'c' * 96}"
COMPONENTS = (
    Component(
        name="supervisor",
        version="1.0",
        digest_sha384=HASH,
        role="supervisor",
        distribution="attested-containers",
    ),
    Component(
        name="tdx_sim",
        version="1.0",
        digest_sha384=HASH,
        role="plugin",
        distribution="attested-containers",
    ),
)
START = StartEvent(components=COMPONENTS, config_digest_sha384=HASH)
CONTAINER = StartContainerEvent(
    image_id=IMAGE,
    layers=(LAYER, LAYER),
    delegations=(
        LayerDelegation(
            index=1, hops=(DelegationHop(f"signer/{SIGNER}/python:2", SIGNER, "python:3", 3, HASH),)
        ),
    ),
    argv=("/bin/model", "--deep", ""),
    environment=("LANG=C", "EMPTY=", "EQUALS=a=b"),
)
EVENTS: list[LogEvent] = [
    START,
    msgspec.structs.replace(START, register_at_start="00" * 47 + "01"),
    AdmitImagesEvent(image_ids=(IMAGE,)),
    CONTAINER,
    SealEvent(),
    SealEvent(critical=False, open_delegations=(f"signer/{SIGNER}/python",)),
]


def canonical(value: object) -> bytes:
    """RFC 8785 of what these tests use: ASCII keys, no numbers beyond integers."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_survives_encoding(event: LogEvent) -> None:
    operation, content = encode_event(event)
    assert OPERATIONS[operation] is type(event)
    assert decode_event(operation, content) == event
    assert canonical(json.loads(content)) == content


def test_the_contents_are_what_the_format_says() -> None:
    assert encode_event(SealEvent()) == ("Seal", b'{"critical":true,"open_delegations":[]}')
    assert encode_event(AdmitImagesEvent(image_ids=(IMAGE,))) == (
        "AdmitImages",
        f'{{"critical":true,"image_ids":["{IMAGE}"]}}'.encode(),
    )
    operation, content = encode_event(START)
    assert operation == "Start"
    assert sorted(json.loads(content)) == ["components", "config_digest_sha384", "critical"]
    _, content = encode_event(CONTAINER)
    assert json.loads(content)["delegations"] == [
        {
            "index": 1,
            "hops": [
                {
                    "reference": f"signer/{SIGNER}/python:2",
                    "signer": SIGNER,
                    "alias": "python:3",
                    "svn": 3,
                    "statement_digest_sha384": HASH,
                }
            ],
        }
    ]


def objects() -> list[tuple[str, dict[str, object]]]:
    return [
        (operation, json.loads(content))
        for operation, content in (encode_event(event) for event in EVENTS)
    ]


@pytest.mark.parametrize(("operation", "value"), objects())
def test_each_field_must_be_there_and_none_else(operation: str, value: dict[str, object]) -> None:
    for name in value:
        if name == "register_at_start":
            continue
        without = {key: field for key, field in value.items() if key != name}
        with pytest.raises(FormatError):
            decode_event(operation, canonical(without))
    with pytest.raises(FormatError):
        decode_event(operation, canonical({**value, "more": 1}))


WRONG_VALUES: tuple[object, ...] = (None, 1, "text", [], {}, True, [1], [[]], [None])


@pytest.mark.parametrize(("operation", "value"), objects())
def test_each_field_must_have_its_type(operation: str, value: dict[str, object]) -> None:
    for name, field in value.items():
        for wrong in WRONG_VALUES:
            if type(wrong) is type(field) and not (isinstance(wrong, list) and wrong):
                continue
            with pytest.raises(FormatError):
                decode_event(operation, canonical({**value, name: wrong}))


def nested_fields(value: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Paths of all objects inside `value`."""
    found: list[tuple[str | int, ...]] = []
    if isinstance(value, dict):
        found.append(path)
        for key, child in value.items():
            found += nested_fields(child, (*path, key))
    elif isinstance(value, list):
        for at, child in enumerate(value):
            found += nested_fields(child, (*path, at))
    return found


@pytest.mark.parametrize(("operation", "value"), objects())
def test_an_unknown_field_is_refused_however_deep(operation: str, value: dict[str, object]) -> None:
    for path in nested_fields(value):
        copy = json.loads(canonical(value))
        inner = copy
        for step in path:
            inner = inner[step]
        inner["zzz_unknown"] = None
        with pytest.raises(FormatError):
            decode_event(operation, canonical(copy))


BAD_CONTENTS = {
    "not JSON": b"Seal",
    "empty": b"",
    "not an object": b"[]",
    "white space": b'{"critical": true,"open_delegations":[]}',
    "another order": b'{"open_delegations":[],"critical":true}',
    "a duplicate key": b'{"critical":false,"critical":true,"open_delegations":[]}',
    "critical is no boolean": b'{"critical":1,"open_delegations":[]}',
    "critical is a text": b'{"critical":"true","open_delegations":[]}',
    "an escape that is not needed": b'{"critical":true,"open_delegations":["\\u0061"]}',
    "bytes behind": b'{"critical":true,"open_delegations":[]}\n',
    "an empty delegation": b'{"critical":true,"open_delegations":[""]}',
    "deep": b'{"critical":true,"open_delegations":' + b"[" * 5000 + b"]" * 5000 + b"}",
}


@pytest.mark.parametrize("content", BAD_CONTENTS.values(), ids=BAD_CONTENTS.keys())
def test_a_content_in_another_form_is_refused(content: bytes) -> None:
    with pytest.raises(FormatError):
        decode_event("Seal", content)


def container(**changes: object) -> StartContainerEvent:
    return msgspec.structs.replace(CONTAINER, **changes)


HOPS = CONTAINER.delegations[0].hops
IMPOSSIBLE: dict[str, LogEvent] = {
    "a register that was zero": msgspec.structs.replace(START, register_at_start="00" * 48),
    "a short register": msgspec.structs.replace(START, register_at_start="01"),
    "an upper-case digest": msgspec.structs.replace(START, config_digest_sha384=HASH.upper()),
    "no components": msgspec.structs.replace(START, components=()),
    "no supervisor": msgspec.structs.replace(START, components=COMPONENTS[1:]),
    "the supervisor last": msgspec.structs.replace(START, components=COMPONENTS[::-1]),
    "two supervisors": msgspec.structs.replace(START, components=COMPONENTS[:1] * 2),
    "a plugin twice": msgspec.structs.replace(START, components=COMPONENTS + COMPONENTS[1:]),
    "a nameless plugin": msgspec.structs.replace(
        START, components=(COMPONENTS[0], msgspec.structs.replace(COMPONENTS[1], name=""))
    ),
    "a plugin without digest": msgspec.structs.replace(
        START, components=(COMPONENTS[0], msgspec.structs.replace(COMPONENTS[1], digest_sha384=""))
    ),
    "no image": AdmitImagesEvent(image_ids=()),
    "an image twice": AdmitImagesEvent(image_ids=(IMAGE, IMAGE)),
    "no image id": AdmitImagesEvent(image_ids=(SIGNER,)),
    "an unknown hash": AdmitImagesEvent(image_ids=(IMAGE.replace("sha384", "md5"),)),
    "a container of no image": container(image_id="image"),
    "a layer that is no digest": container(layers=(LAYER, "layer")),
    "a delegation of no layer": container(delegations=(LayerDelegation(index=2, hops=HOPS),)),
    "a delegation before the first": container(delegations=(LayerDelegation(index=-1, hops=HOPS),)),
    "a delegation twice": container(delegations=(LayerDelegation(index=1, hops=HOPS),) * 2),
    "delegations out of order": container(
        delegations=(LayerDelegation(index=1, hops=HOPS), LayerDelegation(index=0, hops=HOPS))
    ),
    "a delegation without hops": container(delegations=(LayerDelegation(index=1, hops=()),)),
    "a hop without statement": container(
        delegations=(
            LayerDelegation(
                index=1,
                hops=(msgspec.structs.replace(HOPS[0], statement_digest_sha384="00"),),
            ),
        )
    ),
    "no program": container(argv=()),
    "an empty program": container(argv=("", "x")),
    "a NUL in an argument": container(argv=("a\x00b",)),
    "a NUL in a setting": container(environment=("A=\x00",)),
    "a setting without =": container(environment=("A",)),
    "a setting without a name": container(environment=("=x",)),
}


@pytest.mark.parametrize("event", IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_an_event_that_no_supervisor_writes_is_neither_encoded_nor_decoded(
    event: LogEvent,
) -> None:
    with pytest.raises(FormatError):
        encode_event(event)
    operation = next(name for name, kind in OPERATIONS.items() if kind is type(event))
    value = msgspec.to_builtins(event)
    if value.get("register_at_start", "") is None:
        del value["register_at_start"]
    with pytest.raises(FormatError):
        decode_event(operation, canonical(value))


def test_values_of_wrong_types_are_not_encoded() -> None:
    event = AdmitImagesEvent(image_ids=IMAGE)  # type: ignore[arg-type]  # the point
    with pytest.raises(FormatError, match=r"AdmitImages\.image_ids"):
        encode_event(event)


def test_a_content_too_large_for_a_record_is_not_encoded() -> None:
    with pytest.raises(FormatError, match="bounded"):
        encode_event(container(argv=("/bin/x", "y" * 1024 * 1024)))


def test_a_refusal_names_the_field() -> None:
    value = {"critical": True, "image_ids": [IMAGE, 7]}
    with pytest.raises(FormatError) as caught:
        decode_event("AdmitImages", canonical(value))
    assert caught.value.item == "AdmitImages.image_ids[1]"


@pytest.mark.parametrize("critical", [True, False])
def test_an_unknown_operation_is_kept_with_what_it_says_of_itself(critical: bool) -> None:
    content = canonical({"critical": critical, "zone": {"a": [1, None]}})
    assert decode_event("Relocate2", content) == UnknownEvent(
        operation="Relocate2", critical=critical, content=content
    )


@pytest.mark.parametrize(
    "content",
    [b"{}", b'{"critical":null}', b'{"critical": true}', b'{"critical":"false"}', b"[true]", b""],
)
def test_an_unknown_operation_that_does_not_say_whether_it_is_critical_is_refused(
    content: bytes,
) -> None:
    with pytest.raises(FormatError):
        decode_event("Relocate", content)


@pytest.mark.parametrize(
    "operation", ["", "se al", "Se-al", "1Seal", "Seal\n", "Séal", "S" * 65, "Seal\x00"]
)
def test_an_operation_is_a_letter_followed_by_letters_and_digits(operation: str) -> None:
    with pytest.raises(FormatError):
        decode_event(operation, b'{"critical":true,"open_delegations":[]}')


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=20)


@given(st.lists(TEXTS), TEXTS, st.booleans())
def test_whatever_arguments_hold_the_record_can_be_read_back(
    arguments: list[str], setting: str, critical: bool
) -> None:
    event = container(
        critical=critical, argv=("/bin/x", *arguments), environment=(f"NAME={setting}",)
    )
    record = encode_record(3, *encode_event(event))
    (parsed,) = parse_records(record.raw)
    assert decode_event(parsed.operation, parsed.content) == event


@given(st.sampled_from([*OPERATIONS, "Other"]), st.binary(max_size=60))
def test_no_content_makes_the_decoder_raise_anything_else(operation: str, content: bytes) -> None:
    with pytest.raises(FormatError):
        decode_event(operation, content)
