"""The attention of a layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HeadCounts:
    """The heads of a layer."""

    queries: int
    kv: int
    """Heads of keys, and of values."""
    dim: int
    """Dimensions of each."""

    @property
    def group(self) -> int:
        """Query heads that share a head of keys."""
        return self.queries // self.kv


@dataclass(frozen=True)
class AttentionSpec:
    """The attention of a layer."""

    scale: float
    """Factor of the products of queries and keys."""
    window: int | None = None
    """Positions that a row sees, its own included; None: all."""
    softcap: float | None = None
    """Bound that the scaled products approach, by tanh."""
    keys_of: int | None = None
    """The layer whose keys and values are read, for this one has none; None: its own, which it writes."""


@dataclass(frozen=True)
class QueryScaling:
    """Queries that are multiplied with 1 + beta * log(1 + position // length)."""

    beta: float
    length: int
