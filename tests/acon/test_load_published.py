"""`acon load` of images whose signed manifests were published with them, as other people's tools
copy them about."""

from __future__ import annotations

import itertools
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from acon_daemon import Bundles, Daemon
from acon_helpers import Acon, MakeSigner, Signer, tar_of
from local_registry import LocalRegistry
from peers import Skopeo

from acon.images import push
from supervisor.formats.digest import digest_of
from supervisor.seams import FileBlob, RegistryBlob

_NUMBERS = itertools.count()
COMMON, OWN = tar_of({"common": b"c" * 10_000}), tar_of({"app": b"app"})


class Published:
    """An image of two layers whose signed manifest was published with it."""

    def __init__(self, registry: LocalRegistry, repository: str, artifact: str, tag: str) -> None:
        self.registry = registry
        self.repository = repository
        self.artifact = artifact  # docker://HOST/NAME@DIGEST
        self.fallback_tag = tag

    @property
    def reference(self) -> str:
        return self.registry.reference(self.repository)

    @property
    def listing(self) -> str:
        return self.registry.reference(self.repository, self.fallback_tag)


@pytest.fixture
def owner(make_signer: MakeSigner) -> Signer:
    return make_signer("owner")


@pytest.fixture
def publish(
    shared_registry: LocalRegistry,
    acon: Acon,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[Path, str], Published]:
    """In a repository of the test's own, below which another may be."""
    registry, own = shared_registry, f"load/{next(_NUMBERS)}"
    # Nobody else writes there.
    monkeypatch.setattr(push, "_SETTLE_S", 0.01)

    def run(bundle: Path, name: str = "app") -> Published:
        capsys.readouterr()
        repository = f"{own}/{name}"
        reference = registry.reference(repository)
        assert acon("image", "publish", bundle, reference, "--json") == 0
        said = json.loads(capsys.readouterr().out)
        return Published(registry, repository, said["artifact"], said["fallback_tag"])

    return run


@pytest.fixture
def published(bundles: Bundles, owner: Signer, publish: Callable[..., Published]) -> Published:
    return publish(bundles.image("app", owner))


def arrived(daemon: Daemon) -> list[bytes]:
    """The layers' bytes as the daemon got them, lowest first."""
    (image,) = daemon.operations.admitted
    layers = daemon.operations.layers
    return [layers[layer] for layer in image.manifest.layers]  # type: ignore[index]  # all pinned


async def test_what_was_published_is_loaded_and_its_layers_are_sent(
    daemon: Daemon, published: Published, owner: Signer, tmp_path: Path
) -> None:
    assert await daemon.acon("load", published.reference) == 0
    (image,) = daemon.operations.admitted
    assert str(image.signer) == owner.signer_id
    assert arrived(daemon) == [COMMON, OWN]


async def test_a_daemon_that_may_is_told_where_the_layers_are_and_fetches_them(
    daemon: Daemon, published: Published
) -> None:
    daemon.operations.may_fetch = True
    assert await daemon.acon("load", published.reference) == 0
    assert daemon.operations.uploads == []
    sources = daemon.operations.fetched
    assert {source.tar_size_bytes for source in sources} == {len(COMMON), len(OWN)}
    for source in sources:
        assert isinstance(source, RegistryBlob)
        assert (source.registry, source.repository) == (
            published.registry.name,
            published.repository,
        )
        assert source.media_type.endswith("+gzip")


async def test_skopeo_copies_image_and_list_to_another_repository_and_it_loads(
    daemon: Daemon, published: Published, skopeo: Skopeo
) -> None:
    registry = published.registry
    for tag, options in (("1", []), (published.fallback_tag, ["--all"])):
        skopeo.copy(
            registry.reference(published.repository, tag),
            registry.reference(f"{published.repository}/copy", tag),
            source_registry=registry,
            target_registry=registry,
            options=options,
        )
    daemon.operations.may_fetch = True
    assert await daemon.acon("load", registry.reference(f"{published.repository}/copy")) == 0
    assert {
        source.repository
        for source in daemon.operations.fetched
        if isinstance(source, RegistryBlob)
    } == {f"{published.repository}/copy"}


