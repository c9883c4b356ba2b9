"""Rotary position embeddings in numbers; `inference_service.layers.rope` computes with them.

Sources: https://arxiv.org/abs/2104.09864; the llama3 scaling as in Meta's Llama 3.1 reference code; YaRN
https://arxiv.org/abs/2309.00071; LongRoPE https://arxiv.org/abs/2402.13753.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearScaling:
    """Every frequency divided by one factor; a factor of 1 is plain rope."""

    factor: float = 1.0
    magnitude: float = 1.0
    """Factor of cosines and sines."""


@dataclass(frozen=True)
class Llama3:
    """Long wavelengths divided, short ones kept, a ramp between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int
    magnitude: float = 1.0


@dataclass(frozen=True)
class Yarn:
    """YaRN: Llama3's scaling with the ramp over dimensions instead of wavelengths, and larger magnitudes."""

    factor: float
    original_positions: int
    magnitude: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class LongRope:
    """A searched factor for each frequency."""

    factors: tuple[float, ...]
    magnitude: float


@dataclass(frozen=True)
class Still:
    """No frequency at all: positions turn nothing."""

    magnitude: float = 1.0


@dataclass(frozen=True)
class Proportional:
    """The first pairs alone, with the frequencies that they have among all; the others do not turn."""

    pairs: int
    factor: float
    """Divisor of the frequencies."""
    magnitude: float = 1.0


Scaling = LinearScaling | Llama3 | Yarn | LongRope | Still | Proportional
"""A scaling of frequencies for longer contexts."""


@dataclass(frozen=True)
class RopeSpec:
    """The rotation of a layer's queries and keys."""

    dim: int
    """Leading dimensions of a head that are rotated."""
    theta: float
    scaling: Scaling = LinearScaling()


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
