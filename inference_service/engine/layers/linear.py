"""Linear layers, with the weights in the layout that the device reads fastest."""

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

SIZES: Final = (1024, 768, 512, 384, 256, 192, 128, 96, 64, 48, 32, 24, *range(16, 0, -1))
"""Rows of a product on a CPU: for every other number of them oneDNN compiles half a megabyte, and keeps it."""
PADDING: Final = 24
"""Rows that a product may have too many: they take as long as reading the weights once more for a rest."""


class Linear:
    """y = x W^T + b for x [T, in]."""

    saved_bytes: int = 0
    """Bytes that a product reads less than the rounding of its weights says."""
    _packed = False
    """Whether the weight is in a layout of oneDNN's, which takes some numbers of rows alone."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Take a weight [out, in]; on a CPU it is kept in oneDNN's blocked layout, and only there."""
        self.out_features, self.in_features = weight.shape
        self._bias = bias
        self._packed = weight.device.type == "cpu" and _onednn_takes(weight.dtype)
        # Measured with 2 threads: bf16 [8, 576] x [3072, 576] takes 48 us packed and 78 us plain.
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self._packed else weight

    @property
    def has_bias(self) -> bool:
        """Return True if b is added."""
        return self._bias is not None

    def __call__(self, x: Tensor) -> Tensor:
        """Return [T, out]."""
        return in_pieces(self.product, x, SIZES) if self._packed else self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """Return [T, out] by one call of the library."""
        if self._packed:
            out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
            return out
        return linear(x, self._weight, self._bias)


def in_pieces(product: Callable[[Tensor], Tensor], x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return a product [T, out] of x [T, in], in pieces of the sizes, which fall.

    The last piece is padded where that is cheaper than one more, or no size is small enough.
    """
    if len(x) in (0, *sizes):
        return product(x)
    parts, at = [], 0
    while at < len(x):
        left = len(x) - at
        size = next((size for size in reversed(sizes) if left <= size <= left + PADDING), None)
        size = size or next((size for size in sizes if size <= left), sizes[-1])
        rows = x[at : at + size]
        missing = size - len(rows)
        padded = pad(rows, (0, 0, 0, missing)) if missing else rows
        parts.append(product(padded)[: len(rows)])
        at += size
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _onednn_takes(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float32
