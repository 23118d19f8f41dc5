"""What is sent to a registry, in pieces, again after a failure, and what stays as it was."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio
from acon_helpers import MemoryBar
from honest_registry import OCI_INDEX, Reply, Request
from hostile_registry import HostileRegistry, answered, hostile_registry

from acon.images import push as push_module
from acon.images.artifact import ArtifactBlob
from acon.images.documents import OCI_MANIFEST, Descriptor
from acon.images.push import RegistryPush
from acon.images.registry import fallback_tag
from plugins.image_store.registry.client import RegistryClient
from plugins.image_store.registry.credentials import load_credentials
from plugins.image_store.registry.patience import Patience
from supervisor.errors import Conflict, RuntimeFailed
from supervisor.seams import FileBlob

REPOSITORY = "team/app"
SUBJECT = f"sha256:{'5' * 64}"
DEADLINE_S = 20
HASTY = Patience(attempts=2, first_pause_s=0.01, longest_pause_s=0.02)


@asynccontextmanager
async def pushing() -> AsyncIterator[tuple[HostileRegistry, RegistryPush]]:
    with trio.fail_after(DEADLINE_S):
        async with (
            hostile_registry() as registry,
            RegistryClient(
                registry.name, registry.config, load_credentials(None), patience=HASTY
            ) as client,
        ):
            yield registry, RegistryPush(client, REPOSITORY)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push_module, "_SETTLE_S", 0.03)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(push_module, "PIECE_BYTES", 1000)
    return 1000


def file_of(folder: Path, data: bytes, *, before: bytes = b"", after: bytes = b"") -> FileBlob:
    path = folder / "archive"
    path.write_bytes(before + data + after)
    return FileBlob(
        file=str(path), offset_bytes=len(before), size_bytes=len(data), media_type="any"
    )


def methods(registry: HostileRegistry) -> list[str]:
    return [request.method for request in registry.requests]


async def test_a_part_of_a_file_is_sent_in_pieces_of_a_bounded_size(
    small_pieces: int, tmp_path: Path
) -> None:
    data = bytes(range(256)) * 13
    source = file_of(tmp_path, data, before=b"before", after=b"after")
    bar = MemoryBar()
    async with pushing() as (registry, push):
        digest = ArtifactBlob("any", data).descriptor().digest
        await push.file(source, digest, bar)
        assert registry.contents.blobs == {digest: data}
        assert methods(registry) == ["HEAD", "POST", "PATCH", "PATCH", "PATCH", "PATCH", "PUT"]
        assert max(len(request.body) for request in registry.requests) == small_pieces
        assert bar.reached == [0, 1000, 2000, 3000, len(data), len(data)]
        assert push.sent_bytes == len(data)


async def test_what_is_there_already_is_not_sent_again(tmp_path: Path) -> None:
    async with pushing() as (registry, push):
        blob = ArtifactBlob("any", b"here already")
        registry.contents.add_blob(blob.data)
        await push.blob(blob)
        await push.file(file_of(tmp_path, blob.data), blob.descriptor().digest, MemoryBar())
        assert methods(registry) == ["HEAD", "HEAD"]
        assert push.sent_bytes == 0


async def test_a_blob_whose_transfer_breaks_is_sent_anew_and_the_broken_one_deleted(
    small_pieces: int, tmp_path: Path
) -> None:
    data = b"x" * 3500
    async with pushing() as (registry, push):
        registry.misbehave(answered(500), on="/uploads/1", method="PATCH", times=1)
        digest = ArtifactBlob("any", data).descriptor().digest
        await push.file(file_of(tmp_path, data), digest, MemoryBar())
        assert registry.contents.blobs == {digest: data}
        assert methods(registry).count("POST") == 2
        assert registry.contents.uploads == {}


async def test_a_registry_that_keeps_failing_is_given_up_with_what_it_said(
    small_pieces: int, tmp_path: Path
) -> None:
    async with pushing() as (registry, push):
        registry.misbehave(answered(500, "DISK_FULL"), on="/uploads/", method="PATCH")
        digest = ArtifactBlob("any", b"x" * 3500).descriptor().digest
        with pytest.raises(RuntimeFailed) as caught:
            await push.file(file_of(tmp_path, b"x" * 3500), digest, MemoryBar())
        assert "DISK_FULL" in str(caught.value.actual)
        assert registry.contents.uploads == {}


async def test_a_push_that_is_cancelled_leaves_no_upload_behind(
    small_pieces: int, tmp_path: Path
) -> None:
    data = b"x" * 5000
    async with pushing() as (registry, push):
        source = file_of(tmp_path, data)
        with trio.CancelScope() as scope:
            bar = MemoryBar(lambda done: scope.cancel() if done >= 2000 else None)
            await push.file(source, ArtifactBlob("any", data).descriptor().digest, bar)
        assert scope.cancelled_caught
        assert methods(registry)[-1] == "DELETE"
        assert registry.contents.uploads == {}
        assert registry.contents.blobs == {}


async def test_a_registry_that_lists_referrers_is_believed(tmp_path: Path) -> None:
    subject = {"mediaType": OCI_MANIFEST, "digest": SUBJECT, "size": 2}
    manifest = ArtifactBlob(OCI_MANIFEST, json.dumps({"subject": subject}).encode())
    async with pushing() as (registry, push):
        assert await push.manifest(manifest) is True
        registry.contents.referrers_api = False
        assert await push.manifest(manifest) is False


def entry(letter: str) -> Descriptor:
    return Descriptor(media_type=OCI_MANIFEST, digest=f"sha256:{letter * 64}", size=10)


def listed(registry: HostileRegistry) -> list[str]:
    manifest = registry.contents.manifest(REPOSITORY, fallback_tag(SUBJECT))
    assert manifest is not None
    return [one["digest"] for one in json.loads(manifest.body)["manifests"]]


async def test_of_several_who_list_something_at_the_same_time_nobody_gets_lost() -> None:
    async with pushing() as (registry, push):
        entries = [entry(letter) for letter in "abcde"]
        async with trio.open_nursery() as nursery:
            for one in entries:
                nursery.start_soon(push.list_as_referrer, SUBJECT, one)
        assert sorted(listed(registry)) == sorted(one.digest for one in entries)


async def test_what_overwrote_an_entry_is_kept_and_the_entry_written_again() -> None:
    other = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry("b")]}

    async with pushing() as (registry, push):

        def overwrite(_request: Request, reply: Reply) -> Reply:
            registry.contents.add_manifest(
                REPOSITORY,
                msgspec.json.encode(other),
                tag=fallback_tag(SUBJECT),
                media_type=OCI_INDEX,
            )
            return reply

        registry.misbehave(overwrite, on="/manifests/", method="PUT", times=1)
        assert await push.list_as_referrer(SUBJECT, entry("a")) == fallback_tag(SUBJECT)
        assert listed(registry) == [entry("b").digest, entry("a").digest]


async def test_a_list_that_others_keep_overwriting_is_given_up() -> None:
    async with pushing() as (registry, push):
        registry.misbehave(
            lambda _request, _reply: Reply(status=201), on="/manifests/", method="PUT"
        )
        registry.misbehave(answered(404), on="/manifests/", method="GET")
        with pytest.raises(Conflict):
            await push.list_as_referrer(SUBJECT, entry("a"))


async def test_a_registry_that_says_that_the_list_changed_is_heeded() -> None:
    async with pushing() as (registry, push):
        registry.misbehave(
            lambda _request, _reply: Reply(status=412), on="/manifests/", method="PUT", times=2
        )
        await push.list_as_referrer(SUBJECT, entry("a"))
        assert listed(registry) == [entry("a").digest]
