"""The number of examples of a property: one that finds a mistake soon in CI, many more with ``--sweep``."""

import os
from collections.abc import Sequence
from typing import Final, TypeVar

T = TypeVar("T")

SWEEPING: Final = "TESTS_SWEEP"
"""Set for workers too, which import tests before they know their options."""
MORE: Final = 30


def examples(in_ci: int) -> int:
    return in_ci * MORE if os.environ.get(SWEEPING) else in_ci


def spread(cases: Sequence[T], in_ci: int) -> list[T]:
    """Return so many of the cases at even distances, the first and the last among them; all in a sweep."""
    if os.environ.get(SWEEPING) or len(cases) <= in_ci:
        return list(cases)
    return [cases[at * (len(cases) - 1) // (in_ci - 1)] for at in range(in_ci)]
