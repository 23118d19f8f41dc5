"""One daemon at a time uses a folder, and says who does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from supervisor.config import parse_config
from supervisor.errors import ConfigError, Conflict
from supervisor.runtime_dir import held, prepare_runtime_dir


def test_a_folder_that_is_held_is_refused_with_its_holder_and_free_afterwards(
    tmp_path: Path,
) -> None:
    with held(tmp_path):
        with pytest.raises(Conflict) as caught, held(tmp_path):
            raise AssertionError("must not be had twice")
        assert caught.value.item == str(tmp_path)
        assert caught.value.actual == f"process {os.getpid()}"
    with held(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = parse_config(f'runtime_dir = "{tmp_path}/file/run"\n[plugins]\norder = ["a"]\n')
    with pytest.raises(ConfigError, match="as root, can make and own"):
        prepare_runtime_dir(config)
