"""What all tests share: where the real data is, and nothing that hides a missing piece."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest_plugins = ["acon_fixtures", "verifier_fixtures"]

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def vectors() -> Path:
    """Real quotes, logs and manifests beside the checkout; see CONTRIBUTING."""
    folder = Path(os.environ.get("ACON_VECTORS", REPOSITORY.parent / "shared" / "vectors"))
    if not folder.is_dir():
        pytest.skip("the real data (shared/vectors beside the checkout, or ACON_VECTORS) is absent")
    return folder
