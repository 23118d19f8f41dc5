"""A software TD's keys and a few images, made once; a machine for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from inside_rig import compile_tries
from integration_images import Image, ImageMaker
from integration_machine import Machine, machine_in

from plugins.tdx_sim.pki import ensure_pki


@pytest.fixture(scope="session")
def pki_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pki")
    ensure_pki(folder)
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageMaker:
    return ImageMaker(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def patient(images: ImageMaker) -> Image:
    """Runs until it is asked to end."""
    return images.make("patient")


@pytest.fixture(scope="session")
def other(images: ImageMaker) -> Image:
    """Another owner's image, as patient."""
    return images.make("other", signer="another owner")


@pytest.fixture
def dark_machine(tmp_path: Path, pki_folder: Path) -> Iterator[Machine]:
    """Nothing runs yet."""
    with machine_in(tmp_path, pki_folder) as machine:
        yield machine


@pytest.fixture
def machine(dark_machine: Machine) -> Machine:
    """A software TD that runs; the daemon is the test's to start."""
    dark_machine.power_on()
    return dark_machine


@pytest.fixture(scope="session")
def tries_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A static program that tries everything; see `inside/tries.c`."""
    return compile_tries(tmp_path_factory.mktemp("tries"))
