"""The tuning tables for linears of served models; test_aot compiles the shipped ones."""

from itertools import product

import pytest

from inference_service.kernels.launch import ARCHITECTURES, DTYPES
from inference_service.kernels.sgmv import DECODE_TILE, PREFILL_TILE, SegmentCapacity, Slices, tuning
from loramux_shared.bases.groups import GroupShape, layer_groups

MODELS = {
    "SmolLM2-135M": layer_groups(hidden=576, intermediate=1536, q=576, kv=192),
    "Qwen2.5-1.5B": layer_groups(hidden=1536, intermediate=8960, q=1536, kv=256),
    "Llama-3-70B": layer_groups(hidden=8192, intermediate=28672, q=8192, kv=1024),
}
LINEARS = [(name, shape) for name, groups in MODELS.items() for shape in groups]
RANKS = (1, 8, 12, 16, 32, 64, 128, 256)
SEGMENTS = (1, 3, 8, 64, 130, 300)


@pytest.mark.parametrize(("model", "shape"), LINEARS, ids=lambda value: getattr(value, "name", value))
def test_planes_partition_k_and_grids_cover_the_device(model: str, shape: GroupShape) -> None:
    """No plane is idle, and a launch has no more programs than could find work, or than cover the device."""
    slices = Slices(shape.out_offsets, shape.out_features)
    for architecture, tile, dtype, rank in product(ARCHITECTURES, (DECODE_TILE, PREFILL_TILE), DTYPES, RANKS):
        phase, rows = tuning.phase_of(tile), rank * len(shape.modules)
        first = tuning.shrink_config(architecture, phase, dtype, max_rows=rows)
        second = tuning.expand_config(architecture, phase, dtype, max_rank=rank)
        blocks = -(-shape.in_features // first.block_k)
        for segments in SEGMENTS:
            planes, per_plane = first.planes(shape.in_features, segments)
            assert (planes - 1) * per_plane < blocks <= planes * per_plane
            assert planes <= first.split_k
            grid = first.grid(shape.in_features, rows, SegmentCapacity(segments, 300, tile))
            assert 1 <= grid <= min(tuning.COVERING, segments * -(-rows // first.block_r) * first.split_k)
            programs, widest, step = second.grid(slices, segments), second.block_n, second.step_n
            assert 1 <= programs <= min(segments * slices.tiles(step), tuning.PLACES)
            width = tuning.width_of(slices, segments, programs, widest, step)
            in_turn = [-(-segments * slices.tiles(each) // programs) for each in (width, widest)]
            assert width in range(step, widest + 1, step)
            assert in_turn[0] <= in_turn[1]
