"""Machines in memory, and the images and layers that tests load into them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import trio
import trio.testing

from supervisor import (
    Allow,
    Event,
    FileBlob,
    LoadRefused,
    ManifestUpload,
    PluginContext,
    hookimpl,
)
from supervisor.formats.delegation import AliasStatement, statements_of
from supervisor.formats.digest import Digest, digest_of
from supervisor.formats.signature import SignedManifest
from supervisor.plugin_host import LoadedPlugin
from supervisor.service import Supervisor
from supervisor.testing import (
    InMemory,
    InMemoryConfig,
    MemoryLayers,
    Owner,
    in_memory_plugin,
    manifest,
    plugin,
)

OWNER, VENDOR = Owner("owner"), Owner("vendor")
TAR = b"bytes of a layer"
LAYER = digest_of("sha384", TAR)
ONE, TWO, THREE = (digest_of("sha384", name) for name in (b"one", b"two", b"three"))
PYTHON = f"signer/{VENDOR.signer}/python:1"


class Delegation:
    """Statements from manifests, as `csp_delegation` supplies them; keeps refusals it hears."""

    Config = InMemoryConfig

    def __init__(self, config: InMemoryConfig, context: PluginContext) -> None:
        self.refused: list[LoadRefused] = []

    @hookimpl
    async def delegation_statements(self, signed: SignedManifest) -> tuple[AliasStatement, ...]:
        return statements_of(signed)

    @hookimpl
    async def observe(self, event: Event) -> None:
        if isinstance(event, LoadRefused):
            self.refused.append(event)


class SlowGate(Delegation):
    @hookimpl
    async def verify_layer(self) -> Allow:
        await trio.sleep(3)
        return Allow()


def machine_in(folder: Path, **blobs: bytes) -> tuple[MemoryLayers, list[LoadedPlugin]]:
    """A machine whose store finds `blobs` by the digest "sha256:NAME"."""
    machine = in_memory_plugin(folder)
    assert isinstance(machine.plugin, InMemory)
    store = machine.plugin.layers
    store.blobs = {f"sha256:{name}": data for name, data in blobs.items()}
    return store, [machine, plugin(Delegation, folder)]


def blob(name: str, *, tar_size_bytes: int | None = None) -> FileBlob:
    return FileBlob(
        file=f"/{name}",
        blob_digest=f"sha256:{name}",
        media_type="tar",
        size_bytes=1,
        tar_size_bytes=tar_size_bytes,
    )


def app(*layers: object, name: str = "app:1") -> ManifestUpload:
    return OWNER.sign(manifest(name=name, layers=[str(layer) for layer in layers], maxInstances=0))


def vendor_image(layer: Digest, *names: str, env: Sequence[str] = ()) -> ManifestUpload:
    """An image that only lends its layer, under these names."""
    aliases = {"contents": {str(layer): list(names)}}
    return VENDOR.sign(
        manifest(name="v:1", layers=[str(layer)], entrypoint=[], aliases=aliases, env=list(env))
    )


async def admit(supervisor: Supervisor, *group: ManifestUpload) -> str:
    return (await supervisor.admit(group)).image_ids[0]


async def deliver(supervisor: Supervisor, tar: bytes, *, announced: bool = True) -> None:
    digest = digest_of("sha384", tar)
    upload = await supervisor.upload_layer(digest, size_bytes=len(tar) if announced else None)
    await upload.write(tar)
    await supervisor.finish_layer(digest, upload)
