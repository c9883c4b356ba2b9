"""Frobenius norms of A, B and BA of a row, equal on every machine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from loramux_shared.bundle.npy import Array

DIGITS: Final = 5
"""Significant digits that are kept: sums in float64 differ between machines in the sixteenth."""
PIECE: Final = 1 << 18
"""Elements that are widened to float64 at once."""


@dataclass(frozen=True)
class Norms:
    """Frobenius norms, rounded to `DIGITS` significant digits."""

    a: float
    b: float
    ba: float


def row_norms(a: Array, b: Array) -> Norms:
    """Return the norms of A ``(rank, in)``, B ``(out, rank)`` and BA; BA itself is never formed.

    ``||BA||² = tr((BᵀB)(AAᵀ))``, which needs two (rank, rank) matrices.
    """
    gram_a, gram_b = _gram(a.T), _gram(b)
    return Norms(
        a=_rounded(math.sqrt(np.trace(gram_a))),
        b=_rounded(math.sqrt(np.trace(gram_b))),
        ba=_rounded(math.sqrt(max(0.0, float(np.sum(gram_a * gram_b))))),
    )


def _gram(tall: Array) -> Array:
    """Return ``XᵀX`` of X ``(n, rank)`` in float64."""
    rank = tall.shape[1]
    total: Array = np.zeros((rank, rank))
    step = max(1, PIECE // rank)
    for start in range(0, len(tall), step):
        wide = tall[start : start + step].astype(np.float64)
        total += np.dot(wide.T, wide)  # np.dot runs beside other threads, unlike @
    return total


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS - 1}e}")
