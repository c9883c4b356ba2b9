"""Lists of names in messages: enough to go on, never a screenful."""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice
from typing import Final

SHOWN: Final = 20


def listed(names: Collection[str], most: int = SHOWN, *, none: str = "none") -> str:
    """Return the first names in a sentence's form: ``a, b, c and 57 more``; none where there are none."""
    shown = ", ".join(islice(names, most))
    more = len(names) - most
    return f"{shown} and {more} more" if more > 0 else shown or none
