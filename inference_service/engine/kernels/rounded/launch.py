"""Launches from tensors: checks, tiles, grids. The only entry to the kernels.

Each function raises `ValueError` where shapes, dtypes, strides or devices do not fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import linear

from inference_service.engine.kernels.integers import Quantized
from inference_service.engine.kernels.launch import Launch, kernels_of, require
from inference_service.engine.kernels.packing import power_of_two

MOST_ROWS: Final = 64
"""Rows for which weights are widened in registers; for more, once in memory, and multiplied by torch."""
HALF: Final = 16
"""Values of 4 bits in the lower halves of bytes side by side, see `triton_kernels`."""
FP8: Final = torch.float8_e4m3fn
BESIDE: Final = "in_fp8"
"""Attribute of rows that were written in fp8 too."""


@dataclass(frozen=True)
class Tile:
    """A tile of the product; others than those of `TILES` are not shipped.

    The numbers are reasoned, not timed: many columns of few rows keep enough bytes on their way from memory.
    """

    block_n: int
    block_b: int
    """Bytes of a row of the weight."""
    num_warps: int
    num_stages: int


TILES: Final = {
    2: {16: Tile(32, 128, 4, 4), 32: Tile(32, 64, 4, 4), 64: Tile(64, 64, 4, 4)},
    4: {16: Tile(32, 32, 4, 2), 32: Tile(32, 32, 4, 2), 64: Tile(32, 32, 8, 2)},
}
"""Tiles by the bytes of an element of x, and by the rows that they hold."""
WIDEN_BLOCK: Final = 1024


@dataclass(frozen=True)
class PackedWeight:
    """A weight [N, K] of few bits: (number - zero point) * scale."""

    values: Tensor
    """int8 [N, K], or of 4 bits [N, K / 2], as `packed_halves` has them."""
    scales: Tensor
    """bfloat16 or float32 [N, K / group]."""
    bits: int
    width: int
    zeros: Tensor | None = None
    """int8, as the scales; of 4 bits alone."""

    def __post_init__(self) -> None:
        require(self.values, "values", dims=2, dtype=torch.int8)
        require(self.scales, "scales", dims=2, device=self.values.device)
        rows, groups = self.scales.shape
        whole = self.width % groups == 0 and (self.bits == 8 or self.group % (2 * HALF) == 0)
        if not whole or self.values.shape != (rows, self.width * self.bits // 8):
            raise ValueError(f"{groups} groups of {self.bits} bits do not fit rows of {self.width}")
        if not (self.values.is_contiguous() and self.scales.is_contiguous()):
            raise ValueError("values and scales must be contiguous")
        if self.zeros is not None and (self.bits == 8 or self.zeros.shape != self.scales.shape):
            raise ValueError("zero points are of 4 bits, and as many as scales")

    @classmethod
    def of(cls, weight: Quantized) -> PackedWeight:
        """Return a weight that was rounded at load."""
        values = packed_halves(weight.values) if weight.bits == 4 else weight.values
        return cls(values, weight.scales, weight.bits, weight.values.shape[1])

    @property
    def group(self) -> int:
        """Values that share a scale."""
        return self.width // self.scales.shape[1]

    @property
    def arguments(self) -> dict[str, Any]:
        """Return those of kernels."""
        return {
            "p_values": self.values, "p_scales": self.scales, "p_zeros": self.zeros,
            "K": self.width, "GROUP": self.group, "BITS": self.bits,
        }  # fmt: skip


def packed_halves(values: Tensor) -> Tensor:
    """Return values [N, K] of -8 to 7, K a multiple of 32, two in a byte: of each 32 the first 16 below."""
    low, high = values.view(len(values), -1, 2, HALF).unbind(2)
    return (low & 15 | high << 4).reshape(len(values), -1)


def product(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b [T, N] of x [T, K]; the sums of a row do not depend on other rows of its tile."""
    kernels = kernels_of(__name__, x)
    require(x, "x", dims=2, device=weight.values.device)
    if x.shape[1] != weight.width:
        raise ValueError(f"x must have {weight.width} values in a row, got {x.shape[1]}")
    columns = len(weight.values)
    if len(x) > MOST_ROWS:
        return linear(x, widened(weight, x.dtype), bias)
    out = x.new_empty(len(x), columns)
    if not len(x):
        return out
    tiles = tiles_of(weight.bits, x.dtype.itemsize, old=kernels.OLD)
    block_m = next((size for size in tiles if len(x) <= size), max(tiles))
    tile = tiles[block_m]
    arguments = {
        "p_x": x, **weight.arguments, "p_bias": bias, "p_out": out,
        "rows": len(x), "columns": columns, "stride_x": x.stride(0),
        "BLOCK_M": block_m, "BLOCK_N": tile.block_n, "BLOCK_B": tile.block_b,
        "UPCAST": kernels.INTERPRETED, "num_warps": tile.num_warps, "num_stages": tile.num_stages,
    }  # fmt: skip
    Launch(kernels.product_kernel, (-(-columns // tile.block_n), -(-len(x) // block_m)), arguments)()
    return out


@cache
def tiles_of(bits: int, itemsize: int, *, old: bool) -> dict[int, Tile]:
    """Return the tiles for weights of so many bits; an old Triton takes none of 64 rows for 4."""
    return {rows: tile for rows, tile in TILES[itemsize].items() if rows < MOST_ROWS or bits == 8 or not old}


def widened(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Return the weight [N, K] in a type, each value rounded once."""
    rows, size = weight.values.shape
    out = weight.values.new_empty(rows, weight.width, dtype=dtype)
    arguments = {**weight.arguments, "p_out": out, "BLOCK_B": WIDEN_BLOCK, "num_warps": 4}
    Launch(kernels_of(__name__, out).widen_kernel, (rows, -(-size // WIDEN_BLOCK)), arguments)()
    return out


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows [T, K] in fp8, and float32 [T, 1] that they are to be multiplied with.

    They are those that what made x wrote beside it (`rounded_beside`), or made in one launch.
    """
    beside: tuple[Tensor, Tensor] | None = getattr(x, BESIDE, None)
    if beside is not None:
        return beside
    kernels = kernels_of(__name__, x)
    require(x, "x", dims=2)
    rows, width = x.shape
    values, scales = _empty(x)
    block = power_of_two(width)
    arguments = {
        "p_x": x, "p_values": values, "p_scales": scales, "K": width, "stride_x": x.stride(0), "BLOCK": block,
        "num_warps": min(16, max(4, block // 512)),
    }  # fmt: skip
    if rows:
        Launch(kernels.round_rows_kernel, (rows,), arguments)()
    return values, scales


def rounded_beside(x: Tensor) -> dict[str, Tensor]:
    """Return what the kernel that makes x [T, K] writes `round_rows` of it to; nothing may write x later.

    It belongs to this tensor: a view of it, or a copy, is rounded again.
    """
    values, scales = _empty(x)
    setattr(x, BESIDE, (values, scales))
    return {"p_values": values, "p_scales": scales}


def _empty(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=FP8), x.new_empty(len(x), 1, dtype=torch.float32)
