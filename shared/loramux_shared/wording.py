"""Names in messages: lists that are never a screenful, and the nearest known name to an unknown one."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from itertools import islice
from typing import Final

LISTED: Final = 20


def listed(names: Collection[str], most: int = LISTED, *, none: str = "none") -> str:
    """Return the first names in a sentence's form: ``a, b, c and 57 more``; none where there are none."""
    joined = ", ".join(islice(names, most))
    more = len(names) - most
    return f"{joined} and {more} more" if more > 0 else joined or none


MAX_FINDINGS: Final = 64
"""Largest number of findings of one message or file that are listed one by one."""
_LONGEST: Final = 64
"""No longer name is near to one of ours."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known name that is most like a name; empty where none is."""
    found = difflib.get_close_matches(name, known, n=1) if len(name) <= _LONGEST else []
    return found[0] if found else ""
