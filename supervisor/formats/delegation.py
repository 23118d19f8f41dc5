"""Which layer a delegated reference means (ACON image spec 1.0, "Aliases").

An owner may leave a layer to a vendor's key: `signer/HASH/SIGNER/python:2` is whatever
that signer called `python:2` in a manifest of its own. The resolution here is a function
of the statements as a set, so that the verifier can repeat it:

1. Candidates are the targets that the signer gave exactly the alias asked for.
2. Each candidate ranks by the highest SVN that the signer listed for it under that name
   (in any of its manifests); an alias without SVN ranks lowest.
3. The highest wins. Targets that share the highest rank must be one layer.
4. A target that is itself an alias is resolved in turn, `MAX_HOPS` in all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec

from supervisor.formats.digest import Digest
from supervisor.formats.errors import DelegationUnresolved
from supervisor.formats.ids import ImageId, SignerId
from supervisor.formats.references import DelegatedReference, LayerReference, split_alias
from supervisor.formats.signature import SignedManifest

MAX_HOPS = 8


class AliasStatement(msgspec.Struct, frozen=True):
    """`signer` calls `target` by `alias`, in the manifest of `image_id`.

    `digest_sha384` is the hex SHA-384 of the manifest's bytes, whatever hash its id uses.
    """

    signer: SignerId
    alias: str
    target: LayerReference
    image_id: ImageId
    digest_sha384: str


class DelegationHop(msgspec.Struct, frozen=True):
    """One step from a delegated reference toward a layer.

    `reference` is what was asked for, `signer` is `HASH/SIGNER`, `alias` the alias with the
    highest SVN that the signer listed for the chosen target under the same name, `svn` its
    SVN. The statement is a manifest that gave the target the alias asked for; among several
    one that also states `alias`, then the one with the lowest digest.
    """

    reference: str
    signer: str
    alias: str
    svn: int | None
    statement_digest_sha384: str


class ResolvedLayer(msgspec.Struct, frozen=True):
    """A layer's digest, and the hops that led to it; none when it was pinned by digest."""

    digest: Digest
    delegation: tuple[DelegationHop, ...] = ()


def statements_of(signed: SignedManifest) -> tuple[AliasStatement, ...]:
    """What a verified manifest calls layers, its signer speaking."""
    pairs = signed.manifest.content_aliases
    if not pairs:
        return ()
    digest_sha384 = hashlib.sha384(signed.manifest_bytes).hexdigest()
    return tuple(
        AliasStatement(signed.signer, alias, target, signed.image_id, digest_sha384)
        for target, aliases in pairs
        for alias in aliases
    )


def resolve_layers(
    layers: Sequence[LayerReference], statements: Sequence[AliasStatement]
) -> tuple[ResolvedLayer, ...]:
    """Resolve each reference, in order. The order of statements makes no difference.

    Raises `DelegationUnresolved` whose item is the reference that no statement, or no
    unambiguous one, resolves.
    """
    if not any(isinstance(layer, DelegatedReference) for layer in layers):
        # Strangers may have admitted very many statements; who delegates nothing owes them none.
        return tuple(ResolvedLayer(layer) for layer in layers if isinstance(layer, Digest))
    resolver = Resolver(statements)
    return tuple(resolver.layer(layer) for layer in layers)


class _Listed(msgspec.Struct):
    """What one signer lists for one target under one name: alias -> stating manifests."""

    aliases: dict[str, set[str]]

    def best(self, name: str) -> tuple[int, str]:
        """The highest SVN (-1 for none) and its alias."""
        return max((_rank(alias, name), alias) for alias in self.aliases)


def _rank(alias: str, name: str) -> int:
    """The SVN that `alias` gives under `name`; -1 where it gives none."""
    alias_name, svn = split_alias(alias)
    return svn if svn is not None and alias_name == name else -1


class _Resolution(msgspec.Struct):
    """`longest_hops` counts the longest of the chains that had to agree on `layer`.

    Bounding that one, not the chosen one, keeps the outcome a function of the statements.
    """

    layer: ResolvedLayer
    longest_hops: int


