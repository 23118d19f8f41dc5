from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from signed_images import manifest_bytes

from supervisor.formats.canonical_json import encode
from supervisor.formats.digest import Digest
from supervisor.formats.errors import FormatError, Refusal
from supervisor.formats.ids import SignerId
from supervisor.formats.manifest import (
    MAX_MANIFEST_BYTES,
    AcceptRule,
    LaunchPolicy,
    Manifest,
    parse_accept_rule,
    parse_manifest,
    to_json_object,
)
from supervisor.formats.references import DelegatedReference, LayerReference

A96 = "a" * 96
B96 = "b" * 96
LAYER = f"sha384/{A96}"
DELEGATED = f"signer/sha384/{B96}/python:2"
FULL: dict[str, object] = {
    "layers": [DELEGATED, LAYER],
    "aliases": {
        "contents": {LAYER: ["app:1", "app:0"], DELEGATED: ["runtime:1"]},
        "self": {".": ["product:1", "product:0"]},
    },
    "entrypoint": ["/bin/app", "", "--flag"],
    "env": ["PATH=/bin", "PROXY", "MODE="],
    "workingDir": "/work",
    "uids": [101, 201, 65533, 65535, 2**32 - 2],
    "logFDs": [1, 2, 0],
    "writableFS": True,
    "noRestart": True,
    "signals": [0, -15, 64, -64],
    "maxInstances": 0,
    "policy": {
        "accepts": [
            f"sha384/{A96}/product:2",
            f"sha384/{A96}/*",
            f"sha384/*/{B96}",
            "sha512/*/*",
            f"sha384/{A96}/plain name",
        ],
        "rejectUnaccepted": True,
    },
}


def refusal_of(raw: bytes) -> FormatError:
    with pytest.raises(FormatError) as caught:
        parse_manifest(raw)
    return caught.value


# --- what is read ------------------------------------------------------------------------------


def test_every_field_is_read() -> None:
    signer = SignerId("sha384", B96)
    assert parse_manifest(manifest_bytes(**FULL)) == Manifest(
        acon_spec_version=(1, 0),
        layers=(DelegatedReference(signer, "python:2"), Digest("sha384", A96)),
        content_aliases=(
            (Digest("sha384", A96), ("app:1", "app:0")),
            (DelegatedReference(signer, "python:2"), ("runtime:1",)),
        ),
        self_aliases=("product:1", "product:0"),
        entrypoint=("/bin/app", "", "--flag"),
        env=("PATH=/bin", "PROXY", "MODE="),
        working_dir="/work",
        uids=(101, 201, 65533, 65535, 2**32 - 2),
        log_fds=(1, 2, 0),
        writable_fs=True,
        no_restart=True,
        signals=(0, -15, 64, -64),
        max_instances=0,
        policy=LaunchPolicy(
            accepts=(
                AcceptRule("sha384", A96, "product:2"),
                AcceptRule("sha384", A96, "*"),
                AcceptRule("sha384", "*", B96),
                AcceptRule("sha512", "*", "*"),
                AcceptRule("sha384", A96, "plain name"),
            ),
            reject_unaccepted=True,
        ),
    )


def test_absent_fields_have_the_specs_defaults() -> None:
    manifest = parse_manifest(b'{"aconSpecVersion":[1,0]}')
    assert manifest == Manifest()
    assert (manifest.working_dir, manifest.max_instances) == ("/", 1)
    assert not manifest.is_executable
    assert not manifest.policy.reject_unaccepted


def test_an_entry_point_makes_an_image_executable() -> None:
    assert parse_manifest(manifest_bytes(entrypoint=["a"])).is_executable
    assert not parse_manifest(manifest_bytes(entrypoint=[])).is_executable


def test_a_manifest_need_not_be_canonical() -> None:
    pretty = json.dumps({"aconSpecVersion": [1, 0], **FULL}, indent=4).encode() + b"\n"
    assert parse_manifest(pretty) == parse_manifest(manifest_bytes(**FULL))


