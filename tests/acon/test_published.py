"""Signed manifests beside an image in a registry that lies, and among what strangers pushed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
import trio
from acon_helpers import MakeSigner, Signer, signed_image
from adversary import with_flipped_bit
from honest_registry import OCI_INDEX, Reply, Request
from hostile_registry import HostileRegistry, answered, endless, flipped, hostile_registry

from acon.errors import UsageError
from acon.images.artifact import (
    ARTIFACT_TYPE,
    SIGNATURE_TYPE,
    SOURCES_TYPE,
    Artifact,
    ArtifactBlob,
    PublishedImage,
    SourceBlob,
    make_artifact,
)
from acon.images.documents import OCI_MANIFEST, Descriptor, Platform
from acon.images.published import MAX_CANDIDATES, choose_published, find_published
from acon.images.registry import RegistryRepository, fallback_tag
from plugins.image_store.registry.client import RegistryClient
from plugins.image_store.registry.credentials import load_credentials
from plugins.image_store.registry.patience import Patience
from supervisor.formats.errors import DigestMismatch, FormatError, SignatureInvalid, Untrusted
from supervisor.formats.signature import SignedManifest
from supervisor.seams import RegistryBlob

NAME = "team/app"
LINUX = Platform("amd64", "linux")
DEADLINE_S = 60
HASTY = Patience(attempts=1, first_pause_s=0.01, longest_pause_s=0.02)
LAYER = f"sha384/{'1' * 96}"
BLOB = SourceBlob(
    blob_digest=f"sha256:{'2' * 64}", media_type="any", size_bytes=10, tar_size_bytes=20
)


class Place:
    """A repository of a hostile registry that holds one image, tagged 1."""

    def __init__(self, registry: HostileRegistry, repository: RegistryRepository) -> None:
        self.registry = registry
        self.repository = repository
        self.warnings: list[str] = []
        self.image = self.manifest({"schemaVersion": 2, "layers": []}, tag="1")

    def manifest(self, content: dict[str, object], *, tag: str | None = None) -> Descriptor:
        """Store an image manifest."""
        empty = ArtifactBlob("application/vnd.oci.image.config.v1+json", b"{}")
        self.registry.contents.add_blob(empty.data)
        config = json.loads(json.dumps({"mediaType": empty.media_type, "size": 2}))
        config["digest"] = empty.descriptor().digest
        raw = json.dumps({"config": config, **content}).encode()
        blob = ArtifactBlob(OCI_MANIFEST, raw)
        self.registry.contents.add_manifest(NAME, raw, tag=tag)
        return blob.descriptor()

    def put_blobs(self, artifact: Artifact) -> None:
        for blob in artifact.blobs:
            self.registry.contents.add_blob(blob.data)

    def put(self, artifact: Artifact) -> Descriptor:
        self.put_blobs(artifact)
        self.registry.contents.add_manifest(NAME, artifact.manifest.data)
        return artifact.listed()

    def publish(self, signed: SignedManifest, subject: Descriptor | None = None) -> Descriptor:
        return self.put(make_artifact(signed, {LAYER: BLOB}, subject or self.image))

    def put_edited(
        self, artifact: Artifact, edit: Callable[[dict[str, object]], object]
    ) -> Descriptor:
        """The artifact with another manifest in place of its own."""
        self.put_blobs(artifact)
        content = json.loads(artifact.manifest.data)
        edit(content)
        raw = json.dumps(content).encode()
        self.registry.contents.add_manifest(NAME, raw)
        return ArtifactBlob(OCI_MANIFEST, raw).descriptor()

    def list_under_fallback_tag(self, *entries: dict[str, object]) -> None:
        self.registry.contents.referrers_api = False
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": list(entries)}
        self.registry.contents.add_manifest(
            NAME,
            json.dumps(index).encode(),
            tag=fallback_tag(self.image.digest),
            media_type=OCI_INDEX,
        )

    async def find(self, tag: str | None = "1", digest: str | None = None) -> list[PublishedImage]:
        named = await self.repository.resolve(tag, digest)
        found = await find_published(
            self.repository, named, wanted=LINUX, item="image", warn=self.warnings.append
        )
        return list(found)


@asynccontextmanager
async def place() -> AsyncIterator[Place]:
    with trio.fail_after(DEADLINE_S):
        async with (
            hostile_registry() as registry,
            RegistryClient(
                registry.name, registry.config, load_credentials(None), patience=HASTY
            ) as client,
        ):
            yield Place(registry, RegistryRepository(client, NAME))


@pytest.fixture
def owner(make_signer: MakeSigner) -> Signer:
    return make_signer("owner")


@pytest.fixture
def signed(owner: Signer) -> SignedManifest:
    return signed_image(owner, layers=[LAYER])


def ids(found: list[PublishedImage]) -> list[str]:
    return [str(one.signed.image_id) for one in found]


async def test_what_the_registry_lists_is_verified_and_its_layers_lie_in_the_repository(
    signed: SignedManifest,
) -> None:
    async with place() as here:
        artifact = here.publish(signed)
        (found,) = await here.find()
        assert found.signed.image_id == signed.image_id
        assert found.artifact == artifact.digest
        assert found.sources == {
            LAYER: RegistryBlob(
                registry=here.registry.name,
                repository=NAME,
                blob_digest=BLOB.blob_digest,
                media_type="any",
                size_bytes=10,
                tar_size_bytes=20,
            )
        }
        assert here.warnings == []


async def test_a_list_under_the_fallback_tag_is_read_where_there_is_no_api(
    signed: SignedManifest,
) -> None:
    async with place() as here:
        listed = here.publish(signed)
        for entry in (
            {"mediaType": OCI_MANIFEST, "digest": listed.digest, "size": listed.size},
            {
                "mediaType": OCI_MANIFEST,
                "digest": listed.digest,
                "size": listed.size,
                "artifactType": ARTIFACT_TYPE,
            },
        ):
            here.list_under_fallback_tag(entry)
            assert ids(await here.find()) == [str(signed.image_id)]


async def test_a_registry_whose_api_lists_nothing_is_asked_for_the_fallback_tag(
    signed: SignedManifest,
) -> None:
    async with place() as here:
        listed = here.publish(signed)
        here.list_under_fallback_tag(
            {"mediaType": OCI_MANIFEST, "digest": listed.digest, "size": listed.size}
        )
        empty = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}
        reply = Reply(
            status=200, headers={"content-type": OCI_INDEX}, body=json.dumps(empty).encode()
        )
        here.registry.misbehave(lambda _request, _reply: reply, on="/referrers/")
        assert ids(await here.find()) == [str(signed.image_id)]


async def test_what_refers_to_the_index_counts_for_the_platforms_image(
    signed: SignedManifest, owner: Signer
) -> None:
    async with place() as here:
        other = here.manifest({"schemaVersion": 2, "layers": [], "annotations": {"x": "y"}})
        entries = [
            {
                "mediaType": OCI_MANIFEST,
                "digest": one.digest,
                "size": one.size,
                "platform": {"os": "linux", "architecture": architecture},
            }
            for one, architecture in ((here.image, "amd64"), (other, "arm64"))
        ]
        raw = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries})
        here.registry.contents.add_manifest(NAME, raw.encode(), tag="many", media_type=OCI_INDEX)
        index = await here.repository.resolve("many", None)
        of_platform, of_index = signed, signed_image(owner, layers=[LAYER], workingDir="/other")
        of_another = signed_image(owner, layers=[LAYER], workingDir="/another")
        here.publish(of_platform, here.image)
        here.publish(of_index, index)
        here.publish(of_another, other)
        assert set(ids(await here.find("many"))) == {
            str(of_platform.image_id),
            str(of_index.image_id),
        }


async def test_a_manifest_that_changes_between_two_requests_cannot_mix_two_images(
    signed: SignedManifest,
) -> None:
    async with place() as here:
        here.publish(signed)
        other = here.manifest({"schemaVersion": 2, "layers": [], "annotations": {"x": "y"}})

        def move(_request: Request, reply: Reply) -> Reply:
            here.registry.contents.tags[NAME, "1"] = other.digest
            return reply

        here.registry.misbehave(move, on="/manifests/1", times=1)
        # What was resolved is what is asked about, whatever the tag says by then.
        assert ids(await here.find()) == [str(signed.image_id)]
        with pytest.raises(SignatureInvalid):
            await here.find()


async def test_a_manifest_that_is_another_than_its_digest_says_is_refused() -> None:
    async with place() as here:
        here.registry.misbehave(flipped(), on="/manifests/")
        with pytest.raises((DigestMismatch, FormatError)):
            await here.find(None, here.image.digest)


async def test_the_type_that_the_registry_says_must_be_the_documents_own() -> None:
    async with place() as here:
        raw = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}).encode()
        here.registry.contents.add_manifest(NAME, raw, tag="2", media_type=OCI_MANIFEST)
        with pytest.raises(FormatError, match="of the type that the registry says"):
            await here.find("2")


def corruptions(signed: SignedManifest, stranger: SignedManifest) -> Iterator[Artifact]:
    """Artifacts of our type that nobody's signature vouches for."""

    def with_part(part: str, data: bytes) -> Artifact:
        subject = Descriptor(media_type=OCI_MANIFEST, digest=f"sha256:{'0' * 64}", size=1)
        artifact = make_artifact(signed, {LAYER: BLOB}, subject)
        blobs = tuple(
            ArtifactBlob(part, data) if blob.media_type == part else blob for blob in artifact.blobs
        )
        content = json.loads(artifact.manifest.data)
        content["layers"] = [
            {
                "mediaType": blob.media_type,
                "digest": blob.descriptor().digest,
                "size": len(blob.data),
            }
            for blob in blobs[1:]
        ]
        raw = json.dumps(content).encode()
        return Artifact(
            manifest=ArtifactBlob(OCI_MANIFEST, raw), blobs=blobs, subject=subject.digest
        )

    yield with_part(SIGNATURE_TYPE, b"")
    yield with_part(SIGNATURE_TYPE, with_flipped_bit(signed.signature, 99))
    yield with_part(SIGNATURE_TYPE, stranger.signature)
    yield with_part("application/pkix-cert", stranger.certificate_der)
    yield with_part("application/pkix-cert", b"no certificate")
    yield with_part(ARTIFACT_TYPE, stranger.manifest_bytes + b" ")
    yield with_part(SOURCES_TYPE, b"[]")
    yield with_part(SOURCES_TYPE, b'{"layers": {"sha384/xyz": {}}}')


