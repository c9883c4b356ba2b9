"""Weights of 8 and 4 bits: integers, and a scale for each output channel or for each group of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

GROUPS: Final = (64, 32)
"""Values of a row that share a scale at 4 bits: the first number that divides a row's."""
INT8: Final = 127
INT4: Final = 8


@dataclass(frozen=True)
class Quantized:
    """A weight [out, in] that is ``values * scales``."""

    values: Tensor
    """int8 [out, in], of 4 bits from -8 to 7."""
    scales: Tensor
    """bfloat16 [out, in / group]."""
    bits: int

    @property
    def group(self) -> int:
        """Values that share a scale."""
        return self.values.shape[1] // self.scales.shape[1]

    def widened(self) -> Tensor:
        """Return the weight in float32, exact."""
        rows, groups = self.scales.shape
        values = self.values.view(rows, groups, -1).float()
        return (values * self.scales.float()[..., None]).view(rows, -1)


def quantize(weight: Tensor, bits: int) -> Quantized | None:
    """Return a weight [out, in] in 8 or 4 bits; None where its rows cannot be parted into groups.

    Scales are rounded to bfloat16 first, and values to what is nearest with those.
    """
    rows, width = weight.shape
    group = width if bits == 8 else next((size for size in GROUPS if width % size == 0), 0)
    if not group:
        return None
    parts = weight.float().view(rows, width // group, group)
    scales = _scales8(parts) if bits == 8 else _scales4(parts)
    scales = scales.bfloat16()
    low, high = (-INT8, INT8) if bits == 8 else (-INT4, INT4 - 1)
    values = (parts / scales.float()[..., None]).round_().clamp_(low, high).to(torch.int8)
    return Quantized(values.view(rows, width), scales, bits)


def _scales8(parts: Tensor) -> Tensor:
    largest = parts.abs().amax(-1)
    return torch.where(largest > 0, largest / INT8, 1.0)


def _scales4(parts: Tensor) -> Tensor:
    """So that the largest value, whose sign the scale has, is -8: there is no 8."""
    largest = parts.gather(-1, parts.abs().argmax(-1, keepdim=True)).squeeze(-1)
    return torch.where(largest != 0, largest / -INT4, 1.0)
