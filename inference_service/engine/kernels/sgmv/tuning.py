"""The tiles of each kernel; others than those in these tables are not shipped.

Every entry is compiled ahead of time for every architecture in the tests: no spills, and shared memory within
the 99 KB that all of them have. That holds for dims and row strides that are multiples of 16, as in every
served model; others are computed rightly, but without vector loads. The numbers are reasoned, not yet timed.

A bucket is the smallest key that holds the group's ceiling, or else the last: of ``max_rows`` for shrink and
of ``max_rank`` for expand. Above it, kernels take several tiles. Grids follow from capacities, and what
programs do from the step: they share the tiles that its segments have, by the ranks of its adapters, in loops.
So few programs of a recorded launch are without work, whatever the step.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch

from inference_service.engine.kernels.launch import ARCHITECTURES
from inference_service.engine.kernels.sgmv.layout import Phase, SegmentCapacity, Slices

Config = TypeVar("Config")
DECODE_TILE = 16
PREFILL_TILE = 64
COVERING = 128
"""Programs of shrink that cover a device: an A100 has 108 multiprocessors, an H100 132, a B200 148."""
BESIDE = {16: 32, 32: 40, 48: 56, 80: 64}
"""Programs by the most segments of a step, that read as fast as the product needs which they run beside."""
PLACES = 264
"""Programs of expand at most, and of the kernels that add updates: an H100 holds two on each multiprocessor.

