"""The faults that a running supervisor can have, beside those of untrusted bytes."""

from __future__ import annotations

from supervisor.formats.errors import (
    DelegationUnresolved,
    DigestMismatch,
    FormatError,
    PolicyDenied,
    Refusal,
    SignatureInvalid,
    Untrusted,
)

__all__ = [
    "Busy",
    "ConfigError",
    "Conflict",
    "DeadlineExceeded",
    "DelegationUnresolved",
    "Denied",
    "DigestMismatch",
    "FormatError",
    "MeasurementHalted",
    "PluginContractError",
    "PolicyDenied",
    "Refusal",
    "RuntimeFailed",
    "SignatureInvalid",
    "UnknownItem",
    "Untrusted",
]


class ConfigError(Refusal):
    """The operator's configuration is wrong; `item` is the path of the setting."""

    kind = "config"


class PluginContractError(Refusal):
    """A plugin broke its contract: wrong hook, wrong colour, wrong answer."""

    kind = "plugin"


class Denied(Refusal):
    """A gate plugin said no, or gave no answer; `item` is what was judged."""

    kind = "denied"


class UnknownItem(Refusal):
    """The caller named an image, layer or container that is not here."""

    kind = "unknown"


class Conflict(Refusal):
    """What the caller asks cannot be done in the present state (sealed, already running)."""

    kind = "conflict"


class Busy(Refusal):
    """A bound is reached; the same request may pass later."""

    kind = "busy"


class DeadlineExceeded(Refusal):
    """Something did not finish in the time it was given."""

    kind = "deadline"


class MeasurementHalted(Refusal):
    """Log and register may have parted; nothing more is measured, no evidence is given."""

    kind = "measurement"


class RuntimeFailed(Refusal):
    """The hardware, the kernel or the OCI runtime failed."""

    kind = "runtime"
