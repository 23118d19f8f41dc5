"""The journal keeps whole entries, recognises torn ones and has one writer."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.errors import Conflict, MeasurementHalted, RuntimeFailed
from supervisor.journal import Attachment, Journal, JournalEntry

ENTRY = JournalEntry(record=b"one", attachments=(Attachment(b"manifest", b"signature", b"der"),))
OTHER = JournalEntry(record=b"two")


def test_entries_survive_closing_with_their_attachments(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "journal")
    journal.append(ENTRY)
    journal.append(OTHER)
    journal.close()
    again = Journal.open(tmp_path / "journal")
    assert again.entries == [ENTRY, OTHER]
    again.close()


def test_a_second_supervisor_cannot_open_the_same_journal(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "journal")
    with pytest.raises(Conflict, match="another supervisor holds"):
        Journal.open(tmp_path / "journal")
    journal.close()
    Journal.open(tmp_path / "journal").close()


@pytest.mark.parametrize("lost", [1, 2, 11, 12, 13])
def test_a_torn_tail_is_cut_off_and_the_entries_before_it_are_kept(
    tmp_path: Path, lost: int
) -> None:
    path = tmp_path / "journal"
    journal = Journal.open(path)
    journal.append(ENTRY)
    whole = journal.size_bytes
    journal.append(OTHER)
    end = journal.size_bytes
    journal.close()
    os.truncate(path, end - lost)
    again = Journal.open(path)
    assert again.entries == [ENTRY]
    assert path.stat().st_size == whole
    again.append(OTHER)
    again.close()
    assert Journal.open(path).entries == [ENTRY, OTHER]


def test_a_tail_whose_bytes_were_never_written_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal.open(path)
    journal.append(ENTRY)
    start = journal.size_bytes
    journal.append(OTHER)
    end = journal.size_bytes
    journal.close()
    with path.open("r+b") as file:
        file.seek(start + 4)
        file.write(bytes(end - start - 4))
    assert Journal.open(path).entries == [ENTRY]


def test_dropping_the_last_entry_leaves_the_others(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "journal")
    journal.append(ENTRY)
    journal.append(OTHER)
    journal.drop_last()
    journal.append(OTHER)
    journal.drop_last()
    journal.close()
    assert Journal.open(tmp_path / "journal").entries == [ENTRY]


def test_an_old_boots_journal_is_put_aside_under_a_new_name(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal.open(path)
    journal.append(ENTRY)
    before = path.read_bytes()
    aside = journal.put_aside()
    assert aside.read_bytes() == before
    assert journal.entries == []
    journal.append(OTHER)
    second = journal.put_aside()
    assert second != aside
    journal.close()


def test_a_file_that_is_no_journal_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_bytes(b"somebody else's notes")
    with pytest.raises(MeasurementHalted, match="is no measurement journal"):
        Journal.open(path)
    assert path.read_bytes() == b"somebody else's notes"


def test_a_journal_that_vanished_takes_nothing_more(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal.open(path)
    journal.append(ENTRY)
    path.unlink()
    with pytest.raises(RuntimeFailed, match="cannot be written"):
        journal.append(OTHER)
    journal.close()


def test_a_full_disk_leaves_the_journal_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal"
    journal = Journal.open(path)
    journal.append(ENTRY)
    size = journal.size_bytes
    real_pwrite = os.pwrite

    def half(descriptor: int, data: bytes, offset: int) -> int:
        if len(data) > 5:
            return real_pwrite(descriptor, data[:5], offset)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", half)
    with pytest.raises(RuntimeFailed, match="No space left"):
        journal.append(OTHER)
    monkeypatch.undo()
    assert path.stat().st_size == size
    journal.append(OTHER)
    journal.close()
    assert Journal.open(path).entries == [ENTRY, OTHER]


@given(st.binary(max_size=200))
def test_any_bytes_behind_the_entries_never_become_an_entry(tail: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "journal")
        journal = Journal.open(path)
        journal.append(ENTRY)
        journal.close()
        with path.open("ab") as file:
            file.write(tail)
        try:
            again = Journal.open(path)
        except MeasurementHalted as error:
            # More than one cut-off append could leave: nothing was thrown away.
            assert error.rule == "is damaged before its end"
            assert path.read_bytes().endswith(tail)
        else:
            assert again.entries == [ENTRY]
            again.close()


def test_damage_before_the_end_halts_and_throws_nothing_away(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal.open(path)
    journal.append(ENTRY)
    first_end = journal.size_bytes
    journal.append(OTHER)
    journal.close()
    data = bytearray(path.read_bytes())
    data[first_end - 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(MeasurementHalted, match="is damaged before its end"):
        Journal.open(path)
    assert path.read_bytes() == data


def test_an_entry_that_could_not_be_read_again_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("supervisor.journal.MAX_ENTRY_BYTES", 100)
    journal = Journal.open(tmp_path / "journal")
    journal.append(OTHER)
    with pytest.raises(RuntimeFailed, match="bounded size"):
        journal.append(JournalEntry(record=bytes(200)))
    journal.close()
    assert Journal.open(tmp_path / "journal").entries == [OTHER]


def test_an_entry_with_a_changed_byte_is_no_entry(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal.open(path)
    journal.append(ENTRY)
    journal.append(OTHER)
    journal.close()
    path.write_bytes(path.read_bytes().replace(b"two", b"twp"))  # still decodes
    again = Journal.open(path)
    assert again.entries == [ENTRY]
    again.close()


def test_a_journal_that_was_replaced_takes_nothing_more(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal.open(path)
    journal.append(ENTRY)
    path.rename(tmp_path / "moved")
    path.write_bytes(b"")
    with pytest.raises(RuntimeFailed, match="another file lies at its path"):
        journal.append(OTHER)
    journal.close()


def test_a_link_is_not_followed_to_a_journal(tmp_path: Path) -> None:
    (tmp_path / "journal").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RuntimeFailed, match="must be writable"):
        Journal.open(tmp_path / "journal")
    assert not (tmp_path / "elsewhere").exists()


def test_journals_old_and_new_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "journal")
    journal.append(ENTRY)
    journal.put_aside()
    journal.close()
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {0o600} and len(list(tmp_path.iterdir())) == 2


def test_a_journal_that_cannot_be_opened_keeps_no_descriptor(tmp_path: Path) -> None:
    held = Journal.open(tmp_path / "held")
    (tmp_path / "notes").write_bytes(b"somebody else's notes")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Conflict):
        Journal.open(tmp_path / "held")
    with pytest.raises(MeasurementHalted):
        Journal.open(tmp_path / "notes")
    assert len(os.listdir("/proc/self/fd")) == before
    held.close()
