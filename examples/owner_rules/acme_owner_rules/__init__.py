"""A plugin by somebody else: denies images by a rule of its own, and counts what happens.

Installed as a package of its own and chosen by configuration alone:

    [plugins]
    order = ["tdx_sim", "image_store", "csp_delegation", "oci_runtime", "http_api",
             "acme_owner_rules"]

    [plugin.acme_owner_rules]
    forbidden_arguments = ["--debug"]
"""

from __future__ import annotations

from collections import Counter

import msgspec

from supervisor import Allow, Deny, Event, ImageAdmitting, PluginContext, hookimpl


class OwnerRulesConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`forbidden_arguments`: an image whose entry point has one of these is denied."""

    forbidden_arguments: tuple[str, ...] = ("--debug",)


class OwnerRules:
    """One gate and one observer."""

    Config = OwnerRulesConfig

    def __init__(self, config: OwnerRulesConfig, context: PluginContext) -> None:
        self._config = config
        self._log = context.log
        self.seen: Counter[str] = Counter()

    @hookimpl
    async def judge_image(self, event: ImageAdmitting) -> Allow | Deny:
        """Deny images that run with a forbidden argument."""
        for argument in event.signed.manifest.entrypoint:
            if argument in self._config.forbidden_arguments:
                return Deny(f"entry point argument {argument!r} is forbidden")
        return Allow()

    @hookimpl
    async def observe(self, event: Event) -> None:
        """Count events by kind, and log each kind's first."""
        kind = type(event).__name__
        self.seen[kind] += 1
        if self.seen[kind] == 1:
            self._log.info("first of its kind", event_kind=kind)
