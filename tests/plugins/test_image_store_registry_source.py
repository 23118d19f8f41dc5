"""What the daemon's configuration lets a layer be read from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hostile_registry import HostileRegistry, hostile_registry
from registry_client_rig import DATA, REPOSITORY
from tls_files import make_tls_files

from plugins.image_store.config import RegistryConfig, StoreConfig
from plugins.image_store.registry.source import open_registry_blob
from supervisor import ConfigError, Denied, RegistryBlob
from supervisor.formats.errors import FormatError

GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"


def source_at(registry: str, digest: str, *, repository: str = REPOSITORY) -> RegistryBlob:
    return RegistryBlob(
        registry=registry,
        repository=repository,
        blob_digest=digest,
        media_type=GZIP,
        size_bytes=len(DATA),
    )


async def read(config: StoreConfig, source: RegistryBlob) -> bytes:
    async with open_registry_blob(config, source) as chunks:
        return b"".join([chunk async for chunk in chunks])


def filled(registry: HostileRegistry) -> RegistryBlob:
    return source_at(registry.name, registry.contents.add_blob(DATA))


@pytest.mark.parametrize("table", ["own", "*"])
async def test_a_registry_with_a_table_is_read(table: str) -> None:
    async with hostile_registry() as registry:
        name = registry.name if table == "own" else table
        config = StoreConfig(registries={name: RegistryConfig()})
        assert await read(config, filled(registry)) == DATA


async def test_a_registry_without_a_table_is_denied_and_never_asked() -> None:
    async with hostile_registry() as registry:
        source = filled(registry)
        for tables in ({}, {"registry.example.org": RegistryConfig()}):
            with pytest.raises(Denied) as caught:
                await read(StoreConfig(registries=tables), source)
            assert caught.value.item == "registry"
            assert "(registries)" in caught.value.rule
            assert caught.value.expected == (", ".join(tables) or "none configured")
            assert caught.value.actual == registry.name
        assert registry.connections == 0


async def test_the_own_table_goes_before_that_of_all_others(tmp_path: Path) -> None:
    files = make_tls_files(tmp_path, "127.0.0.1")
    async with hostile_registry(tls=files) as registry:
        config = StoreConfig(registries={"*": RegistryConfig(), registry.name: registry.config})
        assert await read(config, filled(registry)) == DATA


async def test_the_login_comes_from_the_configured_file_at_each_transfer(tmp_path: Path) -> None:
    auth_file = tmp_path / "config.json"
    async with hostile_registry() as registry:
        registry.demand = "basic"
        config = StoreConfig(
            registries={registry.name: RegistryConfig()}, registry_auth_file=str(auth_file)
        )
        source = filled(registry)
        with pytest.raises(ConfigError) as caught:
            await read(config, source)
        assert caught.value.item == str(auth_file)
        auth_file.write_text("{}")
        with pytest.raises(Denied, match="the registry demands a login"):
            await read(config, source)
        login = {"username": registry.user, "password": registry.password}
        auth_file.write_text(json.dumps({"auths": {registry.name: login}}))
        assert await read(config, source) == DATA


@pytest.mark.parametrize(
    ("source", "item"),
    [
        (source_at("https://registry.example.org", "sha256:" + "0" * 64), "source.registry"),
        (source_at("r.example.org", "sha256:0"), "source.blob_digest"),
        (source_at("r.example.org", "sha256:" + "0" * 64, repository="../x"), "source.repository"),
    ],
)
async def test_bad_names_are_refused_by_their_field(source: RegistryBlob, item: str) -> None:
    with pytest.raises(FormatError) as caught:
        await read(StoreConfig(registries={"*": RegistryConfig()}), source)
    assert caught.value.item == item


def test_a_daemon_without_registries_does_not_load_the_http_client() -> None:
    script = (
        "import sys, plugins.image_store.registry.source\n"
        "print(sorted({'httpx', 'httpcore'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
