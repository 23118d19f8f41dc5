"""Images from registries and layouts, fetched by a real daemon where its configuration lets it."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from integration_images import Image
from integration_machine import Machine
from local_registry import LocalRegistry
from peers import Skopeo

pytestmark = pytest.mark.root


def load(machine: Machine, *words: object) -> dict[str, str]:
    """How each layer came, or that it was there, by its digest."""
    said = machine.acon("load", *words, "--json")
    events = [json.loads(line) for line in said.splitlines()]
    layers = [one for one in events if one["event"] == "layer"]
    return {one["digest"]: one.get("how", one["state"]) for one in layers}


def publish(machine: Machine, image: Image, registry: LocalRegistry, *options: object) -> str:
    reference = registry.reference(f"shop/{image.name}")
    machine.acon("image", "publish", image.folder, reference, *options)
    return reference


def test_a_registry_that_the_configuration_names_is_asked_by_the_daemon_itself(
    machine: Machine, patient: Image, other: Image, shared_registry: LocalRegistry
) -> None:
    machine.write_config(more=f'[plugin.image_store.registries."{shared_registry.name}"]')
    machine.start_daemon()
    ways = load(machine, publish(machine, patient, shared_registry))
    assert list(ways.values()) == ["fetched", "fetched"]
    machine.acon("start", "patient")
    # Another owner's image of the same layers.
    ways = load(machine, publish(machine, other, shared_registry))
    assert list(ways.values()) == ["already there", "already there"]
    machine.acon("start", "other")
    machine.acon("seal")
    policy = machine.new_policy()
    machine.require_agreement(policy)


def test_from_a_registry_that_it_may_not_ask_the_layers_are_sent(
    machine: Machine, patient: Image, shared_registry: LocalRegistry
) -> None:
    machine.start_daemon()
    ways = load(machine, publish(machine, patient, shared_registry))
    assert list(ways.values()) == ["sent", "sent"]
    machine.acon("start", "patient")


def test_the_daemon_has_its_own_login_and_authority(
    machine: Machine, patient: Image, private_registry: LocalRegistry, tmp_path: Path
) -> None:
    name, ca_file = private_registry.name, private_registry.ca_file
    machine.write_config(
        more=f'[plugin.image_store]\nregistry_auth_file = "{private_registry.auth_file}"\n'
        f'[plugin.image_store.registries."{name}"]\nca_file = "{ca_file}"'
    )
    machine.start_daemon()
    access = ("--registry-ca", ca_file, "--authfile", private_registry.auth_file)
    reference = publish(machine, patient, private_registry, *access)
    assert list(load(machine, reference, *access).values()) == ["fetched", "fetched"]
    machine.acon("start", "patient")


@pytest.mark.parametrize("kind", ["oci", "oci-archive"])
def test_what_skopeo_copied_to_where_the_daemon_may_read_is_fetched_from_there(
    kind: str,
    machine: Machine,
    patient: Image,
    shared_registry: LocalRegistry,
    skopeo: Skopeo,
    tmp_path: Path,
) -> None:
    store = tmp_path / "images"
    store.mkdir()
    machine.write_config(more=f'[plugin.image_store]\nfile_roots = ["{store}"]')
    machine.start_daemon()
    reference = publish(machine, patient, shared_registry)
    shown = json.loads(machine.acon("image", "publish", patient.folder, reference, "--json"))
    for source, tag in (
        (reference, "1"),
        (shared_registry.reference("shop/patient", shown["fallback_tag"]), shown["fallback_tag"]),
    ):
        skopeo.copy(
            source,
            f"oci:{store / 'patient'}:{tag}",
            source_registry=shared_registry,
            options=["--all"],
        )
    item = f"oci:{store / 'patient'}:1"
    if kind == "oci-archive":
        archive = store / "patient.tar"
        pack(store / "patient", archive)
        item = f"oci-archive:{archive}:1"
    assert list(load(machine, item).values()) == ["fetched", "fetched"]
    machine.acon("start", "patient")


def pack(layout: Path, archive: Path) -> None:
    """`oci-archive:` takes one image only; a layout in a tar is one as well."""
    with tarfile.open(archive, "w") as tar:
        for path in sorted(layout.rglob("*")):
            tar.add(path, arcname=str(path.relative_to(layout)), recursive=False)