# --- what is refused ---------------------------------------------------------------------------

WRONG: list[tuple[dict[str, object], str]] = [
    # unknown fields, top-level and nested
    ({"attributes": {}}, "$.attributes"),
    ({"Layers": []}, "$.Layers"),
    ({"runtime": ["exec"]}, "$.runtime"),
    ({"a b": 1}, '$["a b"]'),
    ({"": 1}, '$[""]'),
    ({"aliases": {"images": {}}}, "$.aliases.images"),
    ({"aliases": {"self": {"..": []}}}, '$.aliases.self[".."]'),
    ({"aliases": {"self": {LAYER: ["a"]}}}, f'$.aliases.self["{LAYER}"]'),
    ({"policy": {"rejects": True}}, "$.policy.rejects"),
    # wrong types
    ({"layers": None}, "$.layers"),
    ({"layers": {}}, "$.layers"),
    ({"layers": LAYER}, "$.layers"),
    ({"layers": [LAYER, 1]}, "$.layers[1]"),
    ({"layers": [[LAYER]]}, "$.layers[0]"),
    ({"aliases": []}, "$.aliases"),
    ({"aliases": None}, "$.aliases"),
    ({"aliases": {"contents": []}}, "$.aliases.contents"),
    ({"aliases": {"contents": {LAYER: "a"}}}, f'$.aliases.contents["{LAYER}"]'),
    ({"aliases": {"contents": {LAYER: ["a", 1]}}}, f'$.aliases.contents["{LAYER}"][1]'),
    ({"aliases": {"self": ["a"]}}, "$.aliases.self"),
    ({"aliases": {"self": {".": "a"}}}, '$.aliases.self["."]'),
    ({"aliases": {"self": {".": [None]}}}, '$.aliases.self["."][0]'),
    ({"entrypoint": "/bin/app"}, "$.entrypoint"),
    ({"entrypoint": ["/bin/app", 1]}, "$.entrypoint[1]"),
    ({"env": {"A": "b"}}, "$.env"),
    ({"env": ["A", True]}, "$.env[1]"),
    ({"workingDir": None}, "$.workingDir"),
    ({"workingDir": ["/"]}, "$.workingDir"),
    ({"uids": 1}, "$.uids"),
    ({"uids": ["1"]}, "$.uids[0]"),
    ({"uids": [5, True]}, "$.uids[1]"),
    ({"logFDs": [True]}, "$.logFDs[0]"),
    ({"logFDs": [None]}, "$.logFDs[0]"),
    ({"writableFS": 1}, "$.writableFS"),
    ({"writableFS": "true"}, "$.writableFS"),
    ({"noRestart": 0}, "$.noRestart"),
    ({"noRestart": None}, "$.noRestart"),
    ({"signals": [True]}, "$.signals[0]"),
    ({"maxInstances": True}, "$.maxInstances"),
    ({"maxInstances": "1"}, "$.maxInstances"),
    ({"maxInstances": None}, "$.maxInstances"),
    ({"policy": None}, "$.policy"),
    ({"policy": []}, "$.policy"),
    ({"policy": {"accepts": {}}}, "$.policy.accepts"),
    ({"policy": {"accepts": [1]}}, "$.policy.accepts[0]"),
    ({"policy": {"rejectUnaccepted": 1}}, "$.policy.rejectUnaccepted"),
    ({"policy": {"rejectUnaccepted": "false"}}, "$.policy.rejectUnaccepted"),
    # references
    ({"layers": [LAYER, LAYER.upper()]}, "$.layers[1]"),
    ({"layers": [f"sha384/{A96[1:]}"]}, "$.layers[0]"),
    ({"layers": [f"sha384/{A96}a"]}, "$.layers[0]"),
    ({"layers": [f"sha256/{'a' * 64}"]}, "$.layers[0]"),
    ({"layers": [f"signer/sha384/{A96}/"]}, "$.layers[0]"),
    ({"layers": [f"signer/sha384/{A96}/a/b"]}, "$.layers[0]"),
    ({"layers": [f"signer/sha384/{A96}/.."]}, "$.layers[0]"),
    ({"layers": [""]}, "$.layers[0]"),
    ({"aliases": {"contents": {".": ["a"]}}}, '$.aliases.contents["."]'),
    ({"aliases": {"contents": {LAYER: ["a/b"]}}}, f'$.aliases.contents["{LAYER}"][0]'),
    ({"aliases": {"contents": {LAYER: ["a", ""]}}}, f'$.aliases.contents["{LAYER}"][1]'),
    ({"aliases": {"contents": {LAYER: ["."]}}}, f'$.aliases.contents["{LAYER}"][0]'),
    ({"aliases": {"contents": {LAYER: ["a\0"]}}}, f'$.aliases.contents["{LAYER}"][0]'),
    ({"aliases": {"contents": {LAYER: ["x" * 256]}}}, f'$.aliases.contents["{LAYER}"][0]'),
    ({"aliases": {"self": {".": ["a:1", ".."]}}}, '$.aliases.self["."][1]'),
    # values
    ({"entrypoint": [""]}, "$.entrypoint[0]"),
    ({"entrypoint": ["/a\0b"]}, "$.entrypoint[0]"),
    ({"entrypoint": ["/a", "b\0"]}, "$.entrypoint[1]"),
    ({"env": ["A", "=x"]}, "$.env[1]"),
    ({"env": [""]}, "$.env[0]"),
    ({"env": ["="]}, "$.env[0]"),
    ({"env": ["A=\0"]}, "$.env[0]"),
    ({"workingDir": ""}, "$.workingDir"),
    ({"workingDir": "work"}, "$.workingDir"),
    ({"workingDir": "./"}, "$.workingDir"),
    ({"workingDir": "/a\0"}, "$.workingDir"),
    ({"uids": [1, 0]}, "$.uids[1]"),
    ({"uids": [-1]}, "$.uids[0]"),
    ({"uids": [65534]}, "$.uids[0]"),
    ({"uids": [7, 8, 7]}, "$.uids[2]"),
    ({"uids": [2**32 - 1]}, "$.uids[0]"),
    ({"uids": [2**53 - 1]}, "$.uids[0]"),
    ({"logFDs": [-1]}, "$.logFDs[0]"),
    ({"logFDs": [2**31]}, "$.logFDs[0]"),
    ({"signals": [65]}, "$.signals[0]"),
    ({"signals": [1, -65]}, "$.signals[1]"),
    ({"signals": [1, 0]}, "$.signals[1]"),
    ({"signals": [0, 0]}, "$.signals[1]"),
    ({"maxInstances": -1}, "$.maxInstances"),
    ({"maxInstances": 2**32}, "$.maxInstances"),
    # policy rules
    ({"policy": {"accepts": [f"sha384/{A96}"]}}, "$.policy.accepts[0]"),
    ({"policy": {"accepts": [f"sha384/{A96}/*", f"sha384/{A96}/a/b"]}}, "$.policy.accepts[1]"),
    ({"policy": {"accepts": [f"*/{A96}/*"]}}, "$.policy.accepts[0]"),
    ({"policy": {"accepts": ["*/*/*"]}}, "$.policy.accepts[0]"),
    ({"policy": {"accepts": [f"sha384/{A96.upper()}/*"]}}, "$.policy.accepts[0]"),
    ({"policy": {"accepts": [f"sha384/{A96}/{B96.upper()}"]}}, "$.policy.accepts[0]"),
    ({"policy": {"accepts": [f"sha384/{A96}/{B96[1:]}"]}}, "$.policy.accepts[0]"),
    ({"policy": {"accepts": [f"sha384/{A96}/{'b' * 128}"]}}, "$.policy.accepts[0]"),
    ({"policy": {"accepts": [f"sha256/{'a' * 64}/*"]}}, "$.policy.accepts[0]"),
    ({"policy": {"accepts": [f"sha384/{A96}/"]}}, "$.policy.accepts[0]"),
    ({"policy": {"accepts": [f"sha384/{A96}/.."]}}, "$.policy.accepts[0]"),
    ({"policy": {"accepts": [f"sha384/**/{B96}"]}}, "$.policy.accepts[0]"),
]


