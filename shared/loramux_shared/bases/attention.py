"""How a layer attends."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionSpec:
    """How a layer attends."""

    scale: float
    """Of the products of queries and keys."""
    window: int | None = None
    """Positions that a row sees, its own included; None: all."""
    softcap: float | None = None
    """Bound that the scaled products approach, by tanh."""


@dataclass(frozen=True)
class QueryGrowth:
    """Queries that are multiplied with 1 + beta * log(1 + position // length)."""

    beta: float
    length: int
