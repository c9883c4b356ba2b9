"""Rotary position embeddings: the frequencies of a rope's numbers, and the rotation."""

import math

import torch
from torch import Tensor

from loramux_shared.bases.rope import LinearScaling, Llama3, LongRope, Proportional, RopeSpec, Still, Yarn


def frequencies(spec: RopeSpec) -> Tensor:
    """Return the frequencies [dim / 2] of a rope: theta ** (-2 i / dim), stretched as its scaling says."""
    exponents = torch.arange(0, spec.dim, 2, dtype=torch.int64).float() / spec.dim
    freqs = 1.0 / spec.theta**exponents
    match spec.scaling:
        case LinearScaling(factor):
            return freqs / factor
        case LongRope(factors):
            return freqs / torch.tensor(factors)
        case Proportional(pairs, factor):
            return torch.where(torch.arange(len(freqs)) < pairs, freqs / factor, 0.0)
        case Still():
            return torch.zeros_like(freqs)
        case Llama3() as llama3:
            return _llama3(llama3, freqs)
        case Yarn() as yarn:
            return _yarn(yarn, freqs, spec.theta)


def _llama3(scaling: Llama3, freqs: Tensor) -> Tensor:
    """Divide what rotates less than low_freq_factor times in the original context."""
    rotations = scaling.original_positions * freqs / (2 * math.pi)
    share = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    share = share.clamp(0, 1)
    return (1 - share) * freqs / scaling.factor + share * freqs


def _yarn(scaling: Yarn, freqs: Tensor, theta: float) -> Tensor:
    """Divide the dimensions that rotate less than beta_slow times, keep those above beta_fast."""
    dim = 2 * len(freqs)

    def dimension(rotations: float) -> float:
        """Return the dimension that rotates so often in the original context."""
        return dim * math.log(scaling.original_positions / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = high - low or 0.001
    divided = ((torch.arange(len(freqs)).float() - low) / span).clamp(0, 1)
    return freqs / scaling.factor * divided + freqs * (1 - divided)


class Rope:
    """Rotates queries and keys by their positions."""

    def __init__(self, spec: RopeSpec, dtype: torch.dtype, device: torch.device) -> None:
        freqs = frequencies(spec)
        self._freqs = torch.cat([freqs, freqs]).to(device)
        self._magnitude = spec.scaling.magnitude
        halves = torch.ones(spec.dim // 2) * spec.scaling.magnitude
        self._signed = torch.cat([-halves, halves]).to(device)
        self._dtype = dtype

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin [T, 1, dim] of positions [T], for `rotate`: the first half of sin is negated.

        Computed for every step: a table of 131072 positions would take more memory than it saves time.
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
    swapped = torch.cat([x[..., half:], x[..., :half]], dim=-1)
    return torch.addcmul(x * cos, swapped, sin)
