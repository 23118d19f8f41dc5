"""All that a plugin author imports.

Names are loaded when they are first used, so that `supervisor.formats` can be
imported by a verifier that has neither trio nor pluggy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from supervisor.container_seams import ContainerRuntime as ContainerRuntime
    from supervisor.container_seams import ContainerSpec as ContainerSpec
    from supervisor.container_seams import ExitStatus as ExitStatus
    from supervisor.container_seams import Invocation as Invocation
    from supervisor.container_seams import InvocationResult as InvocationResult
    from supervisor.container_seams import LogSink as LogSink
    from supervisor.container_seams import PreparedContainer as PreparedContainer
    from supervisor.container_seams import RunningContainer as RunningContainer
    from supervisor.context import PluginContext as PluginContext
    from supervisor.errors import Busy as Busy
    from supervisor.errors import ConfigError as ConfigError
    from supervisor.errors import Conflict as Conflict
    from supervisor.errors import DeadlineExceeded as DeadlineExceeded
    from supervisor.errors import DelegationUnresolved as DelegationUnresolved
    from supervisor.errors import Denied as Denied
    from supervisor.errors import DigestMismatch as DigestMismatch
    from supervisor.errors import FormatError as FormatError
    from supervisor.errors import MeasurementHalted as MeasurementHalted
    from supervisor.errors import PluginContractError as PluginContractError
    from supervisor.errors import PolicyDenied as PolicyDenied
    from supervisor.errors import Refusal as Refusal
    from supervisor.errors import RuntimeFailed as RuntimeFailed
    from supervisor.errors import SignatureInvalid as SignatureInvalid
    from supervisor.errors import UnknownItem as UnknownItem
    from supervisor.errors import Untrusted as Untrusted
    from supervisor.events import ContainerExited as ContainerExited
    from supervisor.events import ContainerInvoked as ContainerInvoked
    from supervisor.events import ContainerSignalled as ContainerSignalled
    from supervisor.events import ContainerStarted as ContainerStarted
    from supervisor.events import ContainerStarting as ContainerStarting
    from supervisor.events import Event as Event
    from supervisor.events import EvidenceServed as EvidenceServed
    from supervisor.events import HookFailed as HookFailed
    from supervisor.events import ImageAdmitted as ImageAdmitted
    from supervisor.events import ImageAdmitting as ImageAdmitting
    from supervisor.events import ImageFetched as ImageFetched
    from supervisor.events import LayerFetched as LayerFetched
    from supervisor.events import LayerFreed as LayerFreed
    from supervisor.events import LayerMounted as LayerMounted
    from supervisor.events import LayerProgress as LayerProgress
    from supervisor.events import LayerVerified as LayerVerified
    from supervisor.events import LoadRefused as LoadRefused
    from supervisor.events import MeasurementStopped as MeasurementStopped
    from supervisor.events import PredecessorEnded as PredecessorEnded
    from supervisor.events import Sealed as Sealed
    from supervisor.hookspecs import hookimpl as hookimpl
    from supervisor.operations import AconReport as AconReport
    from supervisor.operations import AdmissionResult as AdmissionResult
    from supervisor.operations import ContainerOperations as ContainerOperations
    from supervisor.operations import ContainerView as ContainerView
    from supervisor.operations import ImageView as ImageView
    from supervisor.operations import LogLine as LogLine
    from supervisor.operations import LogPage as LogPage
    from supervisor.operations import ManifestUpload as ManifestUpload
    from supervisor.operations import Operations as Operations
    from supervisor.proofs import StartReceipt as StartReceipt
    from supervisor.proofs import StoredLayer as StoredLayer
    from supervisor.proofs import VerifiedLayer as VerifiedLayer
    from supervisor.seams import FileBlob as FileBlob
    from supervisor.seams import IdMap as IdMap
    from supervisor.seams import LayerSource as LayerSource
    from supervisor.seams import LayerStore as LayerStore
    from supervisor.seams import LayerUpload as LayerUpload
    from supervisor.seams import QuoteSource as QuoteSource
    from supervisor.seams import Registers as Registers
    from supervisor.seams import RegistryBlob as RegistryBlob
    from supervisor.seams import Rootfs as Rootfs
    from supervisor.verdicts import Allow as Allow
    from supervisor.verdicts import Deny as Deny

_HOMES = {
    "container_seams": (
        "ContainerRuntime",
        "ContainerSpec",
        "ExitStatus",
        "Invocation",
        "InvocationResult",
        "LogSink",
        "PreparedContainer",
        "RunningContainer",
    ),
    "context": ("PluginContext",),
    "errors": (
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
    ),
    "events": (
        "ContainerExited",
        "ContainerInvoked",
        "ContainerSignalled",
        "ContainerStarted",
        "ContainerStarting",
        "Event",
        "EvidenceServed",
        "HookFailed",
        "ImageAdmitted",
        "ImageAdmitting",
        "ImageFetched",
        "LayerFetched",
        "LayerFreed",
        "LayerMounted",
        "LayerProgress",
        "LayerVerified",
        "LoadRefused",
        "MeasurementStopped",
        "PredecessorEnded",
        "Sealed",
    ),
    "hookspecs": ("hookimpl",),
    "operations": (
        "AconReport",
        "AdmissionResult",
        "ContainerOperations",
        "ContainerView",
        "ImageView",
        "LogLine",
        "LogPage",
        "ManifestUpload",
        "Operations",
    ),
    "proofs": ("StartReceipt", "StoredLayer", "VerifiedLayer"),
    "seams": (
        "FileBlob",
        "IdMap",
        "LayerSource",
        "LayerStore",
        "LayerUpload",
        "QuoteSource",
        "RegistryBlob",
        "Registers",
        "Rootfs",
    ),
    "verdicts": ("Allow", "Deny"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)  # noqa: PLE0605 - the table above is the one list


def __getattr__(name: str) -> object:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'supervisor' has no attribute {name!r}")
    return getattr(importlib.import_module(f"supervisor.{home}"), name)
