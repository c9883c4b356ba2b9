"""Rotary position embeddings, with the scalings that Llama checkpoints use.

Sources: https://arxiv.org/abs/2104.09864; the "llama3" scaling as in Meta's Llama 3.1 reference code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeScaling:
    """How frequencies are stretched for longer contexts."""

    kind: str = "default"
    """``default``, ``linear`` or ``llama3``."""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


def inverse_frequencies(dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """Return [dim / 2] angular frequencies, in radians per position."""
    freqs = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    if scaling.kind == "linear":
        return freqs / scaling.factor
    if scaling.kind != "llama3":
        return freqs
    wavelength = 2 * math.pi / freqs
    low = scaling.original_max_position / scaling.low_freq_factor
    high = scaling.original_max_position / scaling.high_freq_factor
    smooth = (scaling.original_max_position / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - smooth) * freqs / scaling.factor + smooth * freqs
    stretched = torch.where(wavelength > low, freqs / scaling.factor, freqs)
    return torch.where((wavelength <= low) & (wavelength >= high), blended, stretched)


class Rope:
    """Rotates queries and keys by their positions."""

    def __init__(self, freqs: Tensor, max_positions: int, dtype: torch.dtype, device: torch.device) -> None:
        angles = torch.outer(torch.arange(max_positions).float(), freqs)
        angles = torch.cat([angles, angles], dim=-1)
        self._cos = angles.cos().to(device, dtype)
        self._sin = angles.sin().to(device, dtype)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin [T, 1, dim] of positions [T]."""
        return self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [T, heads, dim]; the halves of dim are the pairs."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos + turned * sin
