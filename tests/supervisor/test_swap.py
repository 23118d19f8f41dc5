"""Swap other than zram ends the start."""

from __future__ import annotations

from pathlib import Path

import pytest

from supervisor.errors import ConfigError
from supervisor.swap import active_swap, refuse_active_swap

HEADER = "Filename\tType\tSize\tUsed\tPriority\n"


def test_zram_and_an_empty_table_are_no_swap() -> None:
    assert active_swap(HEADER) == ()
    assert active_swap(HEADER + "/dev/zram0 partition 1024 0 100\n") == ()


def test_a_partition_or_a_file_refuses_the_start_by_name(tmp_path: Path) -> None:
    table = tmp_path / "swaps"
    table.write_text(HEADER + "/dev/zram0 partition 9 0 9\n/swapfile file 1024 0 -2\n")
    with pytest.raises(ConfigError) as caught:
        refuse_active_swap(table)
    assert caught.value.actual == "/swapfile"


def test_a_table_that_cannot_be_read_refuses_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be readable"):
        refuse_active_swap(tmp_path / "none")
