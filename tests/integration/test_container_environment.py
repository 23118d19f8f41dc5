"""A container's environment: what the manifest's rules give, told by the program that got it.

The six examples are those of ACON's image specification, "Environment variables".
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from inside_rig import FACTS, look_around
from integration_images import Image, ImageMaker
from integration_machine import Machine, machine_in

from acon.client import Client
from supervisor import PolicyDenied, Refusal

pytestmark = pytest.mark.root

SIGNALS = ("--signal", "15", "--max-instances", "0")
SPECIFIED = "http://proxy.example.com:80/"
ONLY_XYZ, XYZ_OR_UVW, UNSET_OR = (
    ("ABC=xyz",),
    ("ABC=xyz", "ABC=uvw"),
    ("ABC=", "ABC=xyz", "ABC=uvw"),
)
ANY, ANY_WITH_DEFAULT = ("HTTPS_PROXY",), ("HTTPS_PROXY", f"HTTPS_PROXY={SPECIFIED}")
XYZ_OR_UNSET = ("ABC=xyz", "ABC=uvw", "ABC=")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, pki_folder: Path) -> Iterator[Machine]:
    with machine_in(tmp_path_factory.mktemp("environments"), pki_folder) as machine:
        machine.power_on()
        machine.start_daemon()
        yield machine


@pytest.fixture(scope="module")
def environments(daemon: Machine, images: ImageMaker) -> dict[tuple[str, ...], Image]:
    """An image for each of the specification's examples, and two about HOME and PATH."""
    made = {}
    rules: tuple[tuple[str, ...], ...] = (
        (),
        ("HOME=/root", "PATH=/nowhere"),
        ONLY_XYZ,
        XYZ_OR_UVW,
        UNSET_OR,
        ANY,
        ANY_WITH_DEFAULT,
        XYZ_OR_UNSET,
    )
    for number, own in enumerate(rules):
        options = [word for rule in own for word in ("--env", rule)]
        made[own] = images.make(
            f"environment-{number}", FACTS, options=(*SIGNALS, *options), env=()
        )
    daemon.load(*made.values())
    return made


@pytest.mark.parametrize(
    ("rules", "asked", "expected"),
    [
        ((), (), []),
        (("HOME=/root", "PATH=/nowhere"), (), ["HOME=/root", "PATH=/nowhere"]),
        (ONLY_XYZ, (), ["ABC=xyz"]),
        (ONLY_XYZ, ("ABC=xyz",), ["ABC=xyz"]),
        (XYZ_OR_UVW, (), ["ABC=xyz"]),
        (XYZ_OR_UVW, ("ABC=uvw",), ["ABC=uvw"]),
        (UNSET_OR, (), []),
        (UNSET_OR, ("ABC=uvw",), ["ABC=uvw"]),
        (ANY, (), []),
        (ANY, ("HTTPS_PROXY=a=b c\"'$é",), ["HTTPS_PROXY=a=b c\"'$é"]),
        (ANY_WITH_DEFAULT, (), [f"HTTPS_PROXY={SPECIFIED}"]),
        (ANY_WITH_DEFAULT, ("HTTPS_PROXY=http://other",), ["HTTPS_PROXY=http://other"]),
        (XYZ_OR_UNSET, (), ["ABC=xyz"]),
        (XYZ_OR_UNSET, ("ABC=",), []),
    ],
)
def test_the_environment_is_exactly_what_the_six_examples_give(
    daemon: Machine,
    environments: dict[tuple[str, ...], Image],
    rules: tuple[str, ...],
    asked: tuple[str, ...],
    expected: list[str],
) -> None:
    seen = look_around(daemon.start(environments[rules], *asked))
    assert [text for text in seen.facts["environ"].split("\0") if text] == expected
    daemon.acon("signal", seen.view.container_id, 15)


@pytest.mark.parametrize(
    ("rules", "asked"),
    [
        ((), ("LD_PRELOAD=/tmp/evil.so",)),
        ((), ("HOME=/root",)),
        (ONLY_XYZ, ("ABC=uvw",)),
        (ONLY_XYZ, ("ABC=",)),
        (XYZ_OR_UVW, ("ABC=",)),
        (UNSET_OR, ("ABC=rst",)),
        (ANY, ("=x",)),
        (ANY, ("HTTPS_PROXY",)),
        (ANY, ("HTTPS_PROXY=a\nLD_PRELOAD=/tmp/evil.so",)),
        (XYZ_OR_UNSET, ("ABC=rst",)),
    ],
)
def test_an_environment_that_the_rules_do_not_give_is_refused_and_nothing_starts(
    daemon: Machine,
    environments: dict[tuple[str, ...], Image],
    rules: tuple[str, ...],
    asked: tuple[str, ...],
) -> None:
    async def ask(client: Client) -> Refusal | None:
        try:
            await client.start(environments[rules].image_id, asked)
        except Refusal as refusal:
            return refusal
        return None

    before = len(daemon.containers()), daemon.register()
    assert isinstance(daemon.ask(ask), PolicyDenied)
    assert (len(daemon.containers()), daemon.register()) == before
