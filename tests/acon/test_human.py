"""Times, sizes and signals in words."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from acon.human import ago, size
from acon.signals import listed_signal, parse_signal, signal_name

NOW = datetime(2026, 5, 6, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("then", "words"),
    [
        ("2026-05-06T12:00:00Z", "now"),
        ("2026-05-06T11:59:59.000001Z", "now"),
        ("2026-05-06T11:59:59Z", "1 second ago"),
        ("2026-05-06T11:59:01Z", "59 seconds ago"),
        ("2026-05-06T11:59:00Z", "1 minute ago"),
        ("2026-05-06T14:57:00+03:00", "3 minutes ago"),
        ("2026-05-06T10:00:00Z", "2 hours ago"),
        ("2026-05-04T11:59:59.123456789Z", "2 days ago"),
        # Another machine's clock, a little or very much ahead.
        ("2026-05-06T12:00:30Z", "now"),
        ("2026-05-06T13:00:00Z", "2026-05-06T13:00:00Z"),
        ("2026-05-06T12:00:00", "2026-05-06T12:00:00"),
        ("some day", "some day"),
    ],
)
def test_times_are_told_by_their_largest_unit(then: str, words: str) -> None:
    assert ago(then, NOW) == words


@pytest.mark.parametrize(
    ("size_bytes", "words"),
    [(None, "-"), (0, "0 bytes"), (999, "999 bytes"), (12_345_678, "12 MB"), (4096, "4 kB")],
)
def test_sizes_are_decimal(size_bytes: int | None, words: str) -> None:
    assert size(size_bytes) == words


@pytest.mark.parametrize(
    ("signum", "name", "listed"),
    [
        (15, "SIGTERM", "SIGTERM (15)"),
        (-1, None, "SIGHUP (-1) to the process group"),
        (0, None, "none at a restart"),
        (40, "signal 40", "signal 40 (40)"),
    ],
)
def test_signals_have_names(signum: int, name: str | None, listed: str) -> None:
    if name is not None:
        assert signal_name(signum) == name
    assert listed_signal(signum) == listed


def test_what_is_read_as_a_signal() -> None:
    words = ("9", "-9", "KILL", "sigkill", "-SIGKILL")
    assert [parse_signal(word) for word in words] == [9, -9, 9, 9, -9]