async def test_what_is_not_signed_rightly_is_passed_over_with_the_reason(
    signed: SignedManifest, make_signer: MakeSigner
) -> None:
    stranger = signed_image(make_signer("stranger"), layers=[LAYER])
    async with place() as here:
        bad = []
        for artifact in corruptions(signed, stranger):
            refer = {"mediaType": OCI_MANIFEST, "digest": here.image.digest, "size": 1}
            bad.append(
                here.put_edited(artifact, lambda one, to=refer: one.update(subject=to))  # type: ignore[misc]
            )
        with pytest.raises(SignatureInvalid) as caught:
            await here.find()
        assert all(one.digest in str(caught.value.actual) for one in bad)
        assert len(here.warnings) == len(bad) == 8
        here.publish(signed)
        assert ids(await here.find()) == [str(signed.image_id)]
        assert all(any(one.digest in text for text in here.warnings) for one in bad)


async def test_an_artifact_whose_bytes_are_not_its_digests_is_passed_over(
    signed: SignedManifest, owner: Signer
) -> None:
    async with place() as here:
        wrong = here.publish(signed)
        right = signed_image(owner, layers=[LAYER], workingDir="/right")
        here.publish(right)
        here.registry.misbehave(flipped(), on=f"/manifests/{wrong.digest}")
        assert ids(await here.find()) == [str(right.image_id)]
        (warning,) = here.warnings
        assert wrong.digest in warning


