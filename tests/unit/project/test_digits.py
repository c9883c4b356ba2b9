"""Numbers in text."""

from __future__ import annotations

import pytest

from loramux_shared.wording import is_number, is_whole, refuse_odd


def test_what_is_a_number() -> None:
    """Digits from 0 to 9, as JSON has them, or with a plus, or a point at an end."""
    for text in ("0", "12", "-1", "+0.5", ".5", "5.", "1e-3", "1.5E+2"):
        assert is_number(text)
    for text in ("", " 1", "1 ", "1_0", "٣", "inf", "nan", "0x1", "1e", ".", "1e1_0"):
        assert not is_number(text)
    assert [text for text in ("0", "007", "-1", "1_0", "٣", "9" * 19, "1.0") if is_whole(text)] == ["0", "007"]


def test_fields_refuse_what_python_alone_reads() -> None:
    """Fields for numbers refuse Python's other spellings; a text that is no number at all is left to others."""
    for text in ("1_0", " 1", "٣"):
        with pytest.raises(ValueError, match="digits 0 to 9"):
            refuse_odd(text, int | None)
        assert refuse_odd(text, str) == text
    for value in ("12", "auto_", "inf", 12, None):
        assert refuse_odd(value, float) == value
