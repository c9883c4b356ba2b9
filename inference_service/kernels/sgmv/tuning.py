"""Which tiles each kernel uses; what is not in these tables is not shipped.

Every entry is compiled ahead of time for every architecture in the tests: no spills, and shared memory within
the 99 KB that all of them have. That holds for dims and row strides that are multiples of 16, as in every
served model; others are computed rightly, but without vector loads. The numbers are reasoned, not yet timed.

A bucket is the smallest key that holds the group's ceiling, or else the last: of ``max_rows`` for shrink and
of ``max_rank`` for expand. Above it, kernels take several tiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from inference_service.kernels.launch import ARCHITECTURES
from inference_service.kernels.sgmv.layout import Phase

DECODE_TILE = 16
PREFILL_TILE = 64


@dataclass(frozen=True)
class ShrinkConfig:
    """Tiles of shrink: entries x rows, reduced over K in steps of block_k by split_k programs."""

    block_t: int
    block_r: int
    block_k: int
    split_k: int
    num_warps: int
    num_stages: int

    def planes(self, in_features: int) -> tuple[int, int]:
        """(planes, blocks of K that each reduces): at most split_k planes, and no idle one."""
        blocks = -(-in_features // self.block_k)
        per_plane = -(-blocks // self.split_k)
        return -(-blocks // per_plane), per_plane


@dataclass(frozen=True)
class ExpandConfig:
    """Tiles of expand: entries x columns, reduced over the rank in steps of block_r."""

    block_t: int
    block_r: int
    block_n: int
    num_warps: int
    num_stages: int


Config = TypeVar("Config", ShrinkConfig, ExpandConfig)
Buckets = Mapping[int, Config]
Table = Mapping[tuple[Phase, int], Buckets[Config]]
"""Keyed by the phase and the bytes of an element."""

# Decode: with 8 planes, 8 adapters are half a program per multiprocessor and tile of rows, and expand has 8
# planes to sum. Prefill: 64 rows on 4 warps are one wgmma on sm_90. fp32 uses no tensor cores: small tiles.
_SHRINK: Table[ShrinkConfig] = {
    (Phase.DECODE, 2): {
        16: ShrinkConfig(DECODE_TILE, 16, 256, 8, num_warps=4, num_stages=3),
        32: ShrinkConfig(DECODE_TILE, 32, 128, 8, num_warps=4, num_stages=4),
        64: ShrinkConfig(DECODE_TILE, 64, 128, 8, num_warps=4, num_stages=3),
    },
    (Phase.PREFILL, 2): {
        16: ShrinkConfig(PREFILL_TILE, 16, 128, 1, num_warps=4, num_stages=4),
        32: ShrinkConfig(PREFILL_TILE, 32, 64, 1, num_warps=4, num_stages=4),
        64: ShrinkConfig(PREFILL_TILE, 64, 64, 1, num_warps=4, num_stages=4),
        128: ShrinkConfig(PREFILL_TILE, 128, 64, 1, num_warps=8, num_stages=4),
    },
    (Phase.DECODE, 4): {16: ShrinkConfig(DECODE_TILE, 16, 64, 8, num_warps=4, num_stages=3)},
    (Phase.PREFILL, 4): {16: ShrinkConfig(PREFILL_TILE, 16, 32, 1, num_warps=4, num_stages=3)},
}
_EXPAND: Table[ExpandConfig] = {
    (Phase.DECODE, 2): {
        16: ExpandConfig(DECODE_TILE, 16, 256, num_warps=4, num_stages=1),
        32: ExpandConfig(DECODE_TILE, 32, 128, num_warps=4, num_stages=1),
        64: ExpandConfig(DECODE_TILE, 64, 128, num_warps=8, num_stages=1),
    },
    (Phase.PREFILL, 2): {
        16: ExpandConfig(PREFILL_TILE, 16, 128, num_warps=8, num_stages=1),
        32: ExpandConfig(PREFILL_TILE, 32, 128, num_warps=8, num_stages=1),
    },
    (Phase.DECODE, 4): {16: ExpandConfig(DECODE_TILE, 16, 64, num_warps=4, num_stages=1)},
    (Phase.PREFILL, 4): {16: ExpandConfig(PREFILL_TILE, 16, 64, num_warps=4, num_stages=1)},
}
# Nothing timed yet speaks for different tiles on different architectures.
SHRINK = dict.fromkeys(ARCHITECTURES, _SHRINK)
EXPAND = dict.fromkeys(ARCHITECTURES, _EXPAND)


def shrink_config(architecture: int, phase: Phase, dtype: torch.dtype, max_rows: int) -> ShrinkConfig:
    """The tiles of shrink for a group whose slots have at most ``max_rows`` rows."""
    return _bucket(SHRINK[architecture][phase, dtype.itemsize], max_rows)


def expand_config(architecture: int, phase: Phase, dtype: torch.dtype, max_rank: int) -> ExpandConfig:
    """The tiles of expand for a group whose slices have at most rank ``max_rank``."""
    return _bucket(EXPAND[architecture][phase, dtype.itemsize], max_rank)


def phase_of(tile: int) -> Phase:
    """The phase of segments of at most ``tile`` entries."""
    return Phase.DECODE if tile <= DECODE_TILE else Phase.PREFILL


def _bucket(buckets: Buckets[Config], ceiling: int) -> Config:
    return buckets[next((key for key in buckets if ceiling <= key), max(buckets))]