async def test_what_is_listed_but_refers_to_another_image_is_passed_over(
    signed: SignedManifest,
) -> None:
    async with place() as here:
        other = here.manifest({"schemaVersion": 2, "layers": [], "annotations": {"x": "y"}})
        listed = here.publish(signed, other)
        here.list_under_fallback_tag(
            {"mediaType": OCI_MANIFEST, "digest": listed.digest, "size": listed.size}
        )
        with pytest.raises(SignatureInvalid, match="must refer to the image"):
            await here.find()


async def test_artifacts_of_other_types_are_nobodys_concern(signed: SignedManifest) -> None:
    async with place() as here:
        subject = {"mediaType": OCI_MANIFEST, "digest": here.image.digest, "size": 1}
        here.manifest({"artifactType": "application/spdx+json", "subject": subject, "layers": []})
        here.publish(signed)
        assert ids(await here.find()) == [str(signed.image_id)]
        assert here.warnings == []


async def test_sources_can_name_no_other_place_and_no_path(owner: Signer) -> None:
    async with place() as here:
        for lie in (
            {"registry": "evil.example", "repository": "x"},
            {"file": "/etc/shadow"},
            {"blob_digest": "sha256:../../../../etc/shadow"},
            {"blob_digest": "https://evil.example/x"},
            {"size_bytes": -1},
        ):
            signed = signed_image(owner, layers=[LAYER])
            honest = make_artifact(signed, {LAYER: BLOB}, here.image)
            plain = {"blob_digest": BLOB.blob_digest, "media_type": "any", "size_bytes": 10}
            sources = ArtifactBlob(
                SOURCES_TYPE, json.dumps({"layers": {LAYER: {**plain, **lie}}}).encode()
            )
            here.registry.contents.add_blob(sources.data)

            def edit(content: dict[str, object], new: ArtifactBlob = sources) -> None:
                layers = content["layers"]
                assert isinstance(layers, list)
                layers[-1] = {
                    "mediaType": SOURCES_TYPE,
                    "digest": new.descriptor().digest,
                    "size": len(new.data),
                }

            here.put_edited(honest, edit)
        with pytest.raises(SignatureInvalid):
            await here.find()
        assert len(here.warnings) == 5