@pytest.mark.parametrize(("fields", "item"), WRONG, ids=[str(n) for n in range(len(WRONG))])
def test_a_wrong_field_is_refused_with_its_path(fields: dict[str, object], item: str) -> None:
    assert refusal_of(manifest_bytes(**fields)).item == item


@pytest.mark.parametrize(
    ("version", "item"),
    [
        ("null", "$.aconSpecVersion"),
        ("[1]", "$.aconSpecVersion"),
        ("[]", "$.aconSpecVersion"),
        ("[1,0,0]", "$.aconSpecVersion"),
        ("[1,1]", "$.aconSpecVersion"),
        ("[2,0]", "$.aconSpecVersion"),
        ("[0,0]", "$.aconSpecVersion"),
        ('"1.0"', "$.aconSpecVersion"),
        ("1", "$.aconSpecVersion"),
        ("[true,false]", "$.aconSpecVersion[0]"),
        ("[1,false]", "$.aconSpecVersion[1]"),
        ('["1","0"]', "$.aconSpecVersion[0]"),
        ("[1.0,0]", "$.aconSpecVersion[0]"),
        ("[1,-1]", "$.aconSpecVersion[1]"),
    ],
)
def test_another_version_of_the_spec_is_refused(version: str, item: str) -> None:
    assert refusal_of(b'{"aconSpecVersion":%s}' % version.encode()).item == item


