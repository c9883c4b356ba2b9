"""The tiles of each kernel; others than those in these tables are not shipped.

Every entry is compiled ahead of time for every architecture in the tests: no spills, and shared memory within
the 99 KB that all of them have. The numbers are reasoned, not yet timed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import torch

Precision = Literal["ieee", "tf32", "tf32x3"]
MAX_DIM: Final = 128
"""Largest key and value: a state of that size fills a quarter of a multiprocessor's registers."""


@dataclass(frozen=True)
class ConvConfig:
    """Tiles of the convolution: rows of a chunk x channels."""

    block_t: int
    """Rows of a tile in steps that do more than decode."""
    block_c: int
    num_warps: int


@dataclass(frozen=True)
class TileConfig:
    """The computation of longer chunks' rows."""

    tile: int
    """Rows that are computed together."""
    block_d: int
    """Dimensions of a key or a value that `prepare_kernel` computes together."""
    block_v: int
    """Columns of the state that a program of the scan takes."""
    precision: Precision
    """Precision of products. With 16 bits to a value, those of tf32 are as exact as their factors."""
    solve_precision: Precision
    """Precision of the inverse, whose errors every later row of the tile sees."""
    prepare_warps: int
    scan_warps: int


CONV: Final = ConvConfig(block_t=16, block_c=128, num_warps=4)
NUM_STAGES: Final = 1
"""Stages of all kernels: a program's tile leaves no room for the next one."""
STEP_WARPS: Final = 8
"""A state of 128 x 128 is 64 registers of each thread."""
TILES: Final[Mapping[int, TileConfig]] = {
    2: TileConfig(32, 32, 32, "tf32", "tf32x3", prepare_warps=8, scan_warps=8),
    4: TileConfig(16, 32, 16, "ieee", "ieee", prepare_warps=8, scan_warps=8),
}
"""Configurations by the bytes of an element. fp32 uses no tensor cores: small tiles."""
GATE_BLOCK_T: Final = 16
GATE_WARPS: Final = 4


def delta_tile(dtype: torch.dtype) -> int:
    """Rows of a longer chunk that are computed together."""
    return TILES[dtype.itemsize].tile
