"""Linears of rounded weights on a GPU. They have not been run on one yet."""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from inference_service.engine.kernels import rounded
from inference_service.engine.kernels.rounded import PackedWeight
from inference_service.engine.layers.linear import Linear

FP8: Final = torch.float8_e4m3fn
FP8_WIDTHS: Final = 16
LARGEST_FP8: Final = torch.finfo(FP8).max


class Fp8Linear(Linear):
    """Rows and weights in 8 bits of floating point, with a scale for each row and each output channel."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        round_rows: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """Take a weight [out, in], both of them multiples of FP8_WIDTHS, and what rounds x, if not torch."""
        self._round_rows = round_rows or rounded_fp8
        self.out_features, self.in_features = weight.shape
        self._bias = bias
        values, scales = rounded_fp8(weight)
        self._values, self._scales = values.t(), scales.t().contiguous()

    @staticmethod
    def takes(weight: Tensor) -> bool:
        """Return True if the operation has its sizes."""
        return all(size % FP8_WIDTHS == 0 for size in weight.shape)

    def product(self, x: Tensor) -> Tensor:
        """Return [T, out]; x is rounded row by row."""
        values, scales = self._round_rows(x)
        out: Tensor = torch._scaled_mm(
            values, self._values, scale_a=scales, scale_b=self._scales, out_dtype=x.dtype
        )
        return out if self._bias is None else out.add_(self._bias)


def rounded_fp8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows [N, K] in 8 bits, and float32 [N, 1] that they are to be multiplied with."""
    wide = rows.float()
    scales = wide.abs().amax(dim=1, keepdim=True).clamp_(min=1e-12) / LARGEST_FP8
    return (wide / scales).clamp_(-LARGEST_FP8, LARGEST_FP8).to(FP8), scales


class PackedLinear(Linear):
    """Integers of 8 or 4 bits, which the kernels widen in registers."""

    def __init__(self, weight: PackedWeight, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = len(weight.values), weight.width
        self._integers, self._bias = weight, bias

    def product(self, x: Tensor) -> Tensor:
        """Return [T, out]."""
        return rounded.product(x, self._integers, self._bias)
