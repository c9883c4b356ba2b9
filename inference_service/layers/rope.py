"""Rotary position embeddings, with the scalings that checkpoints use for longer contexts.

Sources: https://arxiv.org/abs/2104.09864; the llama3 scaling as in Meta's Llama 3.1 reference code; YaRN
https://arxiv.org/abs/2309.00071; LongRoPE https://arxiv.org/abs/2402.13753.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Scaling(Protocol):
    """How frequencies are stretched for longer contexts."""

    @property
    def magnitude(self) -> float:
        """What cosines and sines are multiplied with."""
        ...

    def stretch(self, freqs: Tensor, theta: float, /) -> Tensor:
        """Return the frequencies to use in place of freqs [dim / 2] = theta ** (-2 i / dim)."""
        ...


@dataclass(frozen=True)
class Linear:
    """Every frequency divided by one factor; a factor of 1 is plain rope."""

    factor: float = 1.0

    @property
    def magnitude(self) -> float:
        """Unchanged."""
        return 1.0

    def stretch(self, freqs: Tensor, _theta: float) -> Tensor:
        """Divide."""
        return freqs / self.factor


@dataclass(frozen=True)
class Llama3:
    """Long wavelengths divided, short ones kept, a ramp between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int

    @property
    def magnitude(self) -> float:
        """Unchanged."""
        return 1.0

    def stretch(self, freqs: Tensor, _theta: float) -> Tensor:
        """Divide what turns less than low_freq_factor times in the original context."""
        turns = self.original_positions * freqs / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = kept.clamp(0, 1)
        return (1 - kept) * freqs / self.factor + kept * freqs


@dataclass(frozen=True)
class Yarn:
    """As Llama3, with the ramp over dimensions instead of wavelengths, and larger magnitudes."""

    factor: float
    original_positions: int
    magnitude: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def stretch(self, freqs: Tensor, theta: float) -> Tensor:
        """Divide the dimensions that turn less than beta_slow times, keep those above beta_fast."""
        dim = 2 * len(freqs)
        low, high = (self._dimension(beta, dim, theta) for beta in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        span = high - low or 0.001
        divided = ((torch.arange(len(freqs)).float() - low) / span).clamp(0, 1)
        return freqs / self.factor * divided + freqs * (1 - divided)

    def _dimension(self, turns: float, dim: int, theta: float) -> float:
        """Return the dimension that turns so often in the original context."""
        return dim * math.log(self.original_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))


@dataclass(frozen=True)
class LongRope:
    """A searched factor for each frequency."""

    factors: tuple[float, ...]
    magnitude: float

    def stretch(self, freqs: Tensor, _theta: float) -> Tensor:
        """Divide each by its own."""
        return freqs / torch.tensor(self.factors)


@dataclass(frozen=True)
class RopeSpec:
    """The rotation of a layer's queries and keys."""

    dim: int
    """Leading dimensions of a head that are rotated."""
    theta: float
    scaling: Scaling = Linear()


class Rope:
    """Rotates queries and keys by their positions."""

    def __init__(self, spec: RopeSpec, dtype: torch.dtype, device: torch.device) -> None:
        exponents = torch.arange(0, spec.dim, 2, dtype=torch.int64).float() / spec.dim
        freqs = spec.scaling.stretch(1.0 / spec.theta**exponents, spec.theta)
        self._freqs = torch.cat([freqs, freqs]).to(device)
        self._magnitude = spec.scaling.magnitude
        halves = torch.ones(spec.dim // 2) * spec.scaling.magnitude
        self._signed = torch.cat([-halves, halves]).to(device)
        self._dtype = dtype

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin [T, 1, dim] of positions [T], for `rotate`: the first half of sin is negated.

        Computed anew for every step: a table of 131072 positions would take more memory than it saves time.
        """
        angles = (positions.float()[:, None] * self._freqs)[:, None]
        cos, sin = angles.cos() * self._magnitude, angles.sin() * self._signed
        return cos.to(self._dtype), sin.to(self._dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the leading dimensions of x [T, heads, head_dim]; their halves are the pairs."""
    dim = cos.shape[-1]
    if dim != x.shape[-1]:
        return torch.cat([rotate(x[..., :dim], cos, sin), x[..., dim:]], dim=-1)
    half = dim // 2
    turned = torch.cat([x[..., half:], x[..., :half]], dim=-1)
    return torch.addcmul(x * cos, turned, sin)
