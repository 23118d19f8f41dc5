"""Swap other than zram, and a runtime folder on a disk, end the start."""

from __future__ import annotations

from pathlib import Path

import pytest

from supervisor.errors import ConfigError
from supervisor.ram import active_swap, file_system_of, refuse_active_swap, refuse_disk

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
    with pytest.raises(ConfigError, match="must be readable"):
        refuse_disk(tmp_path, tmp_path / "none")


def mounts(*lines: tuple[str, str]) -> str:
    return "".join(f"1 0 0:1 / {point} rw - {kind} none rw\n" for point, kind in lines)


def test_the_longest_and_last_mount_decides_what_a_folder_lies_on(tmp_path: Path) -> None:
    inner = tmp_path / "in ner"
    inner.mkdir()
    spelt = str(inner).replace(" ", "\\040")
    assert file_system_of(inner, mounts(("/", "ext4"))) == "ext4"
    assert file_system_of(inner, mounts((spelt, "tmpfs"), ("/", "ext4"))) == "tmpfs"
    assert file_system_of(inner, mounts(("/", "ext4"), (spelt, "tmpfs"))) == "tmpfs"
    assert file_system_of(inner, mounts((spelt, "tmpfs"), (spelt, "ext4"))) == "ext4"
    assert file_system_of(tmp_path, mounts(("/", "ext4"), (spelt, "tmpfs"))) == "ext4"


def test_a_mount_point_beyond_ascii_is_found(tmp_path: Path) -> None:
    inner = tmp_path / "m\u00fcnchen"
    inner.mkdir()
    assert file_system_of(inner, mounts((str(tmp_path), "tmpfs"), (str(inner), "ext4"))) == "ext4"


def test_a_runtime_folder_on_a_disk_is_refused_with_its_file_system(tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(mounts(("/", "ext4")))
    with pytest.raises(ConfigError) as caught:
        refuse_disk(tmp_path, table)
    assert caught.value.actual == "ext4"
    table.write_text(mounts(("/", "ext4"), (str(tmp_path), "tmpfs")))
    refuse_disk(tmp_path, table)
