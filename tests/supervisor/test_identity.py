"""A component's digest covers every installed file, and nothing that Python rewrites."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from supervisor.errors import ConfigError
from supervisor.identity import own_component, package_digest_sha384


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


def test_a_folder_behind_a_link_counts_as_the_link(package: Path, tmp_path: Path) -> None:
    before = package_digest_sha384(package)
    (package / "linked").symlink_to(tmp_path)
    assert package_digest_sha384(package) != before


def test_bytecode_caches_do_not_count(package: Path) -> None:
    before = package_digest_sha384(package)
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "x.cpython-311.pyc").write_bytes(b"cache")
    assert package_digest_sha384(package) == before


def test_what_is_neither_file_nor_link_is_refused(package: Path) -> None:
    os.mkfifo(package / "pipe")
    with pytest.raises(ConfigError, match="regular file or a link"):
        package_digest_sha384(package)


def test_the_supervisor_names_itself_with_version_and_digest() -> None:
    component = own_component()
    assert component.role == "supervisor"
    assert component.distribution == "attested-containers"
    assert len(component.digest_sha384) == 96
