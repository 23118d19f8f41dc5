"""The ways in which the image store makes layers visible, for tests that hold in each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest


@dataclasses.dataclass
class Chosen:
    """What `image_store_rig.running` uses where a test names nothing itself."""

    mount: str = "auto"


CHOSEN = Chosen()


@pytest.fixture(params=["erofs", "unpack"])
def both_ways(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs with layers mounted through an index, then with layers unpacked."""
    before = CHOSEN.mount
    CHOSEN.mount = request.param
    yield request.param
    CHOSEN.mount = before