async def test_a_list_that_skopeo_copied_as_one_manifest_will_do(
    daemon: Daemon, published: Published, skopeo: Skopeo
) -> None:
    registry = published.registry
    for tag in ("1", published.fallback_tag):
        skopeo.copy(
            registry.reference(published.repository, tag),
            registry.reference(f"{published.repository}/copy", tag),
            source_registry=registry,
            target_registry=registry,
        )
    assert await daemon.acon("load", registry.reference(f"{published.repository}/copy")) == 0
    assert arrived(daemon) == [COMMON, OWN]


@pytest.mark.parametrize("how", ["the list", "the list as one manifest", "the artifact"])
@pytest.mark.parametrize("kind", ["oci", "oci-archive"])
async def test_what_skopeo_copied_into_a_layout_is_loaded_from_there(
    kind: str,
    how: str,
    daemon: Daemon,
    published: Published,
    skopeo: Skopeo,
    tmp_path: Path,
) -> None:
    if how == "the artifact":
        other = (published.artifact, "signed-manifest")
    else:
        other = (published.listing, published.fallback_tag)
    place = tmp_path / "copied"
    for reference, tag in ((published.reference, "1"), other):
        skopeo.copy(
            reference,
            # An archive can be written once only: the layout is made one afterwards.
            f"oci:{place}:{tag}",
            source_registry=published.registry,
            options=["--all"] if how == "the list" else [],
        )
    item = f"oci:{place}"
    if kind == "oci-archive":
        archive = tmp_path / "copied.tar"
        pack(place, archive)
        item = f"oci-archive:{archive}"
    daemon.operations.may_fetch = True
    assert await daemon.acon("load", item) == 0
    for source in daemon.operations.fetched:
        assert isinstance(source, FileBlob)
        blob = Path(source.file).read_bytes()[source.offset_bytes :][: source.size_bytes]
        assert f"sha256:{digest_of('sha256', blob).hex}" == source.blob_digest
    assert len(daemon.operations.fetched) == 2
    daemon.operations.layers.clear()
    assert await daemon.acon("load", f"{item}:1", "--upload") == 0
    assert arrived(daemon) == [COMMON, OWN]


async def test_an_artifact_is_loaded_by_its_own_digest(
    daemon: Daemon, published: Published
) -> None:
    assert await daemon.acon("load", published.artifact) == 0
    assert arrived(daemon) == [COMMON, OWN]


async def test_the_tag_that_lists_it_may_be_named_too(daemon: Daemon, published: Published) -> None:
    assert await daemon.acon("load", published.listing) == 0
    assert arrived(daemon) == [COMMON, OWN]


async def test_with_tls_an_authority_and_a_login_it_is_loaded_from_a_private_registry(
    daemon: Daemon, bundles: Bundles, owner: Signer, acon: Acon, private_registry: LocalRegistry
) -> None:
    reference = private_registry.reference("team/app")
    access = (
        "--registry-ca",
        private_registry.ca_file,
        "--authfile",
        private_registry.auth_file,
    )
    assert acon("image", "publish", bundles.image("app", owner), reference, *access) == 0
    assert await daemon.acon("load", reference, *access[:2]) == 1
    assert daemon.operations.groups == []
    assert await daemon.acon("load", reference, *access) == 0
    assert arrived(daemon) == [COMMON, OWN]


async def test_an_image_and_the_vendors_layer_it_delegates_are_loaded_from_a_registry(
    daemon: Daemon,
    bundles: Bundles,
    make_signer: MakeSigner,
    owner: Signer,
    publish: Callable[..., Published],
) -> None:
    csp = make_signer("csp")
    vendor = publish(bundles.vendor("lib:2", csp), "lib")
    app = publish(bundles.image("app", owner, to=f"{csp.certificate}:lib:2"), "app")
    assert await daemon.acon("load", app.reference, vendor.reference) == 0
    assert all(not view.missing_layers for view in daemon.operations.images())


async def test_a_folder_and_a_registry_may_be_loaded_together_and_a_shared_layer_comes_once(
    daemon: Daemon, published: Published, bundles: Bundles, owner: Signer
) -> None:
    other = bundles.image("other", owner)
    assert await daemon.acon("load", other, published.reference, published.artifact) == 0
    assert len(daemon.operations.admitted) == 2
    assert len(daemon.operations.uploads) == 3


