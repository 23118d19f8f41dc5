"""A layer's blob as the daemon's configuration lets it be read from a registry."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from plugins.image_store.config import StoreConfig
from plugins.image_store.registry.names import check_repository, parse_blob_digest, parse_registry

if TYPE_CHECKING:
    from supervisor import RegistryBlob


@asynccontextmanager
async def open_registry_blob(
    config: StoreConfig, source: RegistryBlob
) -> AsyncIterator[AsyncIterator[bytes]]:
    """The blob's bytes as stored, exactly `source.size_bytes`; closed with the context.

    Nothing else about them was checked. Raises `Denied` if `config.registries` has no table
    for the registry, `FormatError` for a bad name or digest, `ConfigError` and `FormatError`
    for a bad `registry_auth_file`; the iterator raises as `RegistryClient.call` does. The
    caller sets the deadline.
    """
    # The HTTP client costs time and memory that a daemon without registries need not spend.
    from plugins.image_store.registry.client import RegistryClient, require_table
    from plugins.image_store.registry.credentials import load_credentials

    registry = parse_registry(source.registry, item="source.registry")
    check_repository(source.repository, item="source.repository")
    parse_blob_digest(source.blob_digest, item="source.blob_digest")
    table = require_table(config.registries, registry)
    path = None if config.registry_auth_file is None else Path(config.registry_auth_file)
    credentials = await trio.to_thread.run_sync(load_credentials, path)
    async with (
        RegistryClient(registry, table, credentials, registries=config.registries) as client,
        client.download(
            source.repository, source.blob_digest, size_bytes=source.size_bytes
        ) as chunks,
    ):
        yield chunks
