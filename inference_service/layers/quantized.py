"""Weights of 8 and 4 bits: integers, and a scale for each output channel or for each group of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from inference_service.layers.linear import Linear
from loramux_shared.rounding import INT4_GROUP, Rounding

STEPS8: Final = 127
STEPS4: Final = (-8.8, -8.4, -8.0, -7.6, -7.2, -6.8, 7.0, 7.4, 8.0, 8.5)
"""What the largest value of a group may be in its steps; which is nearest is tried. There is a -8 and no 8."""
PIECE: Final = 1 << 19
"""Values that are rounded, or widened, at once: they stay in a cache."""


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


def quantize(weight: Tensor, quantization: Rounding) -> Quantized | None:
    """Return a weight [out, in] in 8 or 4 bits; None where it is to stay, or its rows have no whole groups.

    Scales are rounded to bfloat16 first, and values to what is nearest with those.
    """
    width = weight.shape[1]
    bits = {Rounding.INT8: 8, Rounding.INT4: 4}.get(quantization)
    group = INT4_GROUP if bits == 4 else width
    if bits is None or width % group:
        return None
    scales_of, low, high = (_scales8, -STEPS8, STEPS8) if bits == 8 else (_scales4, -8, 7)
    values, scales = [], []
    for some in torch.split(weight, max(1, PIECE // width)):
        parts = some.to(torch.float32, copy=True).view(len(some), width // group, group)
        scales.append(scales_of(parts))
        steps = parts.div_(scales[-1].float()[..., None]).round_().clamp_(low, high)
        values.append(steps.to(torch.int8).view(len(some), width))
    return Quantized(torch.cat(values), torch.cat(scales), bits)


def _scales8(parts: Tensor) -> Tensor:
    """Return the scales [rows, 1] with which the largest of parts [rows, 1, values] is the last step."""
    return _usable(parts.abs().amax(-1) / STEPS8)


def _scales4(parts: Tensor) -> Tensor:
    """Return the scales [rows, groups] that lose least of parts [rows, groups, values], in squares."""
    largest = parts.gather(-1, parts.abs().argmax(-1, keepdim=True)).squeeze(-1)
    best = torch.full_like(largest, torch.inf)
    scales = torch.ones_like(largest, dtype=torch.bfloat16)
    for steps in STEPS4:
        tried = _usable(largest / steps)
        wide = tried.float()[..., None]
        lost = (parts / wide).round_().clamp_(-8, 7).mul_(wide).sub_(parts).square_().sum(-1)
        scales = torch.where(lost < best, tried, scales)
        best = torch.minimum(lost, best)
    return scales


def _usable(scales: Tensor) -> Tensor:
    narrow = scales.bfloat16()
    return torch.where(narrow == 0, torch.ones_like(narrow), narrow)


class QuantizedLinear(Linear):
    """A linear whose weight is widened whenever it is used, a piece at a time: on any device, in any type."""

    def __init__(self, weight: Quantized, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.values.shape
        self._bias = None if bias is None else bias.float()
        self._bits, self._scales = weight.bits, weight.scales
        values = weight.values
        self._values = values if weight.bits == 8 else (values[:, ::2] & 15) | (values[:, 1::2] << 4)

    def __call__(self, x: Tensor) -> Tensor:
        """Return [T, out]."""
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """Return [T, out]; sums are float32, and rounded once."""
        wide = x.float()
        rows = max(1, PIECE // self.in_features)
        pieces = zip(torch.split(self._values, rows), torch.split(self._scales, rows), strict=True)
        out = torch.cat([self._piece(wide, values, scales) for values, scales in pieces], dim=1)
        return (out if self._bias is None else out + self._bias).to(x.dtype)

    def _piece(self, x: Tensor, values: Tensor, scales: Tensor) -> Tensor:
        if self._bits == 8:
            return (x @ values.float().t()) * scales.float().t()
        both = torch.stack([values << 4 >> 4, values >> 4], dim=-1)  # of each byte, with its sign
        return x @ Quantized(both.view(len(values), -1), scales, 4).widened().t()
