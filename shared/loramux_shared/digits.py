"""Numbers in text as JSON writes them: `int` and `float` also take underscores, and digits of other scripts."""

from __future__ import annotations

import re
from typing import Any, Final, get_args

_WHOLE: Final = re.compile(r"[0-9]{1,18}")
_NUMBER: Final = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_ODD: Final = re.compile(r"[^!-~]|_")
EXPECTED: Final = "a number of the digits 0 to 9"


def is_whole(text: str) -> bool:
    """Return True if a text is a whole number below 10^18, without a sign."""
    return _WHOLE.fullmatch(text) is not None


def is_number(text: str) -> bool:
    """Return True if a text is a number as JSON has it, or with a plus, or a point at its begin or end."""
    return _NUMBER.fullmatch(text) is not None


def refuse_odd(value: Any, annotation: Any) -> Any:
    """Return the value of a field, unless it is a text that Python alone takes for the number that it is to be.

    Raises:
        ValueError: it is.
    """
    if isinstance(value, str) and _ODD.search(value) and not {int, float}.isdisjoint(_kinds(annotation)):
        try:
            float(value)
        except ValueError:
            return value  # no number at all, which others refuse
        raise ValueError(EXPECTED)
    return value


def _kinds(annotation: Any) -> list[Any]:
    return [annotation, *(kind for part in get_args(annotation) for kind in _kinds(part))]
