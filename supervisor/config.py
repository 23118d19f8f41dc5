"""The daemon's configuration: one TOML file into frozen Structs, every default explicit.

The operator writes it and is not trusted: the effective configuration (the file
with every default filled in, plugin tables included) is measured in the first log
entry and travels in the evidence. Every check is on unless a setting whose name
begins with `unsafe_` turns it off.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec

from supervisor.errors import ConfigError
from supervisor.formats import canonical_json

MAX_CONFIG_BYTES = 1024 * 1024
PLUGIN_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")

Seconds = Annotated[int, msgspec.Meta(ge=1, le=3600)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]


class PluginsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which plugins, and in which order their hooks are walked. Nothing else is imported."""

    order: tuple[str, ...]


class ProvidersConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which plugin provides what; needed only where more than one of them could."""

    quote_source: str | None = None
    layer_store: str | None = None
    container_runtime: str | None = None
    delegation_statements: str | None = None


class MeasurementConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`log_limit_bytes` bounds the records; reaching it refuses loads and new starts."""

    extend_timeout_s: Seconds = 10
    log_limit_bytes: Annotated[int, msgspec.Meta(ge=4096, le=16 * 1024 * 1024)] = 8 * 1024 * 1024


class HooksConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long one gate, provide or observe hook of one plugin may take."""

    timeout_s: Seconds = 10


class AdmissionConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`unsafe_allow_sha256` accepts SHA-256 certificates and layer digests, as ACON's daemon."""

    max_images: Count = 1024
    max_group: Count = 256
    unsafe_allow_sha256: bool = False


class LayersConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bounds on layers.

    `timeout_s`: how long one may take to be fetched, or from its last byte to being usable.
    `max_image_bytes`: what all layers of one image may hold together, uncompressed.
    """

    timeout_s: Annotated[int, msgspec.Meta(ge=1, le=86_400)] = 3600
    max_image_bytes: Annotated[int, msgspec.Meta(ge=4096, le=2**44)] = 4 * 2**30


class ContainersConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`first_id` begins the range of user and group ids that containers are given.

    `log_kib`: how much of each container's output is kept. What an ended container wrote
    (in its root, `/tmp`, `/run`) is kept for a restart for `keep_exited_s` (0: not at all),
    of `max_kept_exited` containers at most, the latest ones.
    """

    max_running: Count = 1000
    max_remembered: Count = 1000
    first_id: Annotated[int, msgspec.Meta(ge=65536, le=2_000_000_000)] = 100_000
    start_timeout_s: Seconds = 60
    stop_timeout_s: Seconds = 10
    log_kib: Annotated[int, msgspec.Meta(ge=4, le=65_536)] = 64
    keep_exited_s: Annotated[int, msgspec.Meta(ge=0, le=86_400)] = 300
    max_kept_exited: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 64


class EvidenceConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """At most `max_waiting` requests wait for a quote; more are told to come back."""

    quote_timeout_s: Seconds = 40
    max_waiting: Count = 256


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file. `plugin` holds one table per plugin, validated by the plugin's own Struct."""

    plugins: PluginsConfig
    runtime_dir: str = "/run/acond"
    log_level: Annotated[str, msgspec.Meta(pattern="^(debug|info|warning|error)$")] = "info"
    unsafe_allow_swap: bool = False
    unsafe_allow_runtime_dir_on_disk: bool = False
    providers: ProvidersConfig = ProvidersConfig()
    measurement: MeasurementConfig = MeasurementConfig()
    hooks: HooksConfig = HooksConfig()
    admission: AdmissionConfig = AdmissionConfig()
    layers: LayersConfig = LayersConfig()
    containers: ContainersConfig = ContainersConfig()
    evidence: EvidenceConfig = EvidenceConfig()
    plugin: dict[str, dict[str, object]] = {}


def parse_config(text: str) -> Config:
    """Parse and validate a TOML text. Raises `ConfigError` whose item is the setting's path."""
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError("configuration", "must be TOML", actual=error) from error
    try:
        config = msgspec.convert(table, Config)
    except msgspec.ValidationError as error:
        raise config_error(error) from error
    order = config.plugins.order
    if not order:
        raise ConfigError("$.plugins.order", "must name at least one plugin")
    for name in order:
        if not PLUGIN_NAME.fullmatch(name):
            raise ConfigError(
                "$.plugins.order",
                "a plugin's name is lower-case letters, digits and _",
                actual=name,
            )
    if len(set(order)) != len(order):
        raise ConfigError("$.plugins.order", "must name each plugin once", actual=", ".join(order))
    for name in config.plugin:
        if name not in order:
            raise ConfigError(
                f"$.plugin.{name}",
                "configures a plugin that plugins.order does not name",
                expected=", ".join(order),
                actual=name,
            )
    if not Path(config.runtime_dir).is_absolute():
        raise ConfigError("$.runtime_dir", "must be an absolute path", actual=config.runtime_dir)
    return config


def read_config(path: Path) -> Config:
    """Read a bounded file and parse it. Raises `ConfigError`."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
        text = raw.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), "must be a readable UTF-8 file", actual=error) from error
    if len(raw) > MAX_CONFIG_BYTES:
        raise ConfigError(str(path), "is too large", expected=f"at most {MAX_CONFIG_BYTES} bytes")
    return parse_config(text)


def config_error(error: msgspec.ValidationError, prefix: str = "$") -> ConfigError:
    """msgspec's sentence, split into the path and the rule."""
    sentence = str(error)
    rule, _, path = sentence.partition(" - at `")
    item = path.rstrip("`") if path else "$"
    return ConfigError(prefix + item.removeprefix("$"), rule)


def effective_table(
    config: Config, plugin_configs: Mapping[str, msgspec.Struct]
) -> dict[str, object]:
    """The configuration with every default filled in, plugin tables included, as builtins."""
    table: dict[str, object] = msgspec.to_builtins(config)
    table["plugin"] = {name: msgspec.to_builtins(plugin_configs[name]) for name in plugin_configs}
    return table


def effective_config(config: Config, plugin_configs: Mapping[str, msgspec.Struct]) -> str:
    """Canonical JSON of `effective_table`: what is measured and travels in the evidence.

    Numbers that are no integers become their shortest decimal text, since canonical
    JSON here has no fractions.
    """
    table = effective_table(config, plugin_configs)
    text: str = canonical_json.encode(_without_fractions(table)).decode()
    return text


def config_digest_sha384(effective: str) -> str:
    """Lower-case hex of the SHA-384 of the effective configuration's UTF-8 bytes."""
    return hashlib.sha384(effective.encode()).hexdigest()


def _without_fractions(value: object) -> object:
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, dict):
        return {str(key): _without_fractions(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_fractions(item) for item in value]
    return value
