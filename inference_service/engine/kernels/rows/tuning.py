"""The tiles of each kernel; others than those in these tables are not shipped.

Every entry is compiled ahead of time for every architecture in the tests: no spills. The numbers are reasoned,
not yet timed: a norm holds its row in registers, at most 32 elements per thread, and everything else works in
tiles of 16 bytes per thread. Nothing yet speaks for different tiles on different architectures.
"""

from collections.abc import Mapping
from typing import Final

from inference_service.engine.kernels.launch import RowTile

NORM: Final[Mapping[int, RowTile]] = {
    1024: RowTile(1024, num_warps=4),
    2048: RowTile(2048, num_warps=8),
    4096: RowTile(4096, num_warps=8),
    8192: RowTile(8192, num_warps=16),
    16384: RowTile(16384, num_warps=16),
}
"""Configurations by the largest row that each holds."""
FP8: Final[Mapping[int, RowTile]] = {**NORM, 32768: RowTile(32768, num_warps=32)}
"""Configurations of activations that are written in fp8 too."""
TILE: Final[Mapping[int, RowTile]] = {2: RowTile(1024, num_warps=4), 4: RowTile(512, num_warps=4)}
"""Configurations of everything but norms, by the bytes of an element."""
MAX_NORM_DIM: Final = max(NORM)


def norm_config(dim: int) -> RowTile:
    """The tile that holds a row of ``dim`` elements; raise ValueError where none is so large."""
    if dim > MAX_NORM_DIM:
        raise ValueError(f"norms have at most {MAX_NORM_DIM} elements, got {dim}")
    return NORM[next(key for key in NORM if dim <= key)]


def fp8_config(columns: int) -> RowTile | None:
    """Return the tile that holds a row of an activation; None where none is so large."""
    return next((tile for most, tile in FP8.items() if columns <= most), None)
