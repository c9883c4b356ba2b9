"""Keep how many programs SGMV launches at decode for the linears of known models; reasoned, not timed.

python -m tests.golden.kernels.grids
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from shared.bases.groups import GroupShape, layer_groups

from inference_service.kernels.sgmv import Phase, Slices
from inference_service.kernels.sgmv.tuning import (
    FUSED_PER_MULTIPROCESSOR,
    expand_config,
    fused_config,
    shrink_config,
)

TABLE = Path(__file__).with_name("grids.txt")
MODELS = {
    "SmolLM2-135M": layer_groups(hidden=576, intermediate=1536, q=576, kv=192),
    "Qwen2.5-1.5B": layer_groups(hidden=1536, intermediate=8960, q=1536, kv=256),
    "Llama-3-8B": layer_groups(hidden=4096, intermediate=14336, q=4096, kv=1024),
    "Llama-3-70B": layer_groups(hidden=8192, intermediate=28672, q=8192, kv=1024),
}
ADAPTERS = (1, 8, 64)
"""Of a decode step, a token each."""
RANKS = (8, 16, 64)
H100 = 90, 132
"""Architecture and multiprocessors."""
HEADER = (
    f"{'model':<13} {'linear':<8} {'rank':>4} {'adapters':>8} "
    f"{'planes':>7} {'shrink':>7} {'expand':>7} {'fused':>7} {'resident':>9}"
)


def line(model: str, shape: GroupShape, rank: int, adapters: int) -> str:
    """Planes and programs of the two launches, and, where it is used, of the one; bf16 on an H100."""
    architecture, multiprocessors = H100
    slices = Slices(shape.out_offsets, shape.out_features)
    rows = rank * len(shape.modules)
    where = architecture, Phase.DECODE, torch.bfloat16
    first = shrink_config(*where, in_features=shape.in_features, max_rows=rows, segments=adapters)
    planes, _ = first.planes(shape.in_features, first.tiles(rows, adapters))
    shrinks = first.programs(shape.in_features, rows, adapters)
    second = expand_config(*where, slices=slices, max_rank=rank, segments=adapters)
    expands = second.programs(slices, adapters)
    fused, resident = "-", "-"
    one = fused_config(*where, max_rank=rank)
    if one is not None:
        room = FUSED_PER_MULTIPROCESSOR * multiprocessors
        if one.fits(shape.in_features, rows, slices, adapters, room):
            tiles = (
                one.shrink.programs(shape.in_features, rows, adapters),
                one.expand.programs(slices, adapters),
            )
            fused, resident = str(min(room, max(tiles))), str(room)
    return (
        f"{model:<13} {shape.name:<8} {rank:>4} {adapters:>8} "
        f"{planes:>7} {shrinks:>7} {expands:>7} {fused:>7} {resident:>9}"
    )


def lines() -> Iterator[str]:
    """Yield the table."""
    yield HEADER
    for model, groups in MODELS.items():
        for shape in groups:
            for rank in RANKS:
                for adapters in ADAPTERS:
                    yield line(model, shape, rank, adapters)


if __name__ == "__main__":
    TABLE.write_text("\n".join(lines()) + "\n")
