"""The manifest of an image: ACON image spec 1.0, "Manifest", read strictly.

What this reads is never encoded again for hashing: ids and signatures are over the
bytes as received.
"""

from __future__ import annotations

from typing import NoReturn

import msgspec

from supervisor.formats.canonical_json import MAX_INTEGER, decode, member_path
from supervisor.formats.digest import DIGEST_SIZES_BYTES, check_algorithm, check_hex
from supervisor.formats.environment import check_environment_rule
from supervisor.formats.errors import FormatError
from supervisor.formats.ids import SHOWN_CHARACTERS
from supervisor.formats.references import LayerReference, check_alias, parse_layer_reference

SPEC_VERSION = (1, 0)
# A hundred layers, a thousand rules and their aliases fit; evidence carries manifests whole.
MAX_MANIFEST_BYTES = 256 * 1024
MAX_SIGNAL = 64
# (uid_t)-1 is no user id.
MAX_UID = 2**32 - 2
OVERFLOW_UID = 65534
MAX_FD = 2**31 - 1
MAX_INSTANCES = 2**32 - 1
_FIELDS = frozenset(
    {
        "aconSpecVersion",
        "layers",
        "aliases",
        "entrypoint",
        "env",
        "workingDir",
        "uids",
        "logFDs",
        "writableFS",
        "noRestart",
        "signals",
        "maxInstances",
        "policy",
    }
)
_HEX = frozenset("0123456789abcdefABCDEF")
_SHORTEST_DIGEST_DIGITS = 40


class AcceptRule(msgspec.Struct, frozen=True, order=True):
    """`HASH/SIGNER/MANIFEST` of a launch policy.

    `signer` is `*` or lower-case hex; `target` is `*`, the hex digest of a manifest, or an
    alias from the other image's `aliases.self`.
    """

    algorithm: str
    signer: str
    target: str

    def __str__(self) -> str:
        return f"{self.algorithm}/{self.signer}/{self.target}"

    @property
    def names_digest(self) -> bool:
        """Whether `target` is a manifest's digest; such a target is never taken for an alias."""
        length = DIGEST_SIZES_BYTES[self.algorithm] * 2
        return len(self.target) == length and _HEX.issuperset(self.target)


