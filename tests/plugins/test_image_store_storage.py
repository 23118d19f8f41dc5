"""Memory files are sealed for good, and a busy kernel is asked again, not for ever."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Callable, Iterator

import pytest

from plugins.image_store.arrival.storage import RAM, SEAL_ATTEMPTS, SEALS


@pytest.fixture
def file() -> Iterator[int]:
    fd = RAM.new_file()
    os.write(fd, b"a layer")
    yield fd
    os.close(fd)


CHANGES: tuple[Callable[[int], object], ...] = (
    lambda fd: os.pwrite(fd, b"A", 0),
    lambda fd: os.ftruncate(fd, 3),
    lambda fd: os.ftruncate(fd, 30),
    lambda fd: mmap.mmap(fd, 7),
)


@pytest.mark.parametrize("change", CHANGES)
def test_a_frozen_file_can_be_changed_by_nobody(file: int, change: Callable[[int], object]) -> None:
    assert RAM.freeze(file) == file
    assert fcntl.fcntl(file, fcntl.F_GET_SEALS) == SEALS
    with pytest.raises(PermissionError):
        change(file)
    assert os.pread(file, 30, 0) == b"a layer"


def test_a_file_that_somebody_may_still_write_is_refused(file: int) -> None:
    with mmap.mmap(file, 7), pytest.raises(OSError, match="busy"):
        RAM.freeze(file)
    assert not fcntl.fcntl(file, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE


def test_a_file_that_is_in_use_for_a_moment_is_frozen_after_it(
    file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped = mmap.mmap(file, 7)
    asked = 0
    real = fcntl.fcntl

    def until_the_last(fd: int, command: int, argument: int = 0) -> int:
        nonlocal asked
        asked += 1
        if asked == SEAL_ATTEMPTS:
            mapped.close()
        return real(fd, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", until_the_last)
    RAM.freeze(file)
    assert asked == SEAL_ATTEMPTS
    assert real(file, fcntl.F_GET_SEALS) == SEALS