def test_a_manifest_without_version_is_refused() -> None:
    error = refusal_of(b"{}")
    assert (error.item, error.expected) == ("$.aconSpecVersion", "[1, 0]")


@pytest.mark.parametrize("raw", [b"[]", b"null", b'"x"', b"1", b"true"])
def test_a_manifest_is_an_object(raw: bytes) -> None:
    error = refusal_of(raw)
    assert (error.item, error.expected) == ("$", "an object")


@pytest.mark.parametrize(
    ("raw", "item"),
    [
        (b'{"aconSpecVersion":[1,0],"uids":[1],"uids":[2]}', "$.uids"),
        (b'{"aconSpecVersion":[1,0],"policy":{"accepts":[],"accepts":[]}}', "$.policy.accepts"),
        (b'{"aconSpecVersion":[1,0],"maxInstances":NaN}', "$.maxInstances"),
        (b'{"aconSpecVersion":[1,0],"maxInstances":1.0}', "$.maxInstances"),
        (b'{"aconSpecVersion":[1,0],"maxInstances":1e2}', "$.maxInstances"),
        (b'{"aconSpecVersion":[1,0],"maxInstances":%s}' % (b"9" * 5000), "$.maxInstances"),
        (b'{"aconSpecVersion":[1,0],"workingDir":"/\\ud800"}', "$.workingDir"),
        (b'{"aconSpecVersion":[1,0],"workingDir":"/\xff"}', "$"),
        (b'{"aconSpecVersion":[1,0]}x', "$"),
        (b"", "$"),
    ],
)
def test_what_readers_could_disagree_on_is_refused(raw: bytes, item: str) -> None:
    assert refusal_of(raw).item == item


def test_deep_nesting_is_refused() -> None:
    for levels in (40, 5_000, 100_000):
        error = refusal_of(b'{"layers":' + b"[" * levels + b"]" * levels + b"}")
        assert "nested" in error.rule


def test_a_manifest_beyond_the_limit_is_refused() -> None:
    raw = manifest_bytes(entrypoint=["x" * MAX_MANIFEST_BYTES])
    assert refusal_of(raw).expected == f"{MAX_MANIFEST_BYTES} bytes"
    assert parse_manifest(raw, max_bytes=len(raw)).is_executable


