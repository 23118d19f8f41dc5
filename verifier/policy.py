"""The relying party's policy: TOML text -> frozen Structs.

Every expectation is a pinned value or, in so many words, "unpinned"; nothing is left
out by silence. Unknown keys, empty lists, tables and texts, and settings that contradict
each other are refused with their path, because each of them would be an expectation
that its author believes to be checked and that is not.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from typing import Literal

import msgspec

from supervisor.formats.errors import FormatError

MAX_POLICY_BYTES = 1 << 20
MAX_DEPTH = 16
ZERO_SHA384 = "00" * 48
UNPINNED = "unpinned"

Unpinned = Literal["unpinned"]
# One pinned lower-case hex value, several of which any will do, or "unpinned".
Pins = str | tuple[str, ...]
TcbStatus = Literal[
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
    "TDRelaunchAdvised",
    "TDRelaunchAdvisedConfigurationNeeded",
]


class TrustPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whose root must have signed. "simulated" is never enough by itself: the caller must
    also hand over the simulator's root."""

    root: Literal["intel", "simulated"] = "intel"


class TcbPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How current the platform must be. Revoked cannot be accepted."""

    minimum_evaluation_number: int | Unpinned
    accept_status: tuple[TcbStatus, ...] = ("UpToDate",)
    accept_advisories: tuple[str, ...] | Unpinned = ()


class TdPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The TD's own settings. The rules for single bits hold even where a value is unpinned."""

    attributes: Pins
    xfam: Pins
    mr_seam: Pins
    mr_signer_seam: str = ZERO_SHA384


class BasePolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What brought the supervisor: firmware (MRTD, RTMR0), kernel and boot (RTMR1, RTMR2)."""

    mr_td: Pins
    rtmr0: Pins
    rtmr1: Pins
    rtmr2: Pins
    mr_config_id: Pins
    mr_owner: Pins
    mr_owner_config: Pins


class LogPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The supervisor's register: which, where it must have started, whether loading has ended."""

    register_index: Literal[2, 3] = 3
    register_at_start: str = ZERO_SHA384
    seal_required: bool = True


class ComponentPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One distribution that runs with the supervisor's power."""

    name: str
    version: str
    digest_sha384: str


class ConfigPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The effective configuration. `allow_unsafe` lists full paths, such as `a.unsafe_b`."""

    digest_sha384: Pins
    allow_unsafe: tuple[str, ...] = ()


class ImageEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One expected image: by `id`, or by `signer` and `name` with a minimum SVN (0: any)."""

    id: str | None = None
    signer: str | None = None
    name: str | None = None
    minimum_svn: int | None = None

    def __str__(self) -> str:
        if self.id is not None:
            return self.id
        return f"{self.name}, version {self.minimum_svn} or later, by {self.signer}"


class ImagesPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which images may have been loaded: exactly these, or (exact = false) at least these."""

    executable: tuple[ImageEntry, ...]
    layer_only: tuple[ImageEntry, ...] = ()
    exact: bool = True


class DelegationEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A vendor to whom a layer may have been left, from this version on."""

    signer: str
    name: str
    minimum_svn: int

    def __str__(self) -> str:
        return f"{self.name}, version {self.minimum_svn} or later, by {self.signer}"


class CertificatesPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whether image signers' certificates must be in date at the verifier's time."""

    dates: Literal["checked", "ignored"] = "checked"


class Policy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that a verdict compares evidence with, besides what the caller hands over itself."""

    version: Literal[1]
    tcb: TcbPolicy
    td: TdPolicy
    base: BasePolicy
    supervisor: ComponentPolicy | Unpinned
    plugins: tuple[ComponentPolicy, ...] | Unpinned
    config: ConfigPolicy
    images: ImagesPolicy | Unpinned
    delegations: tuple[DelegationEntry, ...] | Unpinned = ()
    trust: TrustPolicy = TrustPolicy()
    log: LogPolicy = LogPolicy()
    certificates: CertificatesPolicy = CertificatesPolicy()
    # Which image a container must run that asks for evidence or binds a key to it.
    speaker: ImageEntry | Unpinned | None = None


def pins(value: Pins) -> tuple[str, ...] | None:
    """The values of which any will do, or None for "unpinned"."""
    if isinstance(value, tuple):
        return value
    return None if value == UNPINNED else (value,)


def parse_policy(text: str | bytes) -> Policy:
    """Read a policy. Raises `FormatError` whose item is the path of the offending setting."""
    # Imported late: its rules are written in terms of the Structs above.
    from verifier.policy_rules import require_consistent

    policy = _convert(_read_toml(text))
    require_consistent(policy)
    return policy


def _read_toml(text: str | bytes) -> dict[str, object]:
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise FormatError("policy", "a policy is UTF-8", actual=error.reason) from None
    if len(text) > MAX_POLICY_BYTES:
        raise FormatError(
            "policy", "too large", expected=f"at most {MAX_POLICY_BYTES}", actual=len(text)
        )
    try:
        raw: dict[str, object] = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError("policy", "a policy is TOML", actual=str(error)[:200]) from None
    for path in _empty_values(raw, "", 0):
        raise FormatError(
            path or "policy",
            "an empty expectation checks nothing; leave it out, or write what is expected",
            expected='a value, or "unpinned"',
            actual="empty",
        )
    return raw


def _empty_values(value: object, path: str, depth: int) -> Iterator[str]:
    if depth > MAX_DEPTH:
        raise FormatError(path, "too deeply nested", expected=f"at most {MAX_DEPTH}")
    if isinstance(value, dict):
        if not value:
            yield path
        for key, member in value.items():
            yield from _empty_values(member, f"{path}.{key}" if path else key, depth + 1)
    elif isinstance(value, list):
        if not value:
            yield path
        for index, member in enumerate(value):
            yield from _empty_values(member, f"{path}[{index}]", depth + 1)
    elif isinstance(value, str) and not value.strip():
        yield path


def _convert(raw: dict[str, object]) -> Policy:
    """TOML values -> Structs, with msgspec's complaint turned into a path and a rule."""
    try:
        return msgspec.convert(raw, Policy, strict=True)
    except msgspec.ValidationError as error:
        rule, _, where = str(error).partition(" - at `$")
        path = where.rstrip("`").lstrip(".")
        if unknown := re.search(r"unknown field `([^`]*)`", rule):
            path = f"{path}.{unknown[1]}" if path else unknown[1]
            rule = "no such setting"
        elif missing := re.search(r"missing required field `([^`]*)`", rule):
            path = f"{path}.{missing[1]}" if path else missing[1]
            rule = 'an expectation is never left out by silence; pin it or write "unpinned"'
        raise FormatError(path or "policy", rule) from None
