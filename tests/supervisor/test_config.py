"""The configuration is strict, and its effective form is what is measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from supervisor.config import config_digest_sha384, effective_config, parse_config, read_config
from supervisor.errors import ConfigError
from supervisor.formats import canonical_json

MINIMAL = '[plugins]\norder = ["a"]\n'


@pytest.mark.parametrize(
    ("text", "item"),
    [
        ("", "$"),
        ("[plugins]\norder = []", "$.plugins.order"),
        ('[plugins]\norder = ["a", "a"]', "$.plugins.order"),
        ('[plugins]\norder = ["../a"]', "$.plugins.order"),
        (MINIMAL + "[measurement]\nextend_timeout_s = 0", "$.measurement.extend_timeout_s"),
        (MINIMAL + '[measurement]\nlog_limit_bytes = "3"', "$.measurement.log_limit_bytes"),
        (MINIMAL + "[hooks]\ntimeout_s = 0", "$.hooks.timeout_s"),
        (MINIMAL + "[plugin.b]\nx = 1", "$.plugin.b"),
        (MINIMAL + "[admision]\nmax_images = 1", "$"),
        ('runtime_dir = "run"\n' + MINIMAL, "$.runtime_dir"),
        ('log_level = "loud"\n' + MINIMAL, "$.log_level"),
        ("not toml", "configuration"),
    ],
)
def test_a_wrong_configuration_is_refused_with_the_settings_path(text: str, item: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(text)
    assert caught.value.item == item


def test_the_effective_configuration_spells_out_every_default() -> None:
    effective = effective_config(parse_config(MINIMAL), {})
    table = canonical_json.decode_canonical(
        effective.encode(), item="effective", max_bytes=len(effective)
    )
    assert isinstance(table, dict)
    assert table["admission"] == {
        "max_group": 256,
        "max_images": 1024,
        "unsafe_allow_sha256": False,
    }
    assert table["unsafe_allow_swap"] is False


def test_any_changed_setting_changes_the_digest() -> None:
    digests = {
        config_digest_sha384(effective_config(parse_config(text), {}))
        for text in (
            MINIMAL,
            "unsafe_allow_swap = true\n" + MINIMAL,
            MINIMAL + "[hooks]\ntimeout_s = 11",
            '[plugins]\norder = ["b"]\n',
        )
    }
    assert len(digests) == 4


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config(tmp_path / "none.toml")
    assert caught.value.item == str(tmp_path / "none.toml")
