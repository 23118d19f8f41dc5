"""Somebody else's plugin: installed as a package of its own and chosen by config alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from supervisor import Denied
from supervisor.testing import Owner, in_memory_plugin, manifest, plugin, running

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "examples" / "owner_rules"

CONFIG = """
runtime_dir = "{runtime_dir}"
[plugins]
order = ["tdx_sim", "acme_owner_rules"]
[plugin.acme_owner_rules]
forbidden_arguments = ["--shell"]
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package in a folder of its own, put on the path as an installation would."""
    folder = tmp_path_factory.mktemp("installed")
    source = tmp_path_factory.mktemp("source") / "owner_rules"
    shutil.copytree(PACKAGE, source)  # pip builds beside the sources
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, *offline, "--target", str(folder), str(source)], check=True)
    return folder


def acond(installed: Path | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    if installed is not None:
        environment["PYTHONPATH"] = str(installed)
    return subprocess.run(
        [sys.executable, "-m", "supervisor.daemon", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        check=False,
    )


def test_it_is_found_by_its_entry_point_and_measured(installed: Path, tmp_path: Path) -> None:
    config = tmp_path / "acond.toml"
    config.write_text(CONFIG.format(runtime_dir=tmp_path / "run"))
    done = acond(installed, "--config", str(config), "--print-identity")
    assert done.returncode == 0, done.stderr
    components = {each["name"]: each for each in msgspec.json.decode(done.stdout)["components"]}
    assert components["acme_owner_rules"]["distribution"] == "acme-owner-rules"
    assert components["acme_owner_rules"]["version"] == "1.0.0"
    before = components["acme_owner_rules"]["digest_sha384"]
    module = installed / "acme_owner_rules" / "__init__.py"
    module.write_text(module.read_text() + "\n# changed after installation\n")
    changed = acond(installed, "--config", str(config), "--print-identity")
    after = {each["name"]: each for each in msgspec.json.decode(changed.stdout)["components"]}
    assert after["acme_owner_rules"]["digest_sha384"] != before
    assert after["tdx_sim"] == components["tdx_sim"]


def test_without_being_installed_it_is_refused_by_name(tmp_path: Path) -> None:
    config = tmp_path / "acond.toml"
    config.write_text(CONFIG.format(runtime_dir=tmp_path / "run"))
    done = acond(None, "--config", str(config), "--print-identity")
    assert done.returncode == 2
    assert "acme_owner_rules" in done.stderr


async def test_it_denies_by_its_own_rule_and_observes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(PACKAGE))
    from acme_owner_rules import OwnerRules

    rules = plugin(OwnerRules, tmp_path, table={"forbidden_arguments": ["--shell"]})
    owner = Owner("owner")
    async with running([in_memory_plugin(tmp_path), rules], tmp_path) as supervisor:
        with pytest.raises(Denied) as caught:
            await supervisor.admit(
                [owner.sign(manifest(name="app:1", entrypoint=["/app", "--shell"]))]
            )
        assert caught.value.actual == "entry point argument '--shell' is forbidden"
        await supervisor.admit([owner.sign(manifest(name="app:1"))])
    assert isinstance(rules.plugin, OwnerRules)
    assert rules.plugin.seen["ImageAdmitted"] == 1
    assert rules.plugin.seen["LoadRefused"] == 1
