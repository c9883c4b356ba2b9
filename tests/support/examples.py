"""How many examples a property is tried with: what finds a mistake soon in CI, many more with ``--sweep``."""

from __future__ import annotations

import os
from typing import Final

SWEEPING: Final = "TESTS_SWEEP"
"""Set for workers too, which import tests before they know their options."""
MORE: Final = 30


def examples(in_ci: int) -> int:
    """Return the number for this run."""
    return in_ci * MORE if os.environ.get(SWEEPING) else in_ci
