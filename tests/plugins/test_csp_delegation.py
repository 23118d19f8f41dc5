"""Statements are supplied whole; starts are judged by signer and SVN."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import structlog
from evidence_factory import lender

from plugins.csp_delegation import CspDelegation
from supervisor import Allow, ConfigError, ContainerStarting, Deny, PluginContext
from supervisor.formats.delegation import DelegationHop, ResolvedLayer, statements_of
from supervisor.formats.digest import Digest

CSP = f"sha384/{'a' * 96}"
OTHER = f"sha384/{'b' * 96}"
LAYER = Digest("sha384", "0" * 96)


def plugin(**settings: object) -> CspDelegation:
    context = PluginContext(
        name="csp_delegation",
        runtime_dir=Path(),
        log=structlog.stdlib.get_logger(),
        report=lambda event: None,
    )
    return CspDelegation(msgspec.convert(settings, CspDelegation.Config), context)


def hop(signer: str = CSP, alias: str = "python:3", svn: int | None = 3) -> DelegationHop:
    return DelegationHop(
        reference=f"signer/{signer}/python:2",
        signer=signer,
        alias=alias,
        svn=svn,
        statement_digest_sha384="c" * 96,
    )


def starting(*chains: tuple[DelegationHop, ...]) -> ContainerStarting:
    return ContainerStarting(
        image_id=f"{OTHER}/{'d' * 96}",
        layers=tuple(ResolvedLayer(LAYER, chain) for chain in chains),
        argv=("/app",),
        environment=(),
    )


async def test_every_alias_of_a_signed_image_is_a_statement() -> None:
    image = lender("csp", str(LAYER), "python:2", "python:3")
    statements = await plugin(signers=[OTHER]).delegation_statements(image)
    assert statements == statements_of(image)
    assert [statement.alias for statement in statements] == ["python:2", "python:3"]
    assert {statement.signer for statement in statements} == {image.signer}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"signers": [CSP]},
        {"signers": [OTHER, CSP], "minimum_svn": {f"{CSP}/python": 3}},
        {"minimum_svn": {f"{OTHER}/python": 9, f"{CSP}/busybox": 9}},
    ],
)
async def test_a_delegation_within_the_rules_is_allowed(settings: dict[str, object]) -> None:
    event = starting((), (hop(),))
    assert await plugin(**settings).judge_start(event) == Allow()


async def test_pinned_layers_are_never_objected_to() -> None:
    strict = plugin(signers=[OTHER], minimum_svn={f"{CSP}/python": 9})
    assert await strict.judge_start(starting((), ())) == Allow()


async def test_a_signer_that_is_not_allowed_is_denied_by_name() -> None:
    verdict = await plugin(signers=[OTHER]).judge_start(starting((hop(),)))
    assert isinstance(verdict, Deny)
    for part in (f"signer/{CSP}/python:2", f"signer {CSP}", "alias python:3", "SVN 3"):
        assert part in verdict.reason


@pytest.mark.parametrize(
    ("alias", "svn"), [("python:3", 3), ("python", None)], ids=["too low", "none at all"]
)
async def test_an_svn_below_the_minimum_is_denied(alias: str, svn: int | None) -> None:
    rules = plugin(minimum_svn={f"{CSP}/python": 4})
    verdict = await rules.judge_start(starting((hop(alias=alias, svn=svn),)))
    assert isinstance(verdict, Deny)
    assert "at least 4" in verdict.reason
    assert f"alias {alias}" in verdict.reason


async def test_every_hop_of_every_layer_is_judged() -> None:
    event = starting((hop(CSP), hop(OTHER, "base:1", 1)), (), (hop(OTHER, "tls:7", 7),))
    verdict = await plugin(signers=[CSP]).judge_start(event)
    assert isinstance(verdict, Deny)
    assert "alias base:1" in verdict.reason
    assert "alias tls:7" in verdict.reason
    assert "alias python:3" not in verdict.reason


@pytest.mark.parametrize(
    ("settings", "item"),
    [
        ({"signers": [CSP, "sha384/short"]}, "plugin.csp_delegation.signers[1]"),
        ({"signers": ["python"]}, "plugin.csp_delegation.signers[0]"),
        ({"minimum_svn": {CSP: 1}}, f"plugin.csp_delegation.minimum_svn.{CSP}"),
        ({"minimum_svn": {f"{CSP}/": 1}}, f"plugin.csp_delegation.minimum_svn.{CSP}/"),
        ({"minimum_svn": {f"{CSP}/python:2": 1}}, "plugin.csp_delegation.minimum_svn."),
        ({"minimum_svn": {"python": 1}}, "plugin.csp_delegation.minimum_svn.python"),
    ],
)
def test_a_rule_that_could_never_match_is_a_config_error(
    settings: dict[str, object], item: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        plugin(**settings)
    assert caught.value.item.startswith(item)


def test_a_negative_svn_is_refused_when_the_table_is_read() -> None:
    with pytest.raises(msgspec.ValidationError):
        plugin(minimum_svn={f"{CSP}/python": -1})
