"""A component's digest covers every installed file, and nothing that Python rewrites."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import pytest

from supervisor.errors import ConfigError, PluginContractError
from supervisor.identity import own_component, package_digest_sha384, plugin_component


@pytest.fixture
def package(tmp_path: Path) -> Path:
    root = tmp_path / "package"
    (root / "inner").mkdir(parents=True)
    (root / "__init__.py").write_text("a = 1\n")
    (root / "inner" / "data.json").write_text("{}")
    return root


def test_the_digest_is_the_same_wherever_the_package_lies(package: Path, tmp_path: Path) -> None:
    before = package_digest_sha384(package)
    moved = package.rename(tmp_path / "elsewhere")
    assert package_digest_sha384(moved) == before


def test_a_changed_added_renamed_or_removed_file_changes_it(package: Path) -> None:
    seen = [package_digest_sha384(package)]
    (package / "__init__.py").write_text("a = 2\n")
    seen.append(package_digest_sha384(package))
    (package / "added").write_text("")
    seen.append(package_digest_sha384(package))
    (package / "added").rename(package / "renamed")
    seen.append(package_digest_sha384(package))
    (package / "renamed").unlink()
    (package / "renamed").symlink_to("__init__.py")
    seen.append(package_digest_sha384(package))
    (package / "inner" / "data.json").unlink()
    seen.append(package_digest_sha384(package))
    assert len(set(seen)) == len(seen)


def test_a_folder_behind_a_link_counts_as_the_link(package: Path) -> None:
    before = package_digest_sha384(package)
    (package / "linked").symlink_to("inner")
    assert package_digest_sha384(package) != before


@pytest.mark.parametrize("target", ["../elsewhere", "inner/../../elsewhere.py", "/elsewhere"])
def test_a_link_to_what_is_not_measured_is_refused(package: Path, target: str) -> None:
    (package / "linked").symlink_to(target)
    with pytest.raises(ConfigError, match="measured with it"):
        package_digest_sha384(package)


def test_bytecode_caches_do_not_count(package: Path) -> None:
    before = package_digest_sha384(package)
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "x.cpython-311.pyc").write_bytes(b"cache")
    assert package_digest_sha384(package) == before


def test_a_program_that_only_looks_like_a_bytecode_cache_counts(package: Path) -> None:
    cache = package / "__pycache__"
    cache.mkdir()
    seen = [package_digest_sha384(package)]
    # `import package.hidden`, `package.__pycache__.hidden`, `package.__pycache__.other`
    for path in (package / "hidden.pyc", cache / "hidden.pyc", cache / "other.py"):
        path.write_bytes(b"code that would run")
        seen.append(package_digest_sha384(package))
    assert len(set(seen)) == len(seen)


def test_a_class_cannot_have_another_package_measured_in_its_place() -> None:
    posing = type("Posing", (), {"__module__": "supervisor.formats.digest"})
    distribution = importlib.metadata.distribution("attested-containers")
    with pytest.raises(PluginContractError, match="the package that is measured"):
        plugin_component("posing", "verifier.verify", posing, distribution)


def test_what_is_neither_file_nor_link_is_refused(package: Path) -> None:
    os.mkfifo(package / "pipe")
    with pytest.raises(ConfigError, match="regular file or a link"):
        package_digest_sha384(package)


def test_the_supervisor_names_itself_with_version_and_digest() -> None:
    component = own_component()
    assert component.role == "supervisor"
    assert component.distribution == "attested-containers"
    assert len(component.digest_sha384) == 96
