"""The names in what asks for several adapters with scales; what it means, a replica reads."""

from __future__ import annotations

from typing import Final

BASE: Final = "base"
"""A name of every served base, where nothing else is called so."""


def names_of(model: str) -> list[str]:
    """Return the distinct names of ``NAME*SCALE+NAME``, in their order; of one name itself."""
    return sorted({part.partition("*")[0].strip() for part in model.split("+")})
