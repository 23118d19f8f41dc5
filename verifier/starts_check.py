"""What was started: recomputed from the manifests, at each start's place in the log."""

from __future__ import annotations

from collections.abc import Sequence

from supervisor.formats.delegation import (
    AliasStatement,
    ResolvedLayer,
    resolve_layers,
    statements_of,
)
from supervisor.formats.environment import resolve_environment
from supervisor.formats.errors import Untrusted
from supervisor.formats.log_events import (
    AdmitImagesEvent,
    LayerDelegation,
    StartContainerEvent,
    start_container_event,
)
from supervisor.formats.signature import SignedManifest
from verifier.images import ImageSet
from verifier.log_check import LOG_ANCHOR
from verifier.log_reading import LogEntry, SupervisorLog
from verifier.verdict import Check, equal, group, judge, unmade

_MANIFEST = "the signed manifest, and the statements admitted before this start"
_Resolved = tuple[ResolvedLayer, ...] | Untrusted


def check_starts(log: SupervisorLog, images: ImageSet) -> Check:
    """Layers, delegations, arguments and environment of every measured start."""
    id, title = "starts", "What was started is what the signed manifests say"
    checks = []
    statements: list[AliasStatement] = []
    # One image is started many times; what its layers are changes only with the statements.
    known: dict[str, _Resolved] = {}
    for entry in log.entries:
        match entry.event:
            case AdmitImagesEvent(image_ids=image_ids):
                for signed in images.of(image_ids):
                    statements += statements_of(signed)
                known.clear()
            case StartContainerEvent() as event:
                signed_or_none = images.get(event.image_id)
                if signed_or_none is not None and event.image_id not in known:
                    known[event.image_id] = _resolved(signed_or_none, statements)
                resolved = known.get(event.image_id)
                checks.append(_start(entry, event, signed_or_none, resolved))
    if not checks:
        return judge(
            id,
            title,
            holds=True,
            expected="every start follows its manifest",
            actual="no container was started",
            anchor=LOG_ANCHOR,
        )
    return group(id, title, checks)


def _resolved(signed: SignedManifest, statements: Sequence[AliasStatement]) -> _Resolved:
    try:
        return resolve_layers(signed.manifest.layers, statements)
    except Untrusted as error:
        return error


def _start(
    entry: LogEntry,
    event: StartContainerEvent,
    signed: SignedManifest | None,
    resolved: _Resolved | None,
) -> Check:
    title = f"Record {entry.position} starts {event.image_id} as its manifest says"
    if signed is None or resolved is None:
        return unmade(
            "starts.container",
            title,
            why="the evidence lacks this image's manifest",
            actual="unknown",
            left_open=False,
        )
    return group(
        "starts.container",
        title,
        [
            *_layers(event, resolved),
            equal(
                "starts.arguments",
                "The program and its arguments are the manifest's entry point",
                expected=_listed(signed.manifest.entrypoint),
                actual=_listed(event.argv),
                anchor=_MANIFEST,
            ),
            _environment(event, signed),
        ],
    )


def _layers(event: StartContainerEvent, resolved: _Resolved) -> list[Check]:
    title = "Each layer is the one that the manifest, and those it delegates to, say"
    if isinstance(resolved, Untrusted):
        return [
            judge(
                "starts.layers",
                title,
                holds=False,
                expected=f"{resolved.item}: {resolved.rule}",
                actual=_listed(event.layers),
                anchor=_MANIFEST,
            )
        ]
    expected = start_container_event(event.image_id, resolved, event.argv, event.environment)
    return [
        equal(
            "starts.layers",
            title,
            expected=_listed(expected.layers),
            actual=_listed(event.layers),
            anchor=_MANIFEST,
        ),
        equal(
            "starts.delegations",
            "Each delegated layer was left to whom, and by what statement, the log says",
            expected=_delegated(expected.delegations),
            actual=_delegated(event.delegations),
            anchor=_MANIFEST,
        ),
    ]


def _environment(event: StartContainerEvent, signed: SignedManifest) -> Check:
    id, title = "starts.environment", "The environment is one that the manifest's rules allow"
    rules = signed.manifest.env
    got = dict(setting.split("=", 1) for setting in event.environment)
    try:
        default = dict(setting.split("=", 1) for setting in resolve_environment(rules, ()))
        # The request that must have led here: whatever differs from the default, with names
        # that the default sets and the container lacks asked to be unset.
        requested = [
            f"{name}={got.get(name, '')}"
            for name in sorted(got.keys() | default.keys())
            if got.get(name) != default.get(name)
        ]
        allowed = resolve_environment(rules, requested)
    except Untrusted as error:
        return judge(
            id,
            title,
            holds=False,
            expected=error.rule + (f": {error.expected}" if error.expected else ""),
            actual=_listed(event.environment),
            anchor=_MANIFEST,
        )
    return equal(
        id,
        title,
        expected=_listed(allowed),
        actual=_listed(event.environment),
        anchor=_MANIFEST,
    )


def _listed(texts: Sequence[str]) -> str:
    # repr keeps ["a b"] and ["a", "b"] apart.
    return ", ".join(repr(text) for text in texts) or "none"


def _delegated(delegations: Sequence[LayerDelegation]) -> str:
    return (
        "; ".join(
            f"layer {delegation.index}: "
            + " then ".join(
                f"{hop.reference!r} is {hop.alias!r} (SVN {hop.svn}) of {hop.signer}, "
                f"statement {hop.statement_digest_sha384}"
                for hop in delegation.hops
            )
            for delegation in delegations
        )
        or "none"
    )