class Resolver:
    """Statements in the order of looking them up: for many references among the same ones."""

    def __init__(self, statements: Sequence[AliasStatement]) -> None:
        self._listed: dict[tuple[SignerId, str], dict[LayerReference, _Listed]] = {}
        for statement in statements:
            name, _ = split_alias(statement.alias)
            targets = self._listed.setdefault((statement.signer, name), {})
            listed = targets.setdefault(statement.target, _Listed({}))
            listed.aliases.setdefault(statement.alias, set()).add(statement.digest_sha384)
        # Without it, targets that share a rank would be walked once per path to them.
        self._known: dict[DelegatedReference, _Resolution] = {}

    def layer(self, reference: LayerReference) -> ResolvedLayer:
        """As `resolve_layers` for one reference."""
        if isinstance(reference, Digest):
            return ResolvedLayer(reference)
        return self._resolve(reference, ()).layer

    def _resolve(
        self, reference: DelegatedReference, path: tuple[DelegatedReference, ...]
    ) -> _Resolution:
        """`path` are the references being resolved that led here."""
        if reference in path:
            chain = " -> ".join(str(step) for step in (*path, reference))
            raise DelegationUnresolved(str(path[0]), "aliases must not form a cycle", actual=chain)
        known = self._known.get(reference)
        if len(path) + (1 if known is None else known.longest_hops) > MAX_HOPS:
            raise DelegationUnresolved(
                str(path[0] if path else reference),
                "a chain of aliases must be short",
                expected=f"{MAX_HOPS} hops at most",
            )
        if known is None:
            known = self._known[reference] = self._resolve_unknown(reference, path)
        return known

    def _resolve_unknown(
        self, reference: DelegatedReference, path: tuple[DelegatedReference, ...]
    ) -> _Resolution:
        name, _ = split_alias(reference.alias)
        targets = self._listed.get((reference.signer, name), {})
        # Sorted, so that also what a refusal says does not depend on the statements' order.
        matching = [
            (target, listed)
            for target, listed in sorted(targets.items(), key=lambda pair: str(pair[0]))
            if reference.alias in listed.aliases
        ]
        if not matching:
            raise self._nothing_matches(reference, targets, path)
        highest = max(listed.best(name)[0] for _, listed in matching)
        winners = [
            self._follow(reference, name, target, listed, path)
            for target, listed in matching
            if listed.best(name)[0] == highest
        ]
        digests = sorted({str(winner.layer.digest) for winner in winners})
        if len(digests) > 1:
            raise DelegationUnresolved(
                str(reference),
                "one SVN must mean one layer",
                expected=f"one layer at SVN {'none' if highest < 0 else highest}",
                actual=" and ".join(digests[:4]),
            )
        # The first of the shortest: the most direct statement is the easiest to check.
        chosen = min(winners, key=lambda winner: len(winner.layer.delegation))
        return _Resolution(chosen.layer, max(winner.longest_hops for winner in winners))

    def _follow(
        self,
        reference: DelegatedReference,
        name: str,
        target: LayerReference,
        listed: _Listed,
        path: tuple[DelegatedReference, ...],
    ) -> _Resolution:
        """Where `reference` leads when it means `target`."""
        svn, best_alias = listed.best(name)
        alias = best_alias if svn >= 0 else reference.alias
        stating = listed.aliases[reference.alias]
        hop = DelegationHop(
            reference=str(reference),
            signer=str(reference.signer),
            alias=alias,
            svn=svn if svn >= 0 else None,
            statement_digest_sha384=min(stating & listed.aliases[alias] or stating),
        )
        if isinstance(target, Digest):
            return _Resolution(ResolvedLayer(target, (hop,)), 1)
        rest = self._resolve(target, (*path, reference))
        layer = ResolvedLayer(rest.layer.digest, (hop, *rest.layer.delegation))
        return _Resolution(layer, 1 + rest.longest_hops)

    def _nothing_matches(
        self,
        reference: DelegatedReference,
        targets: dict[LayerReference, _Listed],
        path: tuple[DelegatedReference, ...],
    ) -> DelegationUnresolved:
        others = sorted({alias for listed in targets.values() for alias in listed.aliases})
        led = f" (reached from {path[0]})" if path else ""
        return DelegationUnresolved(
            str(reference),
            f"an image of this signer that lists the alias for a layer must be loaded{led}",
            expected=reference.alias,
            actual=f"only {', '.join(others[:8])}" if others else "no alias of this name",
        )