async def test_bodies_without_end_are_cut_off(signed: SignedManifest) -> None:
    async with place() as here:
        here.publish(signed)
        here.registry.misbehave(endless(), on="/blobs/")
        with pytest.raises(SignatureInvalid):
            await here.find()
        here.registry.misbehave(endless(), on="/referrers/")
        with pytest.raises(Untrusted, match="bounded size"):
            await here.find()


async def test_a_blob_that_is_too_large_is_not_even_begun(signed: SignedManifest) -> None:
    async with place() as here:

        def inflate(content: dict[str, object]) -> None:
            layers = content["layers"]
            assert isinstance(layers, list)
            for layer in layers:
                layer["size"] = 1 << 40

        wrong = here.put_edited(make_artifact(signed, {LAYER: BLOB}, here.image), inflate)
        with pytest.raises(SignatureInvalid):
            await here.find()
        (warning,) = here.warnings
        assert wrong.digest in warning and "larger than its limit" in warning


async def test_ten_thousand_referrers_are_refused_without_reading_them(
    signed: SignedManifest,
) -> None:
    async with place() as here:
        listed = here.publish(signed)
        here.list_under_fallback_tag(
            {"mediaType": OCI_MANIFEST, "digest": listed.digest, "size": listed.size},
            *(
                {"mediaType": OCI_MANIFEST, "digest": f"sha256:{number:064x}", "size": 1}
                for number in range(10_000)
            ),
        )
        before = len(here.registry.requests)
        with pytest.raises(FormatError, match="too many artifacts") as caught:
            await here.find()
        assert caught.value.expected == f"{MAX_CANDIDATES} at most"
        assert len(here.registry.requests) - before < 10
        # By its digest it is found as ever.
        assert ids(await here.find(None, listed.digest)) == [str(signed.image_id)]


async def test_a_list_on_pages_without_end_is_cut_off(signed: SignedManifest) -> None:
    async with place() as here:
        here.publish(signed)

        def more(request: Request, reply: Reply) -> Reply:
            link = f'<http://evil.example{request.path}?page=next>; rel="next"'
            return Reply(status=200, headers={**reply.headers, "link": link}, body=reply.body)

        here.registry.misbehave(more, on="/referrers/")
        with pytest.raises(FormatError, match="bounded number"):
            await here.find()
        # Every page was asked for here: wherever the link leads, it is the same registry.
        pages = [one for one in here.registry.requests if "/referrers/" in one.path]
        assert len(pages) == 16


async def test_pages_are_put_together(signed: SignedManifest) -> None:
    async with place() as here:
        here.publish(signed)
        empty = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}

        def split(request: Request, reply: Reply) -> Reply:
            if "page" in request.query:
                return reply
            headers = {**reply.headers, "link": f'<{request.path}?page=2>; rel="next"'}
            return Reply(status=200, headers=headers, body=json.dumps(empty).encode())

        here.registry.misbehave(split, on="/referrers/")
        assert ids(await here.find()) == [str(signed.image_id)]


@pytest.mark.parametrize("status", [400, 404, 405, 406, 501])
async def test_registries_that_know_no_api_say_so_in_many_ways(
    status: int, signed: SignedManifest
) -> None:
    async with place() as here:
        listed = here.publish(signed)
        here.list_under_fallback_tag(
            {"mediaType": OCI_MANIFEST, "digest": listed.digest, "size": listed.size}
        )
        here.registry.misbehave(answered(status), on="/referrers/")
        assert ids(await here.find()) == [str(signed.image_id)]


async def test_the_same_image_published_twice_is_one(signed: SignedManifest, owner: Signer) -> None:
    async with place() as here:
        again = signed_image(owner, layers=[LAYER])
        assert again.image_id == signed.image_id
        assert again.signature != signed.signature
        here.publish(signed)
        here.publish(again)
        assert ids(await here.find()) == [str(signed.image_id)]


async def test_two_images_of_one_signer_need_a_digest_to_choose(
    signed: SignedManifest, owner: Signer
) -> None:
    async with place() as here:
        here.publish(signed)
        second = here.publish(signed_image(owner, layers=[LAYER], workingDir="/second"))
        found = await here.find()
        for signers in ((), (owner.signer_id,)):
            with pytest.raises(UsageError, match="several") as caught:
                choose_published(found, signers, item="image")
            assert second.digest in str(caught.value.actual)
        (one,) = await here.find(None, second.digest)
        assert one.artifact == second.digest
