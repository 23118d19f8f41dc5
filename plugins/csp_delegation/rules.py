"""Which delegations the operator's configuration allows. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from supervisor import ConfigError, Refusal
from supervisor.formats.delegation import DelegationHop, ResolvedLayer
from supervisor.formats.ids import parse_signer_id
from supervisor.formats.references import split_alias

_SETTING = "plugin.csp_delegation"


class DelegationRules:
    """Raises `ConfigError` when made from ids that are none: a rule that cannot match
    would protect nobody.
    """

    def __init__(self, signers: Sequence[str], minimum_svn: Mapping[str, int]) -> None:
        for index, signer in enumerate(signers):
            _check_signer(signer, item=f"{_SETTING}.signers[{index}]")
        for key in minimum_svn:
            item = f"{_SETTING}.minimum_svn.{key}"
            signer, slash, name = key.rpartition("/")
            if not slash or not name or split_alias(name)[1] is not None:
                raise ConfigError(item, "is written HASH/SIGNER/NAME, without an SVN")
            _check_signer(signer, item=item)
        self._signers = frozenset(signers)
        self._minimum_svn = dict(minimum_svn)

    def objections(self, layers: Sequence[ResolvedLayer]) -> tuple[str, ...]:
        """Why these layers may not be started, one sentence each; none: they may."""
        found = (self._objection(hop) for layer in layers for hop in layer.delegation)
        return tuple(reason for reason in found if reason is not None)

    def _objection(self, hop: DelegationHop) -> str | None:
        svn = "none" if hop.svn is None else str(hop.svn)
        shown = f"{hop.reference}: signer {hop.signer}, alias {hop.alias}, SVN {svn}"
        if self._signers and hop.signer not in self._signers:
            return f"{shown}: the signer is not one that {_SETTING}.signers allows"
        name, _ = split_alias(hop.alias)
        minimum = self._minimum_svn.get(f"{hop.signer}/{name}")
        if minimum is not None and (hop.svn is None or hop.svn < minimum):
            return f"{shown}: the SVN must be at least {minimum} ({_SETTING}.minimum_svn)"
        return None


def _check_signer(text: str, *, item: str) -> None:
    try:
        # To name a signer is to trust nothing: admission decides about SHA-256.
        parse_signer_id(text, item=item, unsafe_allow_sha256=True)
    except Refusal as error:
        raise ConfigError(item, error.rule, expected=error.expected, actual=error.actual) from None
