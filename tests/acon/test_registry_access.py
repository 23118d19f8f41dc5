"""Where logins for registries are looked for, when nobody says."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from acon.arguments import RegistryAccess, add_registry_options, registry_access


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "DOCKER_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def access(*words: str) -> RegistryAccess:
    parser = argparse.ArgumentParser()
    add_registry_options(parser)
    return registry_access(parser.parse_args(words))


def test_without_any_file_registries_are_asked_anonymously_over_tls() -> None:
    assert access() == RegistryAccess(auth_file=None, ca_file=None, plain_http=False)


def test_the_options_are_taken_as_they_are() -> None:
    given = access("--authfile", "a.json", "--registry-ca", "ca.pem", "--plain-http")
    assert given == RegistryAccess(Path("a.json"), Path("ca.pem"), plain_http=True)


def test_files_are_looked_for_where_podman_and_docker_keep_them(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each place counts only where none before it has a file."""

    def put(path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
        return path

    docker = put(home / ".docker" / "config.json")
    assert access().auth_file == docker
    monkeypatch.setenv("DOCKER_CONFIG", str(home / "elsewhere"))
    assert access().auth_file is None
    elsewhere = put(home / "elsewhere" / "config.json")
    assert access().auth_file == elsewhere
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(home / "run"))
    assert access().auth_file == elsewhere
    podman = put(home / "run" / "containers" / "auth.json")
    assert access().auth_file == podman
    # A file that is named must be there: whoever reads it says so.
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(home / "absent.json"))
    assert access().auth_file == home / "absent.json"
    assert access("--authfile", "given.json").auth_file == Path("given.json")
