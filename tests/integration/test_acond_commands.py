"""What `acond` prints, and how it refuses: for those who configure it and those who measure it."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from integration_images import Image
from integration_machine import Machine

from supervisor.config import config_digest_sha384
from supervisor.formats import canonical_json

pytestmark = pytest.mark.root


def test_the_printed_configuration_is_one_and_measures_the_same(
    dark_machine: Machine, tmp_path: Path
) -> None:
    machine = dark_machine
    printed = machine.acond("--config", machine.config, "--print-config")
    assert printed.returncode == 0
    # Every default is there.
    assert tomllib.loads(printed.stdout)["containers"]["stop_timeout_s"] == 10
    again = tmp_path / "printed.toml"
    again.write_text(printed.stdout)
    reprinted = machine.acond("--config", again, "--print-config")
    assert reprinted.stdout == printed.stdout
    identities = [
        machine.acond("--config", path, "--print-identity").stdout
        for path in (machine.config, again)
    ]
    assert identities[0] == identities[1]
    # Nothing was made while only looking.
    assert not machine.runtime_dir.exists()


def test_the_printed_identity_is_the_first_record_of_the_log(
    machine: Machine, patient: Image
) -> None:
    identity = machine.acond("--config", machine.config, "--print-identity").stdout.strip()
    machine.start_daemon()
    machine.load(patient)
    record = machine.require_agreement()[0]
    assert record.operation == "Start"
    assert record.content.decode() == identity
    _, raw = machine.fetch_evidence()
    evidence = canonical_json.decode(raw, item="evidence", max_bytes=len(raw))
    assert isinstance(evidence, dict)
    measured = json.loads(identity)["config_digest_sha384"]
    assert config_digest_sha384(str(evidence["config"])) == measured


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"top": "surprise = 1"}, "$"),
        ({"http": "surprise = 1"}, "$.plugin.http_api"),
        ({"more": "[containers]\nstop_timeout_s = 0"}, "$.containers.stop_timeout_s"),
        ({"more": "[plugin.missing]"}, "$.plugin.missing"),
        ({"http": 'socket_mode = "rw"'}, "$.plugin.http_api.socket_mode"),
        ({"top": "not TOML at all"}, "configuration"),
    ],
)
def test_a_configuration_error_ends_with_2_and_names_its_path(
    dark_machine: Machine, change: dict[str, str], path: str
) -> None:
    dark_machine.write_config(**change)
    for option in ((), ("--print-identity",)):
        done = dark_machine.acond("--config", dark_machine.config, *option)
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.splitlines()[-1].startswith(f"acond: {path}: ")
    assert dark_machine.sockets() == []


def test_an_unknown_plugin_is_refused_by_its_name(dark_machine: Machine) -> None:
    machine = dark_machine
    machine.config.write_text('[plugins]\norder = ["tdx_sim", "telepathy"]\n')
    done = machine.acond("--config", machine.config, "--print-identity")
    assert done.returncode == 2
    assert "$.plugins.order: telepathy" in done.stderr
    assert "image_store" in done.stderr  # what there is instead


def test_a_configuration_that_is_not_there_is_named(dark_machine: Machine, tmp_path: Path) -> None:
    done = dark_machine.acond("--config", tmp_path / "absent.toml")
    assert done.returncode == 2
    assert "absent.toml" in done.stderr


def test_a_daemon_without_its_td_does_not_start(dark_machine: Machine) -> None:
    done = dark_machine.acond("--config", dark_machine.config)
    assert done.returncode == 1
    assert json.loads(done.stderr.splitlines()[-1])["event"] == "ended"
    assert "software TD" in done.stderr.splitlines()[-1]
    dark_machine.require_nothing_left()
