"""A linear of integers by torch's operations, which every device has."""

from __future__ import annotations

import torch
from torch import Tensor

from inference_service.kernels.integers import PIECE, Quantized
from inference_service.layers.linear import Linear


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
        both = torch.stack([values << 4 >> 4, values >> 4], dim=-1)  # low and high half of each byte
        return x @ Quantized(both.view(len(values), -1), scales, 4).widened().t()
