"""The real registry and the tools of others do here what other tests rely on."""

from __future__ import annotations

import hashlib
import os
import ssl
import time
from pathlib import Path

import httpx
import pytest
from local_registry import PASSWORD, USER, LocalRegistry, local_registry, write_auth_file
from peers import OciLayout, Podman, Skopeo, Umoci


def is_gone(registry: LocalRegistry) -> bool:
    try:
        httpx.get(f"{registry.url}/v2/", trust_env=False)
    except httpx.ConnectError:
        return True
    return False


def test_a_plain_registry_gives_back_what_skopeo_put_there(
    registry: LocalRegistry, skopeo: Skopeo, mixed_layout: OciLayout, tmp_path: Path
) -> None:
    reference = skopeo.push(mixed_layout, registry, "team/mixed")
    back = tmp_path / "back"
    skopeo.copy(
        reference, f"oci:{back}:1", source_registry=registry, options=["--preserve-digests"]
    )
    for descriptor in (*mixed_layout.layers, mixed_layout.manifest):
        algorithm, digest = str(descriptor["digest"]).split(":")
        blob = (back / "blobs" / algorithm / digest).read_bytes()
        assert hashlib.sha256(blob).hexdigest() == digest


def test_a_private_registry_wants_its_authority_and_its_password(
    private_registry: LocalRegistry, skopeo: Skopeo, gzip_layout: OciLayout, tmp_path: Path
) -> None:
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"{private_registry.url}/v2/", trust_env=False)
    trusted = ssl.create_default_context(cafile=private_registry.ca_file)
    with httpx.Client(verify=trusted, trust_env=False) as client:
        refused = client.get(f"{private_registry.url}/v2/")
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"].startswith("Basic ")
        allowed = client.get(f"{private_registry.url}/v2/", auth=(USER, PASSWORD))
        assert allowed.status_code == 200
    reference = skopeo.push(gzip_layout, private_registry, "team/private")
    wrong = LocalRegistry(
        private_registry.name,
        private_registry.storage,
        private_registry.ca_file,
        write_auth_file(tmp_path / "wrong.json", private_registry.name, "another"),
    )
    with pytest.raises(RuntimeError, match="authentication required"):
        skopeo.copy(reference, f"oci:{tmp_path / 'out'}:1", source_registry=wrong)
    skopeo.copy(reference, f"oci:{tmp_path / 'out'}:1", source_registry=private_registry)


def test_a_registry_ends_also_when_its_user_fails(tmp_path: Path, registry: LocalRegistry) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        local_registry(tmp_path / "other", tls_and_auth=False) as other,
    ):
        assert not is_gone(other)
        raise ZeroDivisionError
    assert is_gone(other)
    assert not is_gone(registry)


def test_a_registry_ends_with_the_process_that_started_it(
    tmp_path: Path, registry: LocalRegistry
) -> None:
    child = os.fork()
    if child == 0:
        try:
            with local_registry(tmp_path / "orphan") as orphan:
                (tmp_path / "name.new").write_text(orphan.name)
                (tmp_path / "name.new").rename(tmp_path / "name")
                time.sleep(60)
        finally:
            os._exit(1)
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / "name").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    orphan = LocalRegistry((tmp_path / "name").read_text(), tmp_path)
    while not is_gone(orphan):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.root
def test_umoci_unpacks_the_upper_layers_file(
    umoci: Umoci, gzip_layout: OciLayout, tmp_path: Path
) -> None:
    root = umoci.unpack(gzip_layout.directory, gzip_layout.tag, tmp_path / "bundle")
    assert (root / "etc" / "name").read_bytes() == b"top\n"


def traces_of_podman() -> dict[Path, int | None]:
    """What it would use of the machine's, with the time of the last change."""
    places = ("/dev/shm/libpod_lock", "/run/libpod", "/run/containers", "/var/lib/containers")
    folders = [Path(place) for place in places]
    files = [*folders, *(path for folder in folders for path in folder.rglob("*"))]
    return {path: path.stat().st_mtime_ns if path.exists() else None for path in files}


@pytest.mark.root
def test_podman_pulls_pushes_and_saves_and_keeps_all_below_its_folder(
    podman: Podman, registry: LocalRegistry, mixed_layout: OciLayout, tmp_path: Path
) -> None:
    before = traces_of_podman()
    image = podman.pull(mixed_layout.reference)
    podman.push(image, registry.reference("team/podman"), registry=registry)
    assert podman.pull(registry.reference("team/podman"), registry=registry) == image
    archive = podman.save(image, tmp_path / "image.tar")
    assert archive.stat().st_size > sum(map(len, mixed_layout.tars))
    assert traces_of_podman() == before