async def test_of_several_signed_manifests_the_person_chooses(
    daemon: Daemon,
    bundles: Bundles,
    make_signer: MakeSigner,
    publish: Callable[..., Published],
    acon: Acon,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one, two = make_signer("one"), make_signer("two")
    first = bundles.image("app", one)
    publish(first)
    sign = ("image", "sign", first, "--key", two.key, "--cert", two.certificate)
    assert acon(*sign) == 0
    published = publish(first)
    capsys.readouterr()
    assert await daemon.acon("load", published.reference) == 2
    said = capsys.readouterr().err
    assert one.signer_id in said and two.signer_id in said
    assert daemon.operations.groups == []
    stranger = make_signer("stranger")
    by = "--signed-by"
    assert await daemon.acon("load", published.reference, by, stranger.signer_id) == 2
    assert await daemon.acon("load", published.reference, by, two.certificate) == 0
    assert await daemon.acon("load", published.reference, by, one.signer_id) == 0
    signers = [str(image.signer) for image in daemon.operations.admitted]
    assert signers == [two.signer_id, one.signer_id]


async def test_an_artifact_that_was_damaged_on_the_way_does_not_hide_another(
    daemon: Daemon,
    bundles: Bundles,
    make_signer: MakeSigner,
    publish: Callable[..., Published],
    acon: Acon,
    skopeo: Skopeo,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    one, two = make_signer("one"), make_signer("two")
    bundle = bundles.image("app", one)
    first = publish(bundle)
    assert acon("image", "sign", bundle, "--key", two.key, "--cert", two.certificate) == 0
    published = publish(bundle)
    place = tmp_path / "copied"
    for reference, tag in ((published.reference, "1"), (published.listing, published.fallback_tag)):
        skopeo.copy(
            reference,
            f"oci:{place}:{tag}",
            source_registry=published.registry,
            options=["--all"],
        )
    damaged = first.artifact.rpartition(":")[2]
    blob = place / "blobs" / "sha256" / damaged
    blob.write_bytes(b" " * blob.stat().st_size)
    capsys.readouterr()
    assert await daemon.acon("load", f"oci:{place}") == 0
    assert f"passed over sha256:{damaged}" in capsys.readouterr().err
    assert [str(image.signer) for image in daemon.operations.admitted] == [two.signer_id]


async def test_an_image_with_which_nothing_was_published_is_refused(
    daemon: Daemon,
    shared_registry: LocalRegistry,
    skopeo: Skopeo,
    bundles: Bundles,
    owner: Signer,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    bundles.image("app", owner)
    layout = tmp_path / "layouts" / "app"
    reference = shared_registry.reference("load/bare")
    skopeo.copy(f"oci:{layout}:1", reference, target_registry=shared_registry)
    for item in (reference, f"oci:{layout}", f"oci:{layout}:1"):
        capsys.readouterr()
        assert await daemon.acon("load", item) == 1
        assert "acon image publish" in capsys.readouterr().err
    assert await daemon.acon("load", shared_registry.reference("load/bare", "other")) == 1
    assert daemon.operations.groups == []


async def test_an_archive_that_can_hold_no_signed_manifest_is_refused_with_what_to_do(
    daemon: Daemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "saved.tar").touch()
    assert await daemon.acon("load", f"docker-archive:{tmp_path / 'saved.tar'}") == 2
    said = capsys.readouterr().err
    assert all(word in said for word in ("convert", "sign", "load"))


async def test_a_repository_of_acons_client_is_loaded_whole_or_one_image_of_it(
    daemon: Daemon, vectors: Path
) -> None:
    folder = vectors / "acon" / "aconcli_repo"
    daemon.operations.may_fetch = True
    assert await daemon.acon("load", f"acon-repo:{folder}") == 0
    ids = [str(image.image_id) for image in daemon.operations.admitted]
    assert len(ids) == 2
    assert all(not view.missing_layers for view in daemon.operations.images())
    blobs = {path.stem for path in (folder / "blobs" / "sha384").iterdir()}
    assert {digest.hex for digest in daemon.operations.layers} == blobs
    assert await daemon.acon("load", f"acon-repo:{folder}:sha384/{'0' * 96}/{'0' * 96}") == 1


def pack(folder: Path, archive: Path) -> None:
    with tarfile.open(archive, "w") as tar:
        for path in sorted(folder.rglob("*")):
            tar.add(path, arcname=str(path.relative_to(folder)), recursive=False)
