"""The tuning tables for linears of served models; what they ship is compiled in test_aot."""

import pytest
import torch

from inference_service.kernels.launch import ARCHITECTURES, DTYPES
from inference_service.kernels.sgmv import DECODE_TILE, Phase, SegmentCapacity, Slices
from inference_service.kernels.sgmv.tuning import (
    COVERING,
    EXPAND,
    FEW,
    FUSED,
    FUSED_PER_MULTIPROCESSOR,
    SHRINK,
    FusedConfig,
    expand_config,
    fused_config,
    shrink_config,
)
from loramux_shared.bases.groups import GroupShape
from tests.golden.kernels.grids import MODELS, TABLE, lines
from tests.golden.kernels.write import kept

LINEARS = [(name, shape) for name, groups in MODELS.items() for shape in groups]
RANKS = (1, 8, 12, 16, 32, 64, 128, 256)
SEGMENTS = (1, 3, 8, 64, 130, 300)
SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
"""Bytes of a multiprocessor; each program takes 1 KB more than it asks for."""
REGISTERS = 64 * 1024
MOST_REGISTERS = 256
"""Of a thread, as they are given out."""


@pytest.mark.parametrize(("model", "shape"), LINEARS, ids=lambda value: getattr(value, "name", value))
def test_every_linear_has_tiles_that_cover_the_device_and_none_is_idle(model: str, shape: GroupShape) -> None:
    """Planes partition K; a launch of fewer programs than cover the device has the smallest tiles there are."""
    slices = Slices(shape.out_offsets, shape.out_features)
    choices = [
        (architecture, phase, dtype, rank, segments)
        for architecture in ARCHITECTURES
        for phase in Phase
        for dtype in DTYPES
        for rank in RANKS
        for segments in SEGMENTS
    ]
    for architecture, phase, dtype, rank, segments in choices:
        rows, where = rank * len(shape.modules), (architecture, phase, dtype)
        first = shrink_config(*where, in_features=shape.in_features, max_rows=rows, segments=segments)
        planes, per_plane = first.planes(shape.in_features, first.tiles(rows, segments))
        blocks = -(-shape.in_features // first.block_k)
        assert (planes - 1) * per_plane < blocks <= planes * per_plane
        assert planes <= first.split_k
        few = min(FEW, segments)
        if phase is Phase.DECODE and first.programs(shape.in_features, rows, few) < COVERING:
            smallest = min(c.block_r for c in SHRINK[architecture][phase, dtype.itemsize].values())
            assert first.block_r == smallest
            assert per_plane <= -(-blocks // first.split_k) or segments > FEW
        second = expand_config(*where, slices=slices, max_rank=rank, segments=segments)
        if second.programs(slices, few) < COVERING:
            buckets = EXPAND[architecture][phase, dtype.itemsize].values()
            narrowest = min(c.block_n for widths in buckets for c in widths if c.block_r == second.block_r)
            assert second.block_n == narrowest


def test_a_grid_holds_every_step_and_the_planes_follow_its_segments() -> None:
    """Few adapters in a large capacity cover the device as well as they do in a small one."""
    where, rows = (90, Phase.DECODE, torch.bfloat16), 48
    config = shrink_config(*where, in_features=4096, max_rows=rows, segments=64)
    programs = [config.programs(4096, rows, used) for used in range(1, 65)]
    assert max(programs) == config.grid(4096, rows, 64)
    assert min(programs[FEW - 1 :]) >= COVERING
    for used in range(1, 65):
        planes, _ = config.planes(4096, config.tiles(rows, used))
        capacity = SegmentCapacity(1024, 64, DECODE_TILE)
        assert planes * min(1024, used * DECODE_TILE) * rows <= config.numel(4096, rows, capacity)


def test_the_programs_of_decode_are_what_the_table_says() -> None:
    """Changed tiles show in the diff of what known models launch for few and many adapters (make golden)."""
    assert list(lines()) == TABLE.read_text().splitlines()


FUSED_CONFIGS = [
    (architecture, itemsize, bucket, config)
    for architecture in ARCHITECTURES
    for itemsize, buckets in FUSED[architecture].items()
    for bucket, config in buckets.items()
]


@pytest.mark.parametrize(("architecture", "itemsize", "bucket", "config"), FUSED_CONFIGS)
def test_fused_programs_find_room_together(
    architecture: int, itemsize: int, bucket: int, config: FusedConfig
) -> None:
    """As many programs as the grid counts on fit a multiprocessor: else the launch would never end."""
    threads = 32 * config.shrink.num_warps
    dtype = {2: "bf16", 4: "fp32"}[itemsize]
    (line,) = (
        line
        for line in kept()
        if (line.name, line.dtype, line.architecture) == (f"sgmv.fused {bucket}", dtype, architecture)
    )
    assert FUSED_PER_MULTIPROCESSOR * threads * MOST_REGISTERS <= REGISTERS
    assert FUSED_PER_MULTIPROCESSOR * (line.shared + 1024) <= SHARED[architecture]


@pytest.mark.parametrize("config", [config for *_, config in FUSED_CONFIGS], ids=str)
def test_both_halves_of_a_fused_kernel_agree(config: FusedConfig) -> None:
    """One kernel has one number of warps and one tile of entries; a rank fits one tile."""
    shrink, expand = config.shrink, config.expand
    assert (shrink.block_t, shrink.block_r, shrink.num_warps, shrink.num_stages) == (
        expand.block_t,
        expand.block_r,
        expand.num_warps,
        expand.num_stages,
    )


def test_a_fused_kernel_takes_no_rank_above_its_tile() -> None:
    """It reads one tile of B before it waits, so the tile holds all ranks of a slot."""
    for dtype in DTYPES:
        for rank in range(1, 257):
            config = fused_config(90, Phase.DECODE, dtype, max_rank=rank)
            assert config is None or rank <= config.expand.block_r
        assert fused_config(90, Phase.PREFILL, dtype, max_rank=8) is None


def test_one_launch_is_for_steps_that_are_resident_at_once() -> None:
    """A layer of 8B: one adapter takes one launch, 64 adapters take two."""
    slices = Slices.consecutive(4096, 1024, 1024)
    config = fused_config(90, Phase.DECODE, torch.bfloat16, max_rank=16)
    assert config is not None
    fits = [config.fits(4096, 48, slices, segments, 2 * 132) for segments in (1, 8, 64)]
    assert fits == [True, True, False]
