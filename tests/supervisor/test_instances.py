"""What `maxInstances` and `containers.max_running` count, and when a place is free again."""

from __future__ import annotations

import pytest

from supervisor import Busy, Conflict
from supervisor.admission import AdmittedImage
from supervisor.formats.signature import verify_signed_manifest
from supervisor.instances import Instances
from supervisor.restart import Restart
from supervisor.testing import Owner, manifest

OWNER = Owner("owner")


def image(name: str, max_instances: int) -> AdmittedImage:
    upload = OWNER.sign(manifest(name=name, maxInstances=max_instances))
    signed = verify_signed_manifest(upload.manifest, upload.signature, upload.certificate_der)
    admitted: AdmittedImage = AdmittedImage._create(signed, (), None)
    return admitted


def test_each_image_has_its_own_limit_and_none_means_none() -> None:
    instances = Instances(max_running=100)
    one, many = image("one:1", 1), image("many:1", 0)
    instances.reserve(one)
    with pytest.raises(Conflict) as caught:
        instances.reserve(one)
    assert (caught.value.expected, caught.value.actual) == ("at most 1", "2")
    for _ in range(20):
        instances.reserve(many)


def test_one_that_ended_makes_room_for_its_image_but_on_the_machine_only_when_freed() -> None:
    instances = Instances(max_running=1)
    one = image("one:1", 1)
    place = instances.reserve(one)
    place.end()
    with pytest.raises(Busy, match=r"containers\.max_running"):
        instances.reserve(one)
    place.free()
    instances.reserve(one)


def test_a_restart_that_comes_to_nothing_gives_its_place_back() -> None:
    instances, one = Instances(max_running=1), image("one:1", 1)
    for failure in (Conflict("container 1", "was ended"), None):
        restart = Restart()
        restart.accept(instances.reserve(one))
        restart.finish(failure)
    with pytest.raises(Conflict):  # the second one runs
        instances.reserve(one)


def test_a_place_is_given_back_once_however_often_it_is_freed() -> None:
    instances = Instances(max_running=2)
    one = image("one:1", 1)
    place = instances.reserve(one)
    for _ in range(3):
        place.end()
        place.free()
    instances.reserve(one)
    with pytest.raises(Conflict):
        instances.reserve(one)
