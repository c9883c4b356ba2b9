"""Linears of rounded weights on a GPU, by torch's own operations. They have not been run on one yet."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import linear

from inference_service.kernels.integers import Quantized
from inference_service.layers.linear import Linear
from inference_service.layers.quantized import QuantizedLinear

FEW_ROWS: Final = 16
"""For which the packed product of 8 bits reads the weights once; for more of them, they are widened first."""
K_TILES: Final = 2
"""Tiles of 16 values, side by side in the packed layout of 4 bits: as few as there can be, for the most
widths.
"""
FP8: Final = torch.float8_e4m3fn
FP8_WIDTHS: Final = 16
INT4_WIDTHS: Final = 16 * K_TILES
INT4_COLUMNS: Final = 8
LARGEST_FP8: Final = torch.finfo(FP8).max


class Fp8Linear(Linear):
    """Rows and weights in 8 bits of floating point, with a scale for each row and each output channel."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Take a weight [out, in], both of them multiples of FP8_WIDTHS."""
        self.out_features, self.in_features = weight.shape
        self._bias = bias
        values, scales = rounded_fp8(weight)
        self._values, self._scales = values.t(), scales.t().contiguous()

    @staticmethod
    def takes(weight: Tensor) -> bool:
        """Return True if the operation has its sizes."""
        return all(size % FP8_WIDTHS == 0 for size in weight.shape)

    def __call__(self, x: Tensor) -> Tensor:
        """Return [T, out]."""
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """Return [T, out]; x is rounded row by row."""
        values, scales = rounded_fp8(x)
        out: Tensor = torch._scaled_mm(
            values, self._values, scale_a=scales, scale_b=self._scales, out_dtype=x.dtype
        )
        return out if self._bias is None else out.add_(self._bias)


def rounded_fp8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows [N, K] in 8 bits, and float32 [N, 1] that they are to be multiplied with."""
    wide = rows.float()
    scales = wide.abs().amax(dim=1, keepdim=True).clamp_(min=1e-12) / LARGEST_FP8
    return (wide / scales).clamp_(-LARGEST_FP8, LARGEST_FP8).to(FP8), scales


class Int8Linear(QuantizedLinear):
    """Integers of 8 bits, which torch's packed product takes as they are."""

    def __init__(self, weight: Quantized, bias: Tensor | None = None) -> None:
        super().__init__(weight, bias)
        self._of_rows = weight.scales.flatten()

    def product(self, x: Tensor) -> Tensor:
        """Return [T, out]; of many rows after widening the weights, which bfloat16 holds exactly."""
        if len(x) <= FEW_ROWS:
            out: Tensor = torch._weight_int8pack_mm(x, self._values, self._of_rows)
        else:
            out = linear(x, self._values.to(x.dtype)) * self._of_rows
        return out if self._bias is None else out.add_(self._bias)


class Int4Linear(Linear):
    """Integers of 4 bits in the layout of torch's packed product."""

    def __init__(self, weight: Quantized, bias: Tensor | None = None) -> None:
        """Take a weight whose sizes are multiples of INT4_COLUMNS and INT4_WIDTHS."""
        self.out_features, self.in_features = weight.values.shape
        self._bias = bias
        self._group = weight.group
        codes = (weight.values + 8).to(torch.uint8)
        self._tiles = torch._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], K_TILES)
        zeros = torch.zeros_like(weight.scales)
        self._scales: Tensor = torch.stack([weight.scales, zeros], dim=-1).transpose(0, 1).contiguous()

    @staticmethod
    def takes(weight: Quantized) -> bool:
        """Return True if the operation has its sizes."""
        rows, width = weight.values.shape
        return rows % INT4_COLUMNS == 0 and width % INT4_WIDTHS == 0

    def __call__(self, x: Tensor) -> Tensor:
        """Return [T, out]."""
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """Return [T, out]."""
        out: Tensor = torch._weight_int4pack_mm(x, self._tiles, self._group, self._scales)
        return out if self._bias is None else out.add_(self._bias)
