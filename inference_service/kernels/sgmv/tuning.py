"""Which tiles each kernel uses; what is not in these tables is not shipped.

Every entry is compiled ahead of time for every architecture in the tests: no spills, and shared memory within
the 99 KB that all of them have. That holds for dims and row strides that are multiples of 16, as in every
served model; others are computed rightly, but without vector loads. The numbers are reasoned, not yet timed.

A bucket is the smallest key that holds the group's ceiling, or else the last: of ``max_rows`` for shrink and
of ``max_rank`` for expand. Above it, kernels take several tiles. Where a bucket's tiles are too few to cover
the device for a few segments, smaller ones are taken. Tiles follow from capacities. How many planes shrink has
follows from the segments that a step has: kernels compute it, since a recorded launch does not know them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch

from inference_service.kernels.launch import ARCHITECTURES
from inference_service.kernels.sgmv.layout import Phase, SegmentCapacity, Slices

DECODE_TILE = 16
PREFILL_TILE = 64
COVERING = 128
"""Programs that cover a device: an A100 has 108 multiprocessors, an H100 132, a B200 148."""
FEW = 4
"""Segments whose tiles should cover the device: where there are more, so are the programs."""
FUSED_PER_MULTIPROCESSOR = 2
"""Fused programs that are resident together on a multiprocessor, however they are specialised.

It has 65536 registers: enough for 2 programs of 128 threads, as a thread never has more than 255.
"""
FUSED_WAVES = 2
"""The fused kernel is used up to so many tiles of shrink, and of expand, per program that can be resident.

