"""Standard base64, strictly."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.formats.base64_text import from_base64, to_base64
from supervisor.formats.errors import FormatError


@given(st.binary(max_size=100))
def test_base64_has_one_form(raw: bytes) -> None:
    text = to_base64(raw)
    assert from_base64(text, item="x") == raw
    for other in (text + "\n", " " + text, text + "=", text.rstrip("=") + "===="):
        with pytest.raises(FormatError):
            from_base64(other, item="x")


@pytest.mark.parametrize(
    "text", ["QQ", "QQ=", "QR==", "QUF=", "Q-8=", "Q_8=", "Q===", "é===", "=="]
)
def test_base64_in_another_form_is_refused(text: str) -> None:
    with pytest.raises(FormatError):
        from_base64(text, item="x")
