"""The client against a registry that others wrote: Debian's `docker-registry`."""

from __future__ import annotations

import hashlib
import json

import pytest
from local_registry import LocalRegistry
from registry_client_rig import DATA, REPOSITORY, downloaded

from plugins.image_store.config import RegistryConfig
from plugins.image_store.registry.client import RegistryAnswer, RegistryClient
from plugins.image_store.registry.credentials import Credentials, load_credentials
from supervisor import Denied, UnknownItem

DIGEST = f"sha256:{hashlib.sha256(DATA).hexdigest()}"


def client_for(registry: LocalRegistry, credentials: Credentials | None = None) -> RegistryClient:
    config = RegistryConfig(ca_file=None if registry.ca_file is None else str(registry.ca_file))
    logins = load_credentials(registry.auth_file) if credentials is None else credentials
    return RegistryClient(registry.name, config, logins)


async def pushed(client: RegistryClient, *, halves: bool) -> None:
    async def push(method: str, path: str, content: bytes | None, status: int) -> RegistryAnswer:
        return await client.call(
            method,
            path,
            repository=REPOSITORY,
            actions="pull,push",
            content=content,
            statuses=frozenset({status}),
        )

    upload = await push("POST", f"/v2/{REPOSITORY}/blobs/uploads/", None, 202)
    location, rest = upload.headers["location"], DATA
    if halves:
        patched = await push("PATCH", location, DATA[:500_000], 202)
        location, rest = patched.headers["location"], DATA[500_000:]
    separator = "&" if "?" in location else "?"
    await push("PUT", f"{location}{separator}digest={DIGEST}", rest, 201)


@pytest.mark.parametrize("halves", [False, True])
async def test_a_blob_is_pushed_and_pulled(registry: LocalRegistry, halves: bool) -> None:
    async with client_for(registry) as client:
        await pushed(client, halves=halves)
        assert await downloaded(client, DIGEST) == DATA
        with pytest.raises(UnknownItem) as caught:
            await downloaded(client, "sha256:" + "0" * 64)
        assert str(caught.value.actual).startswith("404 (BLOB_UNKNOWN: ")
        answer = await client.call(
            "GET",
            f"/v2/{REPOSITORY}/blobs/{DIGEST}",
            repository=REPOSITORY,
            headers={"range": "bytes=1000000-"},
            statuses=frozenset({206}),
        )
        assert answer.body == DATA[1_000_000:]
        assert answer.headers["content-range"] == f"bytes 1000000-{len(DATA) - 1}/{len(DATA)}"


async def test_a_private_registry_with_tls_wants_its_login(private_registry: LocalRegistry) -> None:
    async with client_for(private_registry, Credentials()) as client:
        with pytest.raises(Denied, match="the registry demands a login"):
            await pushed(client, halves=False)
    async with client_for(private_registry) as client:
        await pushed(client, halves=False)
        assert await downloaded(client, DIGEST) == DATA
        answer = await client.call(
            "PUT",
            f"/v2/{REPOSITORY}/manifests/1",
            repository=REPOSITORY,
            actions="pull,push",
            headers={"content-type": "application/vnd.oci.image.manifest.v1+json"},
            content=json.dumps(
                {
                    "schemaVersion": 2,
                    "mediaType": "application/vnd.oci.image.manifest.v1+json",
                    "config": {
                        "mediaType": "application/vnd.oci.image.config.v1+json",
                        "digest": DIGEST,
                        "size": len(DATA),
                    },
                    "layers": [],
                }
            ).encode(),
            statuses=frozenset({201}),
        )
        assert answer.status == 201
        listed = await client.call("GET", f"/v2/{REPOSITORY}/tags/list", repository=REPOSITORY)
        assert json.loads(listed.body) == {"name": REPOSITORY, "tags": ["1"]}
