"""The account of bytes, and the sealed memory that it pays for."""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_store_rig import expected_for, memory_files

from plugins.image_store.arrival.progress import INTERVAL_S, Progress
from plugins.image_store.arrival.sealed import SealedWriter
from plugins.image_store.budget import Budget, Reservation
from plugins.image_store.mount.user_namespace import map_text
from supervisor import Busy, Event, LayerProgress, RuntimeFailed, Untrusted

TOTAL_BYTES = 1000


def test_a_reservation_beyond_the_budget_is_refused_and_changes_nothing() -> None:
    budget = Budget(TOTAL_BYTES)
    first = budget.reserve(600, item="a")
    with pytest.raises(Busy) as refused:
        budget.reserve(401, item="b")
    assert refused.value.item == "b"
    assert "400 bytes free of 1000" in str(refused.value.expected)
    with pytest.raises(Busy):
        first.cover(1001)
    assert (first.size_bytes, budget.used_bytes) == (600, 600)
    first.cover(1000)
    first.cover(500)
    assert budget.used_bytes == 1000
    first.release()
    first.release()
    assert budget.used_bytes == 0
    with pytest.raises(RuntimeError):
        first.cover(1)


@given(st.lists(st.tuples(st.sampled_from("rcf"), st.integers(0, 5), st.integers(0, 700))))
def test_reservations_together_never_exceed_the_budget(steps: list[tuple[str, int, int]]) -> None:
    budget = Budget(TOTAL_BYTES)
    held: list[Reservation] = []
    for action, index, size_bytes in steps:
        before = budget.used_bytes
        try:
            if action == "r":
                held.append(budget.reserve(size_bytes, item="x"))
            elif action == "c" and held:
                held[index % len(held)].cover(size_bytes)
            elif held:
                held.pop(index % len(held)).release()
        except Busy:
            assert budget.used_bytes == before
        assert budget.used_bytes == sum(item.size_bytes for item in held) <= TOTAL_BYTES


def test_threads_that_reserve_at_once_do_not_over_commit() -> None:
    budget = Budget(TOTAL_BYTES)
    held: list[Reservation] = []

    def take() -> None:
        for _ in range(200):
            try:
                held.append(budget.reserve(3, item="x"))
            except Busy:
                return

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == TOTAL_BYTES // 3
    assert budget.used_bytes == 3 * len(held)


def make_writer(budget: Budget, data: bytes, *, limit_bytes: int = TOTAL_BYTES) -> SealedWriter:
    return SealedWriter(
        expected_for(data, "sha512"),
        budget.reserve(0, item="layer"),
        limit_bytes=limit_bytes,
        limit_rule="the limit",
    )


def test_sealed_bytes_cannot_be_changed_by_anyone() -> None:
    budget = Budget(TOTAL_BYTES)
    data = b"some bytes" * 10
    writer = make_writer(budget, data)
    writer.write(data[:7])
    writer.write(bytearray(data[7:]))
    tar = writer.seal()
    assert tar.computed == {
        name: hashlib.new(name, data).hexdigest() for name in ("sha384", "sha512")
    }
    assert os.pread(tar.fd, 200, 0) == data
    again = os.open(f"/proc/self/fd/{tar.fd}", os.O_RDWR)
    try:
        for fd in (tar.fd, again):
            with pytest.raises(PermissionError):
                os.pwrite(fd, b"x", 0)
            with pytest.raises(PermissionError):
                os.pwrite(fd, b"x", len(data))
            with pytest.raises(PermissionError):
                os.ftruncate(fd, 1)
            with pytest.raises(PermissionError):
                mmap.mmap(fd, 0)
            with pytest.raises(PermissionError):
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    finally:
        os.close(again)
    with pytest.raises(RuntimeError):
        writer.write(b"x")
    writer.close()
    assert budget.used_bytes == len(data)
    tar.close()
    tar.close()
    assert budget.used_bytes == 0


def test_bytes_beyond_limit_or_budget_are_not_taken() -> None:
    before = memory_files()
    budget = Budget(TOTAL_BYTES)
    writer = make_writer(budget, b"", limit_bytes=10)
    writer.write(bytes(10))
    with pytest.raises(Untrusted) as refused:
        writer.write(b"x")
    assert (refused.value.rule, refused.value.expected) == ("the limit", "at most 10 bytes")
    assert (writer.size_bytes, budget.used_bytes) == (10, 10)
    other = make_writer(budget, b"")
    with pytest.raises(Busy):
        other.write(bytes(991))
    assert (other.size_bytes, budget.used_bytes) == (0, 10)
    for each in (writer, other):
        each.close()
        each.close()
    assert (budget.used_bytes, memory_files()) == (0, before)


def test_bytes_that_could_not_all_be_stored_are_never_sealed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    budget = Budget(TOTAL_BYTES)
    writer = make_writer(budget, b"")
    real_write = os.write
    calls = []

    def failing_write(fd: int, data: memoryview) -> int:
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return real_write(fd, data[:3])

    monkeypatch.setattr(os, "write", failing_write)
    with pytest.raises(RuntimeFailed):
        writer.write(b"0123456789")
    monkeypatch.undo()
    assert calls == [10, 7]
    assert budget.used_bytes == 0
    with pytest.raises(RuntimeError):
        writer.seal()


def test_bytes_that_were_stored_but_not_all_hashed_are_never_sealed() -> None:
    budget = Budget(TOTAL_BYTES)
    for hashed in (b"0123", b"0123456789x"):
        writer = make_writer(budget, b"")
        writer.store(memoryview(b"0123456789"))
        writer.digest(memoryview(hashed))
        with pytest.raises(RuntimeFailed) as refused:
            writer.seal()
        assert refused.value.rule == "what is stored must be what was hashed"
        writer.close()
    assert budget.used_bytes == 0


def test_progress_is_told_ten_times_a_second_at_most() -> None:
    now_s = 0.0
    events: list[Event] = []
    progress = Progress("sha384/x", 1000, events.append, clock=lambda: now_s)
    for step in range(1000):
        now_s = step / 500
        if progress.is_due():
            progress.tell(step)
    assert len(events) == round(2 / INTERVAL_S) - 1
    assert events[0] == LayerProgress(digest="sha384/x", received_bytes=50, total_bytes=1000)


def test_neighbouring_ids_share_a_line_of_the_map() -> None:
    assert map_text([(0, 100), (2, 102), (1, 101), (5, 103)], item="x") == b"0 100 3\n5 103 1\n"
    with pytest.raises(RuntimeFailed):
        map_text([(2 * i, i) for i in range(341)], item="x")