class LaunchPolicy(msgspec.Struct, frozen=True):
    """Whom an image shares its TD with; judged by `supervisor.formats.launch_policy`."""

    accepts: tuple[AcceptRule, ...] = ()
    reject_unaccepted: bool = False


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a manifest says; the spec's field names in snake case, absent fields as defaults.

    `layers` are lowest first. `content_aliases` pairs a layer with the names it is given,
    sorted by layer. `uids` are further ids beside 0. `signals`: positive to pid 1, negative
    to its process group, 0 only first. `max_instances` 0 means no limit.
    """

    acon_spec_version: tuple[int, int] = SPEC_VERSION
    layers: tuple[LayerReference, ...] = ()
    content_aliases: tuple[tuple[LayerReference, tuple[str, ...]], ...] = ()
    self_aliases: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    working_dir: str = "/"
    uids: tuple[int, ...] = ()
    log_fds: tuple[int, ...] = ()
    writable_fs: bool = False
    no_restart: bool = False
    signals: tuple[int, ...] = ()
    max_instances: int = 1
    policy: LaunchPolicy = LaunchPolicy()

    @property
    def is_executable(self) -> bool:
        """Whether the image can be started; one that cannot only lends layers."""
        return bool(self.entrypoint)


def parse_manifest(
    raw: bytes, *, unsafe_allow_sha256: bool = False, max_bytes: int = MAX_MANIFEST_BYTES
) -> Manifest:
    """Read a manifest in whatever JSON form it was signed.

    Raises `FormatError` whose item is the path of the field, such as `$.layers[1]`, for
    unknown fields, duplicate keys, wrong types and values out of their range.
    """
    root = _object(decode(raw, item="$", max_bytes=max_bytes), "$")
    # First the version: what other fields there may be depends on it.
    _spec_version(root)
    _no_others(root, "$", _FIELDS)
    contents, self_aliases = _aliases(root.get("aliases", {}), unsafe_allow_sha256)
    return Manifest(
        layers=tuple(
            parse_layer_reference(
                _text(ref, path), item=path, unsafe_allow_sha256=unsafe_allow_sha256
            )
            for path, ref in _elements(root, "layers")
        ),
        content_aliases=contents,
        self_aliases=self_aliases,
        entrypoint=_entrypoint(root),
        env=_env(root),
        working_dir=_working_dir(root),
        uids=_uids(root),
        log_fds=_integers(root, "logFDs", 0, MAX_FD),
        writable_fs=_boolean(root.get("writableFS", False), "$.writableFS"),
        no_restart=_boolean(root.get("noRestart", False), "$.noRestart"),
        signals=_signals(root),
        max_instances=_integer(root.get("maxInstances", 1), "$.maxInstances", 0, MAX_INSTANCES),
        policy=_policy(root.get("policy", {}), unsafe_allow_sha256),
    )


def parse_accept_rule(text: str, *, item: str, unsafe_allow_sha256: bool = False) -> AcceptRule:
    """Parse `HASH/SIGNER/MANIFEST` of `policy.accepts`. Raises `FormatError` naming `item`."""
    parts = text.split("/", 3)
    if len(parts) != 3:
        raise FormatError(
            item, "a rule is written HASH/SIGNER/MANIFEST", actual=text[:SHOWN_CHARACTERS]
        )
    algorithm, signer, target = parts
    check_algorithm(
        algorithm[:SHOWN_CHARACTERS], item=item, unsafe_allow_sha256=unsafe_allow_sha256
    )
    if signer != "*":
        check_hex(algorithm, signer, item=item)
    if len(target) >= _SHORTEST_DIGEST_DIGITS and _HEX.issuperset(target):
        # Otherwise a mistyped digest would silently become an alias that nobody has.
        check_hex(algorithm, target, item=item)
    elif target != "*":
        check_alias(target, item=item)
    return AcceptRule(algorithm, signer, target)


def to_json_object(manifest: Manifest) -> dict[str, object]:
    """The JSON object that `parse_manifest` reads as `manifest`, for tools that write one.

    Fields that ACON's own tool always writes are always there.
    """
    aliases: dict[str, object] = {}
    if manifest.content_aliases:
        aliases["contents"] = {str(ref): list(names) for ref, names in manifest.content_aliases}
    if manifest.self_aliases:
        aliases["self"] = {".": list(manifest.self_aliases)}
    policy: dict[str, object] = {"rejectUnaccepted": manifest.policy.reject_unaccepted}
    if manifest.policy.accepts:
        policy["accepts"] = [str(rule) for rule in manifest.policy.accepts]
    root: dict[str, object] = {
        "aconSpecVersion": list(manifest.acon_spec_version),
        "aliases": aliases,
        "workingDir": manifest.working_dir,
        "uids": list(manifest.uids),
        "logFDs": list(manifest.log_fds),
        "writableFS": manifest.writable_fs,
        "noRestart": manifest.no_restart,
        "signals": list(manifest.signals),
        "maxInstances": manifest.max_instances,
        "policy": policy,
    }
    if manifest.layers:
        root["layers"] = [str(ref) for ref in manifest.layers]
    if manifest.entrypoint:
        root["entrypoint"] = list(manifest.entrypoint)
    if manifest.env:
        root["env"] = list(manifest.env)
    return root


# --- fields ---------------------------------------------------------------------------------


def _spec_version(root: dict[str, object]) -> None:
    path = "$.aconSpecVersion"
    if "aconSpecVersion" not in root:
        raise FormatError(path, "this field is required", expected=list(SPEC_VERSION))
    version = _integers(root, "aconSpecVersion", 0, MAX_INTEGER)
    if version != SPEC_VERSION:
        raise FormatError(
            path,
            "the manifest must follow ACON image spec 1.0",
            expected=list(SPEC_VERSION),
            actual=str(list(version))[:SHOWN_CHARACTERS],
        )


def _aliases(
    value: object, unsafe_allow_sha256: bool
) -> tuple[tuple[tuple[LayerReference, tuple[str, ...]], ...], tuple[str, ...]]:
    aliases = _object(value, "$.aliases")
    _no_others(aliases, "$.aliases", frozenset({"contents", "self"}))
    named: list[tuple[LayerReference, tuple[str, ...]]] = []
    for key, names in _object(aliases.get("contents", {}), "$.aliases.contents").items():
        path = member_path("$.aliases.contents", key)
        ref = parse_layer_reference(key, item=path, unsafe_allow_sha256=unsafe_allow_sha256)
        named.append((ref, _alias_list(names, path)))
    own = _object(aliases.get("self", {}), "$.aliases.self")
    _no_others(own, "$.aliases.self", frozenset({"."}))
    self_aliases = _alias_list(own.get(".", []), member_path("$.aliases.self", "."))
    return tuple(sorted(named, key=lambda pair: str(pair[0]))), self_aliases


def _alias_list(value: object, path: str) -> tuple[str, ...]:
    names = tuple(_text(name, f"{path}[{i}]") for i, name in enumerate(_array(value, path)))
    for index, name in enumerate(names):
        check_alias(name, item=f"{path}[{index}]")
    return names


def _entrypoint(root: dict[str, object]) -> tuple[str, ...]:
    argv = tuple(_text_without_nul(arg, path) for path, arg in _elements(root, "entrypoint"))
    if argv and not argv[0]:
        raise FormatError("$.entrypoint[0]", "the program's path must not be empty")
    return argv


def _env(root: dict[str, object]) -> tuple[str, ...]:
    rules = []
    for path, value in _elements(root, "env"):
        rule = _text(value, path)
        check_environment_rule(rule, item=path)
        rules.append(rule)
    return tuple(rules)


def _working_dir(root: dict[str, object]) -> str:
    path = _text_without_nul(root.get("workingDir", "/"), "$.workingDir")
    if not path.startswith("/"):
        raise FormatError(
            "$.workingDir", "must be an absolute path", actual=repr(path[:SHOWN_CHARACTERS])
        )
    return path


def _uids(root: dict[str, object]) -> tuple[int, ...]:
    uids = _integers(root, "uids", 1, MAX_UID)
    seen: set[int] = set()
    for index, uid in enumerate(uids):
        if uid == OVERFLOW_UID:
            raise FormatError(
                f"$.uids[{index}]", "the overflow user id must not be used", actual=uid
            )
        if uid in seen:
            raise FormatError(f"$.uids[{index}]", "a user id must be listed once", actual=uid)
        seen.add(uid)
    return uids


def _signals(root: dict[str, object]) -> tuple[int, ...]:
    signals = _integers(root, "signals", -MAX_SIGNAL, MAX_SIGNAL)
    for index, signum in enumerate(signals):
        if signum == 0 and index > 0:
            raise FormatError(
                f"$.signals[{index}]", "0 (no signal on restart) may only be the first element"
            )
    return signals


def _policy(value: object, unsafe_allow_sha256: bool) -> LaunchPolicy:
    policy = _object(value, "$.policy")
    _no_others(policy, "$.policy", frozenset({"accepts", "rejectUnaccepted"}))
    return LaunchPolicy(
        accepts=tuple(
            parse_accept_rule(_text(rule, path), item=path, unsafe_allow_sha256=unsafe_allow_sha256)
            for path, rule in _elements(policy, "accepts", "$.policy")
        ),
        reject_unaccepted=_boolean(
            policy.get("rejectUnaccepted", False), "$.policy.rejectUnaccepted"
        ),
    )


# --- types ----------------------------------------------------------------------------------


def _wrong_type(path: str, expected: str, value: object) -> NoReturn:
    kinds = {dict: "an object", list: "an array", str: "text", int: "an integer", bool: "a boolean"}
    raise FormatError(path, "wrong type", expected=expected, actual=kinds.get(type(value), "null"))


def _object(value: object, path: str) -> dict[str, object]:
    if not isinstance(value, dict):
        _wrong_type(path, "an object", value)
    return value


def _array(value: object, path: str) -> list[object]:
    if not isinstance(value, list):
        _wrong_type(path, "an array", value)
    return value


def _elements(parent: dict[str, object], key: str, path: str = "$") -> list[tuple[str, object]]:
    """The elements of an array field with their paths; none where the field is absent."""
    array = _array(parent.get(key, []), f"{path}.{key}")
    return [(f"{path}.{key}[{index}]", value) for index, value in enumerate(array)]


def _text(value: object, path: str) -> str:
    if not isinstance(value, str):
        _wrong_type(path, "text", value)
    return value


def _text_without_nul(value: object, path: str) -> str:
    text = _text(value, path)
    if "\0" in text:
        raise FormatError(path, "must not hold NUL", actual=repr(text[:SHOWN_CHARACTERS]))
    return text


def _boolean(value: object, path: str) -> bool:
    if not isinstance(value, bool):
        _wrong_type(path, "a boolean", value)
    return value


def _integer(value: object, path: str, low: int, high: int) -> int:
    # bool is a subclass of int in Python, not in JSON.
    if not isinstance(value, int) or isinstance(value, bool):
        _wrong_type(path, "an integer", value)
    if not low <= value <= high:
        raise FormatError(path, "out of range", expected=f"{low} to {high}", actual=value)
    return value


def _integers(root: dict[str, object], key: str, low: int, high: int) -> tuple[int, ...]:
    return tuple(_integer(value, path, low, high) for path, value in _elements(root, key))


def _no_others(members: dict[str, object], path: str, known: frozenset[str]) -> None:
    for key in members:
        if key not in known:
            raise FormatError(
                member_path(path, key),
                "unknown field",
                expected=f"one of {', '.join(sorted(known))}",
            )
