"""Was a layer left to anyone whom the relying party did not accept?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from supervisor.formats.delegation import (
    AliasStatement,
    DelegationHop,
    resolve_layers,
    statements_of,
)
from supervisor.formats.errors import Untrusted
from supervisor.formats.references import DelegatedReference, split_alias
from verifier.images import ImageSet, satisfies
from verifier.log_check import LOG_ANCHOR
from verifier.log_reading import SupervisorLog
from verifier.policy import DelegationEntry, Policy
from verifier.verdict import Check, group, judge, unmade

_RULE = "delegations"


def check_delegations(log: SupervisorLog, images: ImageSet, policy: Policy) -> Check:
    """Every delegation that was used, and every one that an admitted program could use.

    The second matters because a program that was not started yet may be, and what its
    layers resolve to then is fixed only by the statements admitted by then.
    """
    id, title = "delegations", "Layers are left only to those whom the policy accepts"
    used = [
        (f"record {entry.position}, layer {delegation.index}", hop)
        for entry, event in log.containers
        for delegation in event.delegations
        for hop in delegation.hops
    ]
    possible = list(_possible(log, images))
    if isinstance(policy.delegations, str):
        return unmade(
            id,
            title,
            why='the policy says "unpinned"',
            actual=f"{len(used)} used, {len(possible)} possible",
            left_open=True,
            policy_rule=_RULE,
        )
    accepted = policy.delegations
    checks = [_used(where, hop, accepted) for where, hop in used]
    checks += [_allowed(where, reference, hops, accepted) for where, reference, hops in possible]
    if not checks:
        return judge(
            id,
            title,
            holds=True,
            expected=_described(accepted),
            actual="no layer was left to anyone",
            anchor=LOG_ANCHOR,
            policy_rule=_RULE,
        )
    return group(id, title, checks)


def _used(where: str, hop: DelegationHop, accepted: Sequence[DelegationEntry]) -> Check:
    return judge(
        "delegations.used",
        f"The layer of {where} was left to someone whom the policy accepts",
        holds=_accepts(hop, accepted),
        expected=_described(accepted),
        actual=f"{hop.alias} by {hop.signer} (for {hop.reference})",
        anchor=LOG_ANCHOR,
        policy_rule=_RULE,
    )


def _allowed(
    where: str,
    reference: DelegatedReference,
    hops: Sequence[DelegationHop] | None,
    accepted: Sequence[DelegationEntry],
) -> Check:
    name, _ = split_alias(reference.alias)
    named = any((entry.signer, entry.name) == (str(reference.signer), name) for entry in accepted)
    resolution = (
        "resolved by nobody so far"
        if hops is None
        else " then ".join(f"{hop.alias} by {hop.signer}" for hop in hops)
    )
    return judge(
        "delegations.possible",
        f"The delegated layer of {where} can only come from someone whom the policy accepts",
        holds=named and all(_accepts(hop, accepted) for hop in hops or ()),
        expected=_described(accepted),
        actual=f"{reference}: {resolution}",
        anchor="the signed manifests",
        policy_rule=_RULE,
    )


def _possible(
    log: SupervisorLog, images: ImageSet
) -> Iterator[tuple[str, DelegatedReference, tuple[DelegationHop, ...] | None]]:
    """Each delegated layer of each admitted program, as it would be resolved at the log's end."""
    admitted = images.of(tuple(dict.fromkeys(log.admitted())))
    statements: list[AliasStatement] = [
        statement for signed in admitted for statement in statements_of(signed)
    ]
    for signed in admitted:
        if not signed.manifest.is_executable:
            continue
        for index, layer in enumerate(signed.manifest.layers):
            if not isinstance(layer, DelegatedReference):
                continue
            try:
                hops: tuple[DelegationHop, ...] | None = resolve_layers([layer], statements)[
                    0
                ].delegation
            except Untrusted:
                hops = None
            yield f"{signed.image_id}, layer {index}", layer, hops


def _accepts(hop: DelegationHop, accepted: Sequence[DelegationEntry]) -> bool:
    return any(
        entry.signer == hop.signer and satisfies(hop.alias, entry.name, entry.minimum_svn)
        for entry in accepted
    )


def _described(accepted: Sequence[DelegationEntry]) -> str:
    return " or ".join(str(entry) for entry in accepted) or "no delegation at all"