More would wait for a place, and these can as well take another tile.
"""


@dataclass(frozen=True)
class ShrinkConfig:
    """Tiles of shrink: entries x rows, reduced over K in steps of block_k by at most split_k programs."""

    block_t: int
    block_r: int
    block_k: int
    split_k: int
    num_warps: int
    num_stages: int

    def planes(self, in_features: int, tiles: int) -> tuple[int, int]:
        """(planes, blocks of K that each reduces): enough to cover the device if allowed, and no idle one."""
        blocks = -(-in_features // self.block_k)
        programs = -(-COVERING // max(1, tiles))
        per_plane = max(1, blocks // programs, -(-blocks // self.split_k))
        return -(-blocks // per_plane), per_plane  # as `planes_of` in triton_kernels

    def grid(self, in_features: int, max_rows: int, capacity: SegmentCapacity) -> int:
        """Programs of a launch for any step of a capacity: no more than may find work."""
        most = capacity.segments
        covering = next((programs for segments, programs in BESIDE.items() if most <= segments), COVERING)
        tiles = capacity.segments * -(-max_rows // self.block_r)
        return min(covering, tiles * self.planes(in_features, 1)[0])

    @cache  # noqa: B019 - the configurations are those of the tables, which stay
    def numel(self, in_features: int, max_rows: int, capacity: SegmentCapacity) -> int:
        """fp32 elements that all planes of any step take together."""
        most = 0
        for used in range(1, capacity.segments + 1):
            planes, _ = self.planes(in_features, used)
            most = max(most, planes * min(capacity.entries, used * capacity.tile))
        return most * max_rows


@dataclass(frozen=True)
class ExpandConfig:
    """Tiles of expand: entries x columns, reduced over the rank in steps of block_r."""

    block_t: int
    block_r: int
    block_n: int
    """Columns of a tile at most."""
    step_n: int
    """Columns that a tile has more, the more segments a step has."""
    num_warps: int
    num_stages: int

    def grid(self, slices: Slices, segments: int) -> int:
        """Programs of a launch for any step of at most so many segments."""
        return min(segments * slices.tiles(self.step_n), PLACES)


def width_of(slices: Slices, segments: int, programs: int, block_n: int, step_n: int) -> int:
    """Columns of a tile where programs share so many segments; as `shared_tiles` in triton_kernels."""
    steps = segments * slices.tiles(step_n)
    places = programs * max(1, -(-steps * step_n // (programs * block_n)))
    width = -(-steps // places) * step_n
    return min(width + step_n, block_n) if segments * slices.tiles(width) > places else width


ShrinkTable = Mapping[tuple[Phase, int], Mapping[int, ShrinkConfig]]
"""Keyed by the phase and the bytes of an element, then by bucket."""
ExpandTable = Mapping[tuple[Phase, int], Mapping[int, ExpandConfig]]
"""The same."""

# Decode: 16 planes are 16 KB of y for a tile of expand to sum. A program has 48 KB of A under way, so that 40
# read as fast as memory is.
# Prefill: 64 rows on 4 warps are one wgmma on sm_90; planes only for chunks too short to cover the device.
# fp32 uses no tensor cores: small tiles.
_SHRINK: ShrinkTable = {
    (Phase.DECODE, 2): {
        16: ShrinkConfig(DECODE_TILE, 16, 256, 16, num_warps=4, num_stages=4),
        32: ShrinkConfig(DECODE_TILE, 32, 128, 16, num_warps=4, num_stages=4),
        64: ShrinkConfig(DECODE_TILE, 64, 128, 16, num_warps=4, num_stages=4),
    },
    (Phase.PREFILL, 2): {
        16: ShrinkConfig(PREFILL_TILE, 16, 128, 4, num_warps=4, num_stages=4),
        32: ShrinkConfig(PREFILL_TILE, 32, 64, 4, num_warps=4, num_stages=4),
        64: ShrinkConfig(PREFILL_TILE, 64, 64, 4, num_warps=4, num_stages=4),
    },
    (Phase.DECODE, 4): {16: ShrinkConfig(DECODE_TILE, 16, 64, 16, num_warps=4, num_stages=2)},
    (Phase.PREFILL, 4): {16: ShrinkConfig(PREFILL_TILE, 16, 32, 4, num_warps=4, num_stages=3)},
}
_EXPAND: ExpandTable = {
    (Phase.DECODE, 2): {
        16: ExpandConfig(DECODE_TILE, 16, 128, 16, num_warps=8, num_stages=1),
        32: ExpandConfig(DECODE_TILE, 32, 128, 16, num_warps=4, num_stages=1),
    },
    (Phase.PREFILL, 2): {
        16: ExpandConfig(PREFILL_TILE, 16, 128, 64, num_warps=8, num_stages=1),
        32: ExpandConfig(PREFILL_TILE, 32, 128, 64, num_warps=8, num_stages=1),
    },
    (Phase.DECODE, 4): {16: ExpandConfig(DECODE_TILE, 16, 128, 16, num_warps=8, num_stages=1)},
    (Phase.PREFILL, 4): {16: ExpandConfig(PREFILL_TILE, 16, 64, 32, num_warps=8, num_stages=1)},
}


def _but(
    table: Mapping[tuple[Phase, int], Mapping[int, Config]], tiles: Mapping[Phase, Mapping[int, Config]]
) -> Mapping[tuple[Phase, int], Mapping[int, Config]]:
    """Return a table with other tiles for some ranks of 16-bit weights."""
    return {**table, **{(phase, 2): {**table[phase, 2], **of_phase} for phase, of_phase in tiles.items()}}


# Nothing timed yet speaks for different tiles on different architectures; only where ptxas spills they differ.
SHRINK: Mapping[int, ShrinkTable] = dict.fromkeys(ARCHITECTURES, _SHRINK) | {
    100: _but(_SHRINK, {Phase.PREFILL: {32: ShrinkConfig(PREFILL_TILE, 32, 64, 4, num_warps=4, num_stages=3)}}),
    120: _but(_SHRINK, {Phase.DECODE: {32: ShrinkConfig(DECODE_TILE, 32, 128, 16, num_warps=4, num_stages=3)}}),
}
EXPAND: Mapping[int, ExpandTable] = dict.fromkeys(ARCHITECTURES, _EXPAND) | {
    100: _but(
        _EXPAND, {Phase.PREFILL: {16: ExpandConfig(PREFILL_TILE, 32, 128, 64, num_warps=8, num_stages=1)}}
    ),
    120: _but(
        _EXPAND,
        {
            Phase.DECODE: {16: ExpandConfig(DECODE_TILE, 16, 64, 16, num_warps=4, num_stages=1)},
            Phase.PREFILL: {32: ExpandConfig(PREFILL_TILE, 32, 64, 64, num_warps=8, num_stages=1)},
        },
    ),
}


def shrink_config(architecture: int, phase: Phase, dtype: torch.dtype, *, max_rows: int) -> ShrinkConfig:
    """The tiles of shrink for a group whose slots have at most ``max_rows`` rows."""
    return _of_bucket(SHRINK[architecture][phase, dtype.itemsize], max_rows)


def expand_config(architecture: int, phase: Phase, dtype: torch.dtype, *, max_rank: int) -> ExpandConfig:
    """The tiles of expand for a group whose slices have at most rank ``max_rank``."""
    return _of_bucket(EXPAND[architecture][phase, dtype.itemsize], max_rank)


def _of_bucket(buckets: Mapping[int, Config], number: int) -> Config:
    return buckets[next((key for key in buckets if number <= key), max(buckets))]


def phase_of(tile: int) -> Phase:
    """The phase of segments of at most ``tile`` entries."""
    return Phase.DECODE if tile <= DECODE_TILE else Phase.PREFILL