def test_sha256_is_read_only_under_the_unsafe_setting() -> None:
    weak = f"sha256/{'a' * 64}"
    raw = manifest_bytes(
        layers=[weak],
        aliases={"contents": {weak: ["a:1"]}},
        policy={"accepts": [f"{weak}/*"]},
    )
    assert refusal_of(raw).item in ("$.layers[0]", f'$.aliases.contents["{weak}"]')
    manifest = parse_manifest(raw, unsafe_allow_sha256=True)
    assert [str(layer) for layer in manifest.layers] == [weak]
    with pytest.raises(FormatError):
        parse_manifest(
            manifest_bytes(layers=[f"sha224/{'a' * 56}"]),
            unsafe_allow_sha256=True,
        )


def test_a_rule_is_written_as_it_is_read() -> None:
    for text in (f"sha384/{A96}/{B96}", "sha512/*/*", f"sha384/*/{B96}", f"sha384/{A96}/a:1"):
        assert str(parse_accept_rule(text, item="$")) == text


def test_a_rule_with_a_weak_hash_is_refused_unless_allowed() -> None:
    weak = f"sha256/{'a' * 64}/*"
    with pytest.raises(FormatError):
        parse_accept_rule(weak, item="$")
    assert str(parse_accept_rule(weak, item="$", unsafe_allow_sha256=True)) == weak


def test_a_short_hexadecimal_word_is_an_alias() -> None:
    assert not parse_accept_rule(f"sha384/{A96}/deadbeef", item="$").names_digest
    assert parse_accept_rule(f"sha384/{A96}/{B96}", item="$").names_digest


# --- properties --------------------------------------------------------------------------------

_alias = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=20
).filter(lambda alias: alias not in (".", ".."))
_hex = st.sampled_from("0123456789abcdef").map(lambda digit: digit * 96)
_digest = _hex.map(lambda digits: Digest("sha384", digits))
_delegated = st.builds(
    DelegatedReference, _hex.map(lambda digits: SignerId("sha384", digits)), _alias
)
_reference: st.SearchStrategy[LayerReference] = st.one_of(_digest, _delegated)
_words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)


@st.composite
def _manifests(draw: st.DrawFn) -> Manifest:
    contents = draw(
        st.dictionaries(_reference, st.lists(_alias, max_size=3).map(tuple), max_size=3)
    )
    signals = draw(st.lists(st.integers(-64, 64).filter(bool), max_size=3))
    rules = st.builds(
        AcceptRule, st.just("sha384"), _hex | st.just("*"), _hex | st.just("*") | _alias
    )
    return Manifest(
        layers=tuple(draw(st.lists(_reference, max_size=3))),
        content_aliases=tuple(sorted(contents.items(), key=lambda pair: str(pair[0]))),
        self_aliases=tuple(draw(st.lists(_alias, max_size=3))),
        entrypoint=tuple(draw(st.lists(_words.filter(bool), max_size=3))),
        env=tuple(
            draw(st.lists(_words.filter(lambda w: bool(w) and not w.startswith("=")), max_size=3))
        ),
        working_dir="/" + draw(_words),
        uids=tuple(draw(st.lists(st.integers(1, 65533), max_size=3, unique=True))),
        log_fds=tuple(draw(st.lists(st.integers(0, 9), max_size=3))),
        writable_fs=draw(st.booleans()),
        no_restart=draw(st.booleans()),
        signals=tuple([0, *signals] if draw(st.booleans()) else signals),
        max_instances=draw(st.integers(0, 9)),
        policy=LaunchPolicy(tuple(draw(st.lists(rules, max_size=3))), draw(st.booleans())),
    )


@given(_manifests())
def test_what_was_written_is_read_again(manifest: Manifest) -> None:
    assert parse_manifest(encode(to_json_object(manifest))) == manifest


_junk = st.recursive(
    st.none() | st.booleans() | st.integers(-70, 70) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["contents", "self", ".", "accepts"]), inner, max_size=2)
    ),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(sorted(FULL)), _junk, max_size=4))
