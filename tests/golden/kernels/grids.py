"""Keep how many programs SGMV launches at decode for the linears of known models; reasoned, not timed.

python -m tests.golden.kernels.grids
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from inference_service.kernels.sgmv import DECODE_TILE, Phase, SegmentCapacity, Slices
from inference_service.kernels.sgmv.tuning import expand_config, shrink_config
from loramux_shared.bases.groups import GroupShape, layer_groups

TABLE = Path(__file__).with_name("grids.txt")
MODELS = {
    "SmolLM2-135M": layer_groups(hidden=576, intermediate=1536, q=576, kv=192),
    "Qwen2.5-1.5B": layer_groups(hidden=1536, intermediate=8960, q=1536, kv=256),
    "Llama-3-8B": layer_groups(hidden=4096, intermediate=14336, q=4096, kv=1024),
    "Llama-3-70B": layer_groups(hidden=8192, intermediate=28672, q=8192, kv=1024),
}
STEPS = ((1, 1, 1), (8, 8, 8), (64, 64, 64), (64, 64, 8), (64, 1000, 8), (64, 1000, 1))
"""Rows that the decode step may have, slots that there are, adapters that it has, with a row each."""
RANKS = ((8, 8), (16, 16), (64, 64), (8, 64), (16, 64))
"""Ranks of the adapters, and the ceiling that the bank was opened for."""
ACTIVE = 16
"""Adapters that a step may have, as is usual."""
ARCHITECTURE = 90
HEADER = (
    f"{'model':<13} {'linear':<8} {'rank':>4} {'of':>3} {'rows':>4} {'slots':>6} {'active':>6} "
    f"{'planes':>6} {'shrink':>6} {'launched':>8} {'expand':>6} {'launched':>8}"
)


def line(model: str, shape: GroupShape, rank: int, ceiling: int, step: tuple[int, int, int]) -> str:
    """Planes, and tiles of the step beside the programs that share them, of both launches; bf16."""
    rows, num_slots, active = step
    slices = Slices(shape.out_offsets, shape.out_features)
    own, most = rank * len(shape.modules), ceiling * len(shape.modules)
    segments = SegmentCapacity(rows, num_slots, DECODE_TILE, active=max(ACTIVE, active)).segments
    where = ARCHITECTURE, Phase.DECODE, torch.bfloat16
    first, second = shrink_config(*where, max_rows=most), expand_config(*where, max_rank=ceiling)
    tiles = active * -(-own // first.block_r)
    planes, _ = first.planes(shape.in_features, tiles)
    programs = second.grid(slices, segments)
    wide, narrow = (active * sum(-(-s // n) for s in slices.sizes) for n in (second.block_n, second.few_n))
    return (
        f"{model:<13} {shape.name:<8} {rank:>4} {ceiling:>3} {rows:>4} {num_slots:>6} {active:>6} "
        f"{planes:>6} {tiles * planes:>6} {first.grid(shape.in_features, most, segments):>8} "
        f"{wide if wide >= programs else narrow:>6} {programs:>8}"
    )


def lines() -> Iterator[str]:
    """Yield the table."""
    yield HEADER
    for model, groups in MODELS.items():
        for shape in groups:
            for rank, ceiling in RANKS:
                for step in STEPS:
                    yield line(model, shape, rank, ceiling, step)


if __name__ == "__main__":
    TABLE.write_text("\n".join(lines()) + "\n")
