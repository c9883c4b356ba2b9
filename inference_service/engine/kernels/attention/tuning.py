"""The tiles of each kernel; others than those in these tables are not shipped.

Every entry is compiled ahead of time for every architecture in the tests: no spills, and shared memory within
the 99 KB that all of them have. That holds for heads that are multiples of 16; others are computed rightly,
but without vector loads. The numbers are reasoned, not yet timed.

A bucket is the smallest key that holds the head's dimensions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, TypeVar

import torch

from inference_service.engine.kernels.attention.balance import Balance
from inference_service.engine.kernels.launch import ARCHITECTURES, RowTile, architecture_of
from inference_service.engine.kernels.sgmv import DECODE_TILE
from loramux_shared.bases.rope import HeadCounts

MAX_HEAD_DIM: Final = 512
MAX_UPDATED_DIM: Final = 256
"""Dimensions of the largest heads to which updates are added where they are rotated; others would spill."""
DECODE_BALANCE: Final = Balance(programs=256, min_span=128)
"""About two programs per multiprocessor keep a GPU busy with reading."""
PREFILL_BALANCE: Final = Balance(programs=128, min_span=512)
"""About one, for it computes; a piece of a tile is up to 128 rows of fp32, written and read again."""


@dataclass(frozen=True)
class TileConfig:
    """Tiles of decode and prefill: rows and heads of a group x tokens of context."""

    block_m: int
    """Rows of a tile, in decode at least: a larger group takes more."""
    block_n: int
    num_warps: int
    num_stages: int


Config = TypeVar("Config", TileConfig, RowTile)
Table = Mapping[int, Mapping[int, Config]]
"""Configurations by the bytes of an element, then by the bucket of the head's dimensions."""
Tables = Mapping[int, Table[Config]]
"""Tables by architecture."""


def _narrower(config: TileConfig) -> TileConfig:
    return replace(config, block_n=max(16, config.block_n // 2))


# Keys and values hang on blocks, which are loaded before them: a buffer takes two stages. Two buffers (5) keep
# 64 KB per program on their way from memory, which fills the bandwidth of an H100 with one program per
# multiprocessor. fp32 uses no tensor cores: small tiles.
_DECODE: Table[TileConfig] = {
    2: {
        64: TileConfig(16, 128, num_warps=4, num_stages=5),
        128: TileConfig(16, 64, num_warps=4, num_stages=5),
        256: TileConfig(16, 32, num_warps=4, num_stages=5),
        512: TileConfig(16, 16, num_warps=8, num_stages=5),
    },
    4: {
        64: TileConfig(16, 32, num_warps=4, num_stages=2),
        128: TileConfig(16, 16, num_warps=4, num_stages=2),
        256: TileConfig(16, 16, num_warps=4, num_stages=2),
        512: TileConfig(16, 16, num_warps=4, num_stages=1),
    },
}
_PREFILL: Table[TileConfig] = {
    2: {
        64: TileConfig(128, 64, num_warps=8, num_stages=3),
        128: TileConfig(128, 64, num_warps=8, num_stages=3),
        256: TileConfig(64, 32, num_warps=8, num_stages=3),
        512: TileConfig(32, 16, num_warps=8, num_stages=3),
    },
    4: {
        # One stage, and few rows: near 64, 80 and 128 registers ptxas prefers a few bytes of stack to more.
        64: TileConfig(32, 32, num_warps=8, num_stages=1),
        128: TileConfig(16, 16, num_warps=8, num_stages=1),
        256: TileConfig(16, 16, num_warps=8, num_stages=1),
        512: TileConfig(16, 16, num_warps=4, num_stages=1),
    },
}
_ROPE = {
    64: RowTile(16, num_warps=4),
    128: RowTile(8, num_warps=4),
    256: RowTile(4, num_warps=4),
    512: RowTile(2, num_warps=4),
}
_ROPE_UPDATE = {
    2: {128: RowTile(DECODE_TILE, num_warps=4), 256: RowTile(DECODE_TILE, num_warps=8)},
    4: {256: RowTile(DECODE_TILE, num_warps=8)},
}
_MERGE = {128: RowTile(16, num_warps=4), 256: RowTile(8, num_warps=4), 512: RowTile(4, num_warps=4)}
# mma of sm_80 and sm_120 has the queries in registers, and would spill with more tokens at a time.
_PREFILL_80: Table[TileConfig] = {
    **_PREFILL,
    2: {**_PREFILL[2], 128: TileConfig(128, 32, num_warps=8, num_stages=5)},
}
# Nothing timed yet speaks for other differences between architectures.
DECODE: Tables[TileConfig] = dict.fromkeys(ARCHITECTURES, _DECODE)
PREFILL: Tables[TileConfig] = dict.fromkeys(ARCHITECTURES, _PREFILL) | {80: _PREFILL_80, 120: _PREFILL_80}
# Keys and values of 8 bits are widened in registers, which fewer of them leave free; the rows are the same.
_DECODE_8: Table[TileConfig] = {
    2: _DECODE[2],
    4: {dim: replace(config, num_stages=1) for dim, config in _DECODE[4].items()}
    | {512: TileConfig(16, 16, num_warps=8, num_stages=1)},
}
DECODE_8: Tables[TileConfig] = dict.fromkeys(ARCHITECTURES, _DECODE_8)
PREFILL_8: Tables[TileConfig] = {
    key: {size: {dim: _narrower(each) for dim, each in buckets.items()} for size, buckets in table.items()}
    for key, table in PREFILL.items()
}
ROPE: Tables[RowTile] = {key: {2: _ROPE, 4: _ROPE} for key in ARCHITECTURES}
ROPE_UPDATE: Tables[RowTile] = dict.fromkeys(ARCHITECTURES, _ROPE_UPDATE)
MERGE: Tables[RowTile] = {key: {2: _MERGE, 4: _MERGE} for key in ARCHITECTURES}


def tiles(*, decodes: bool, eight_bits: bool) -> Tables[TileConfig]:
    """Return the tables of decode or prefill, for keys and values of the model's type or of 8 bits."""
    if eight_bits:
        return DECODE_8 if decodes else PREFILL_8
    return DECODE if decodes else PREFILL


def config_of(tables: Tables[Config], device: torch.device, dtype: torch.dtype, head_dim: int) -> Config:
    """The tiles of one kernel.

    Raises:
        ValueError: the head has more than MAX_HEAD_DIM dimensions, or the device is too old.
    """
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"heads have at most {MAX_HEAD_DIM} dimensions, got {head_dim}")
    buckets = tables[architecture_of(device)][dtype.itemsize]
    return buckets[next(key for key in buckets if head_dim <= key)]


@dataclass(frozen=True)
class Cut:
    """The parameters that a step's tables depend on beside the step: layers with the same share them."""

    tile: int
    """Rows of a chunk that one program of prefill takes."""
    kv_heads: int
    """An item is a program for each."""


def cut_of(device: torch.device, dtype: torch.dtype, heads: HeadCounts) -> Cut:
    """Return how steps are cut for layers with such heads, or raise what `prefill_tile` does."""
    return Cut(prefill_tile(device, dtype, heads.dim, heads.group), heads.kv)


def prefill_tile(device: torch.device, dtype: torch.dtype, head_dim: int, group: int) -> int:
    """Rows of a chunk that one program of prefill takes, where group query heads share a head of keys; raise
    ValueError where the group or the head is too large.
    """
    block_m = config_of(PREFILL, device, dtype, head_dim).block_m
    if group > block_m:
        raise ValueError(f"at most {block_m} query heads share a head of keys, got {group}")
    return block_m // group