It saves a launch and the wait for the last program of shrink: a few microseconds whatever the size. It costs an
atomic and a barrier per tile, and the residency that its larger programs take from each other.
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

    def tiles(self, max_rows: int, segments: int) -> int:
        """Programs per plane."""
        return segments * -(-max_rows // self.block_r)

    def planes(self, in_features: int, tiles: int) -> tuple[int, int]:
        """(planes, blocks of K that each reduces): enough to cover the device if allowed, and no idle one."""
        blocks = -(-in_features // self.block_k)
        wanted = -(-COVERING // tiles)
        per_plane = max(1, blocks // wanted, -(-blocks // self.split_k))
        return -(-blocks // per_plane), per_plane  # as `planes_of` in triton_kernels

    def programs(self, in_features: int, max_rows: int, segments: int) -> int:
        """Programs of a launch."""
        tiles = self.tiles(max_rows, segments)
        return tiles * self.planes(in_features, tiles)[0]

    @cache  # noqa: B019 - the configurations are those of the tables, which stay
    def grid(self, in_features: int, max_rows: int, segments: int) -> int:
        """Programs of a launch for any step of at most so many segments."""
        return max(self.programs(in_features, max_rows, used) for used in range(1, segments + 1))

    @cache  # noqa: B019 - the configurations are those of the tables, which stay
    def numel(self, in_features: int, max_rows: int, capacity: SegmentCapacity) -> int:
        """fp32 elements that all planes of any step take together."""
        most = 0
        for used in range(1, capacity.segments + 1):
            planes, _ = self.planes(in_features, self.tiles(max_rows, used))
            most = max(most, planes * min(capacity.entries, used * capacity.tile))
        return most * max_rows


@dataclass(frozen=True)
class ExpandConfig:
    """Tiles of expand: entries x columns, reduced over the rank in steps of block_r."""

    block_t: int
    block_r: int
    block_n: int
    num_warps: int
    num_stages: int

    def tiles(self, slices: Slices) -> int:
        """Tiles of columns; none crosses a slice."""
        return sum(-(-size // self.block_n) for size in slices.sizes)

    def programs(self, slices: Slices, segments: int) -> int:
        """Programs of a launch."""
        return segments * self.tiles(slices)


@dataclass(frozen=True)
class FusedConfig:
    """Tiles of the fused kernel; both halves have the same block_t, block_r, warps and stages."""

    shrink: ShrinkConfig
    expand: ExpandConfig

    def fits(self, in_features: int, max_rows: int, slices: Slices, segments: int, resident: int) -> bool:
        """Whether both halves are small enough for ``resident`` programs."""
        most = max(
            self.shrink.programs(in_features, max_rows, segments), self.expand.programs(slices, segments)
        )
        return most <= FUSED_WAVES * resident


ShrinkTable = Mapping[tuple[Phase, int], Mapping[int, ShrinkConfig]]
"""Keyed by the phase and the bytes of an element, then by bucket."""
ExpandTable = Mapping[tuple[Phase, int], Mapping[int, tuple[ExpandConfig, ...]]]
"""The same; of each bucket the widest tiles first."""

# Decode: 16 planes are two blocks of K = 8192 each, and 16 KB of y for a tile of expand to sum.
# Prefill: 64 rows on 4 warps are one wgmma on sm_90; planes only for chunks too short to cover the device.
# fp32 uses no tensor cores: small tiles.
_SHRINK: ShrinkTable = {
    (Phase.DECODE, 2): {
        16: ShrinkConfig(DECODE_TILE, 16, 256, 16, num_warps=4, num_stages=3),
        32: ShrinkConfig(DECODE_TILE, 32, 128, 16, num_warps=4, num_stages=4),
        64: ShrinkConfig(DECODE_TILE, 64, 128, 16, num_warps=4, num_stages=3),
    },
    (Phase.PREFILL, 2): {
        16: ShrinkConfig(PREFILL_TILE, 16, 128, 4, num_warps=4, num_stages=4),
        32: ShrinkConfig(PREFILL_TILE, 32, 64, 4, num_warps=4, num_stages=4),
        64: ShrinkConfig(PREFILL_TILE, 64, 64, 4, num_warps=4, num_stages=4),
        128: ShrinkConfig(PREFILL_TILE, 128, 64, 4, num_warps=8, num_stages=4),
    },
    (Phase.DECODE, 4): {16: ShrinkConfig(DECODE_TILE, 16, 64, 16, num_warps=4, num_stages=3)},
    (Phase.PREFILL, 4): {16: ShrinkConfig(PREFILL_TILE, 16, 32, 4, num_warps=4, num_stages=2)},
}
_EXPAND: ExpandTable = {
    (Phase.DECODE, 2): {
        16: (
            ExpandConfig(DECODE_TILE, 16, 256, num_warps=4, num_stages=1),
            ExpandConfig(DECODE_TILE, 16, 64, num_warps=4, num_stages=1),
        ),
        32: (
            ExpandConfig(DECODE_TILE, 32, 128, num_warps=4, num_stages=1),
            ExpandConfig(DECODE_TILE, 32, 64, num_warps=4, num_stages=1),
        ),
        64: (ExpandConfig(DECODE_TILE, 64, 64, num_warps=8, num_stages=1),),
    },
    (Phase.PREFILL, 2): {
        16: (ExpandConfig(PREFILL_TILE, 16, 128, num_warps=8, num_stages=1),),
        32: (ExpandConfig(PREFILL_TILE, 32, 128, num_warps=8, num_stages=1),),
    },
    (Phase.DECODE, 4): {16: (ExpandConfig(DECODE_TILE, 16, 64, num_warps=4, num_stages=1),)},
    (Phase.PREFILL, 4): {16: (ExpandConfig(PREFILL_TILE, 16, 64, num_warps=4, num_stages=1),)},
}
# Keyed by the bytes of an element, then by the largest rank: above the last, two launches.
_FUSED: Mapping[int, Mapping[int, FusedConfig]] = {
    2: {
        16: FusedConfig(
            ShrinkConfig(DECODE_TILE, 16, 256, 16, num_warps=4, num_stages=3),
            ExpandConfig(DECODE_TILE, 16, 128, num_warps=4, num_stages=3),
        ),
        32: FusedConfig(
            ShrinkConfig(DECODE_TILE, 32, 128, 16, num_warps=4, num_stages=3),
            ExpandConfig(DECODE_TILE, 32, 64, num_warps=4, num_stages=3),
        ),
        64: FusedConfig(
            ShrinkConfig(DECODE_TILE, 64, 128, 16, num_warps=4, num_stages=3),
            ExpandConfig(DECODE_TILE, 64, 64, num_warps=4, num_stages=3),
        ),
    },
    4: {
        16: FusedConfig(
            ShrinkConfig(DECODE_TILE, 16, 64, 16, num_warps=4, num_stages=2),
            ExpandConfig(DECODE_TILE, 16, 64, num_warps=4, num_stages=2),
        )
    },
}
# Nothing timed yet speaks for different tiles on different architectures; only where ptxas spills they differ.
SHRINK: Mapping[int, ShrinkTable] = dict.fromkeys(ARCHITECTURES, _SHRINK) | {
    100: {
        **_SHRINK,
        (Phase.PREFILL, 2): {
            **_SHRINK[Phase.PREFILL, 2],
            64: ShrinkConfig(PREFILL_TILE, 64, 64, 4, num_warps=4, num_stages=3),
        },
    }
}
EXPAND: Mapping[int, ExpandTable] = dict.fromkeys(ARCHITECTURES, _EXPAND) | {
    100: {
        **_EXPAND,
        (Phase.PREFILL, 2): {
            **_EXPAND[Phase.PREFILL, 2],
            16: (ExpandConfig(PREFILL_TILE, 16, 64, num_warps=4, num_stages=1),),
        },
        (Phase.DECODE, 4): {16: (ExpandConfig(DECODE_TILE, 16, 32, num_warps=4, num_stages=1),)},
    }
}
FUSED = dict.fromkeys(ARCHITECTURES, _FUSED)


def shrink_config(
    architecture: int, phase: Phase, dtype: torch.dtype, *, in_features: int, max_rows: int, segments: int
) -> ShrinkConfig:
    """The tiles of shrink for a group whose slots have at most ``max_rows`` rows.

    At decode, narrower tiles are taken until they cover the device: x is small enough to be read again. At
    prefill it is not.
    """
    buckets = SHRINK[architecture][phase, dtype.itemsize]
    first = next((key for key in buckets if max_rows <= key), max(buckets))
    if phase is Phase.PREFILL:
        return buckets[first]
    fitting = [buckets[key] for key in sorted(buckets, reverse=True) if key <= first]
    covering = (c for c in fitting if c.programs(in_features, max_rows, min(FEW, segments)) >= COVERING)
    return next(covering, fitting[-1])


def expand_config(
    architecture: int, phase: Phase, dtype: torch.dtype, *, slices: Slices, max_rank: int, segments: int
) -> ExpandConfig:
    """The tiles of expand for a group whose slices have at most rank ``max_rank``."""
    buckets = EXPAND[architecture][phase, dtype.itemsize]
    widths = buckets[next((key for key in buckets if max_rank <= key), max(buckets))]
    return next((c for c in widths if c.programs(slices, min(FEW, segments)) >= COVERING), widths[-1])


def fused_config(architecture: int, phase: Phase, dtype: torch.dtype, *, max_rank: int) -> FusedConfig | None:
    """The tiles of the fused kernel, or None where it is never used."""
    if phase is Phase.PREFILL:
        return None
    buckets = FUSED[architecture][dtype.itemsize]
    return next((config for key, config in buckets.items() if max_rank <= key), None)


ONE_LAUNCH: Mapping[tuple[int, int], int] = {}
"""Where one launch was timed and won: the largest rank, by architecture and bytes of an element.

Nothing was timed yet, so it is used nowhere. Whoever writes a line here has run ``python -m benchmarks.gpu`` on
that card, without limits of MPS: under them fewer programs are resident than the device's properties say.
"""


def one_launch_wins(architecture: int, dtype: torch.dtype, *, max_rank: int) -> bool:
    """Whether one launch is the default for a rank."""
    return max_rank <= ONE_LAUNCH.get((architecture, dtype.itemsize), 0)


def phase_of(tile: int) -> Phase:
    """The phase of segments of at most ``tile`` entries."""
    return Phase.DECODE if tile <= DECODE_TILE else Phase.PREFILL