def test_any_json_is_a_manifest_or_refused_with_a_path(fields: dict[str, object]) -> None:
    try:
        manifest = parse_manifest(json.dumps({"aconSpecVersion": [1, 0], **fields}).encode())
    except FormatError as error:
        assert error.item.startswith("$")
    else:
        assert parse_manifest(encode(to_json_object(manifest))) == manifest


@given(st.binary(max_size=40), st.integers(0, 2000))
def test_damaged_bytes_raise_nothing_but_refusals(damage: bytes, offset: int) -> None:
    raw = bytearray(manifest_bytes(**FULL))
    raw[offset : offset + len(damage)] = damage
    try:
        manifest = parse_manifest(bytes(raw))
    except Refusal:
        return
    assert manifest.acon_spec_version == (1, 0)


# --- real manifests ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["set1_sample.json", "set2_sample.json"])
def test_acons_older_dialect_is_refused_field_by_field(vectors: Path, name: str) -> None:
    raw = (vectors / "acon" / name).read_bytes()
    assert refusal_of(raw).item == "$.aconSpecVersion"
    fields = json.loads(raw)
    fields["aconSpecVersion"] = [1, 0]
    assert refusal_of(encode(fields)).item == "$.attributes"
    del fields["attributes"]
    assert refusal_of(encode(fields)).item == "$.runtime"
    del fields["runtime"]
    # `signers/...` was the older spelling, and SHA-224 and SHA-256 are too weak.
    contents = refusal_of(encode(fields))
    assert contents.item.startswith('$.aliases.contents["sha2')
    assert contents.expected == "sha384 or sha512"
    del fields["aliases"]["contents"]
    assert refusal_of(encode(fields)).item == "$.layers[0]"
    del fields["layers"][:2]
    del fields["layers"][1:]
    assert refusal_of(encode(fields)).item == "$.policy.rejects"
    fields["policy"]["rejectUnaccepted"] = fields["policy"].pop("rejects")
    assert refusal_of(encode(fields)).item == "$.policy.accepts[0]"
    del fields["policy"]["accepts"]
    manifest = parse_manifest(encode(fields))
    assert manifest.self_aliases == ("SomeProduct:2", "SomeProduct:1", "SomeProduct:0")


def test_the_manifest_of_acons_test_repository_is_of_another_version(vectors: Path) -> None:
    raw = (vectors / "acon" / "test_repo_acon.json").read_bytes()
    error = refusal_of(raw)
    assert (error.item, error.actual) == ("$.aconSpecVersion", "[0, 0]")
    fields = json.loads(raw)
    fields["aconSpecVersion"] = [1, 0]
    assert refusal_of(encode(fields)).item == "$.workingDir"
    fields["workingDir"] = "/"
    manifest = parse_manifest(encode(fields))
    assert manifest.entrypoint == ("/lib/acon/entrypoint.d/start",)
    assert [str(layer)[:15] for layer in manifest.layers] == [
        "sha384/de9d9395",
        "sha384/86a35cf6",
        "sha384/badd0ba0",
    ]


def test_manifests_that_aconcli_made_are_read(vectors: Path) -> None:
    folder = vectors / "acon" / "aconcli_repo" / "manifests" / "sha384"
    manifests = {path.name[:8]: path / "acon.json" for path in folder.iterdir()}
    vendor = parse_manifest(manifests["ac3152d6"].read_bytes())
    app = parse_manifest(manifests["b1c8b25c"].read_bytes())
    assert not vendor.is_executable
    assert [names for _, names in vendor.content_aliases] == [("busybox:1",)]
    assert isinstance(app.layers[0], DelegatedReference)
    assert app.layers[0].alias == "busybox:1"
    assert app.entrypoint == ("/app.sh", "one")
    assert app.env == ("PATH=/bin", "A=1", "B")
    assert app.signals == (-15, -9, 10)
    assert app.uids == (1000,)
    assert app.policy.accepts[0].target.startswith("ac3152d6")
