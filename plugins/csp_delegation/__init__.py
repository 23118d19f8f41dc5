"""Who may sign which layer: supplies alias statements, and judges starts that rely on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import msgspec

from plugins.csp_delegation.rules import DelegationRules
from supervisor import Allow, Deny, hookimpl
from supervisor.formats.delegation import statements_of

if TYPE_CHECKING:
    from supervisor import ContainerStarting, PluginContext
    from supervisor.formats.delegation import AliasStatement
    from supervisor.formats.signature import SignedManifest


class CspDelegation:
    """ACON's alias manifests as delegation statements, within what the operator allows."""

    class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
        """`signers`: `HASH/SIGNER` ids; none means every signer that a manifest names.

        `minimum_svn`: by `HASH/SIGNER/NAME`; a layer of that name must have at least this SVN.
        """

        signers: tuple[str, ...] = ()
        minimum_svn: dict[str, Annotated[int, msgspec.Meta(ge=0)]] = {}

    def __init__(self, config: Config, context: PluginContext) -> None:
        self._rules = DelegationRules(config.signers, config.minimum_svn)

    @hookimpl
    async def delegation_statements(self, signed: SignedManifest) -> tuple[AliasStatement, ...]:
        # All of them, also those of signers that are not allowed: the verifier resolves over
        # all statements too, and both must come to the same layers. `judge_start` refuses.
        return statements_of(signed)

    @hookimpl
    async def judge_start(self, event: ContainerStarting) -> Allow | Deny:
        reasons = self._rules.objections(event.layers)
        return Deny("; ".join(reasons)) if reasons else Allow()
