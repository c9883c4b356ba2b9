"""The nearest known name to one that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Final

MAX_FINDINGS: Final = 64
"""Largest number of findings of one message or file that are listed one by one."""
_LONGEST: Final = 64
"""No longer name is near to one of ours."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known name that is most like a name; empty where none is."""
    found = difflib.get_close_matches(name, known, n=1) if len(name) <= _LONGEST else []
    return found[0] if found else ""
