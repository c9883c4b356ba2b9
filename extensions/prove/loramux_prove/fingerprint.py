"""A long vector in nine numbers: its norm, and its products with eight fixed vectors of signs.

An error e in the vector moves a product by about the norm of e, whatever its direction, so a vector that is
zeroed, scaled or another one differs from the right one by far more than rounding can do.
"""

import math
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

from loramux_shared.bundle.proof import Effect

EMBEDDING: Final = "embedding"
HEAD: Final = "head"
"""Names of the modules outside the layers."""
MULTIPLIERS: Final = (
    0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1, 0xCC9E2D51, 0x1B873593, 0x85EBCA6B,
)  # fmt: skip
"""Odd constants of well-known hashes; one per vector of signs."""
DIGITS: Final = 6
"""Significant digits that are kept."""


@lru_cache(maxsize=64)
def signs(count: int, which: int) -> Tensor:
    """Return a vector of signs [count] in float64: element j is the low bit of a hash of j + 1."""
    hashed = (torch.arange(1, count + 1, dtype=torch.int64) * MULTIPLIERS[which]) & 0xFFFFFFFF
    hashed = hashed ^ (hashed >> 15)
    return 1.0 - 2.0 * (hashed & 1).double()


def effect_of(outputs: Tensor) -> Effect:
    """Return the effect of a row from what it adds to its module's output, any shape, in row-major order."""
    flat = outputs.detach().to("cpu", torch.float64).reshape(-1)
    dots = [_rounded(float(flat @ signs(len(flat), which))) for which in range(len(MULTIPLIERS))]
    return Effect(norm=_rounded(float(flat.norm())), dots=tuple(dots))


def difference(found: Effect, expected: Effect, rounding: float = 0.0) -> float:
    """Return how far an effect is from another, relative to that one's norm; infinite where that is zero.

    A difference within the rounding counts as zero.

    The larger of two estimates: the norms' difference, which shows a wrong scale exactly, and the root of the
    products' mean squared difference, which is about the norm of the error.
    """
    errors = [a - b for a, b in zip(found.dots, expected.dots, strict=True)]
    off = max(abs(found.norm - expected.norm), math.hypot(*errors) / math.sqrt(len(errors)))
    if off <= rounding:
        return 0.0
    return off / expected.norm if expected.norm else math.inf


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS - 1}e}")
