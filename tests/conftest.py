"""What all tests share: where the real data is, and nothing that hides a missing piece."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says something about the machine, not about the code.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")

pytest_plugins = [
    "acon_fixtures",
    "image_store_fixtures",
    "integration_fixtures",
    "registry_fixtures",
    "verifier_fixtures",
]

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needing_root = [item for item in items if item.get_closest_marker("root")]
    reason = why_no_containers() if needing_root else None
    if reason is not None:
        for item in needing_root:
            item.add_marker(pytest.mark.skip(reason=reason))


def why_no_containers() -> str | None:
    """Why containers cannot be made here (no root, an unprivileged container, a chroot)."""
    if os.geteuid() != 0:
        return "needs root"
    trial = ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork", "true"]
    for words in (["unshare", "--mount", "true"], trial):
        tried = subprocess.run(words, capture_output=True, text=True, timeout=60)
        if tried.returncode != 0:
            return f"needs namespaces and mounts: {' '.join(words)}: {tried.stderr.strip()}"
    return None


@pytest.fixture(scope="session")
def vectors() -> Path:
    """Real quotes, logs and manifests beside the checkout; see CONTRIBUTING."""
    folder = Path(os.environ.get("ACON_VECTORS", REPOSITORY.parent / "shared" / "vectors"))
    if not folder.is_dir():
        pytest.skip("the real data (shared/vectors beside the checkout, or ACON_VECTORS) is absent")
    return folder
