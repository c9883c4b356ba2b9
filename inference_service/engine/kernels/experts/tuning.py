"""The tiles of each kernel; others than those in these tables are not shipped.

Every entry is compiled ahead of time for every architecture in the tests: no spills, and shared memory within
the 99 KB that all of them have. The numbers are reasoned, not yet timed. Where an expert has few tokens, as at
decode, its weights are read once whatever the tile's height: tiles are flat, and K is taken in long steps.
`benchmarks.on_gpu.tune` times others.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final


class Load(Enum):
    """The number of tokens of an expert; it chooses the tiles."""

    FEW = "few"
    MANY = "many"


@dataclass(frozen=True)
class GroupedConfig:
    """Tiles of the grouped product: places x columns, reduced over K in steps of block_k."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


TILE: Final[Mapping[Load, int]] = {Load.FEW: 16, Load.MANY: 64}
"""Places of a tile: the pairs of a step are sorted once, for products of all types."""
GROUPED: Final[Mapping[tuple[Load, int], GroupedConfig]] = {
    (Load.FEW, 2): GroupedConfig(64, 128, num_warps=4, num_stages=4),
    (Load.MANY, 2): GroupedConfig(128, 64, num_warps=8, num_stages=3),
    (Load.FEW, 4): GroupedConfig(32, 64, num_warps=4, num_stages=3),
    (Load.MANY, 4): GroupedConfig(32, 32, num_warps=4, num_stages=2),
}
"""Configurations by the load and the bytes of an element; fp32 uses no tensor cores: small tiles."""
MANY_PLACES: Final = 16
"""Mean places of an expert from which on tiles are tall."""
SORT_BLOCK: Final = 1024
"""Pairs that the sort takes at a time."""
SORT_WARPS: Final = 4
SPAN: Final = 4 * SORT_BLOCK
"""Pairs of which one program makes the segments; those of recorded steps need no launch to count them."""
SLOT_BLOCK: Final = 64
"""Tokens of a segment that get their slot at a time."""
ROUTE_WARPS: Final = 1
"""A row of logits is in one warp's registers."""
MAX_EXPERTS: Final = 1024


def load_of(pairs: int, num_experts: int) -> Load:
    """Return the load of a step's experts on average."""
    return Load.MANY if pairs >= MANY_PLACES * num_experts else Load.FEW
