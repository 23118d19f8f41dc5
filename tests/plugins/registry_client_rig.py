"""Clients for registries in this process, with a patience that tests can watch."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import trio
from hostile_registry import HostileRegistry

from plugins.image_store.config import RegistryConfig
from plugins.image_store.registry.client import RegistryClient
from plugins.image_store.registry.credentials import Credentials, load_credentials
from plugins.image_store.registry.patience import Patience

REPOSITORY = "team/app"
DATA = bytes(range(256)) * 4096  # a megabyte
# Short pauses, so that a test of many attempts takes no time.
HASTY = Patience(attempts=3, first_pause_s=0.01, longest_pause_s=0.05)
# Also for those who must give up waiting; on a busy machine it may give up too soon.
BRISK = msgspec.structs.replace(HASTY, read_timeout_s=0.4, slow_timeout_s=0.4)


@asynccontextmanager
async def client_of(
    registry: HostileRegistry,
    *,
    config: RegistryConfig | None = None,
    credentials: Credentials | None = None,
    registries: Mapping[str, RegistryConfig] | None = None,
    patience: Patience = HASTY,
) -> AsyncIterator[RegistryClient]:
    """It must be done within half a minute."""
    with trio.fail_after(30):
        async with RegistryClient(
            registry.name,
            registry.config if config is None else config,
            Credentials() if credentials is None else credentials,
            registries=registries,
            patience=patience,
        ) as client:
            yield client


async def downloaded(client: RegistryClient, digest: str, *, size_bytes: int = len(DATA)) -> bytes:
    got = bytearray()
    async with client.download(REPOSITORY, digest, size_bytes=size_bytes) as chunks:
        async for chunk in chunks:
            got += chunk
    return bytes(got)


def logins(path: Path, *registries: HostileRegistry, **fields: str) -> Credentials:
    """A credentials file for these registries: their own users, or other `fields`."""
    path.write_text(json.dumps({"auths": {one.name: fields or _entry(one) for one in registries}}))
    return load_credentials(path)


def _entry(registry: HostileRegistry) -> dict[str, str]:
    pair = f"{registry.user}:{registry.password}".encode()
    return {"auth": base64.b64encode(pair).decode()}
