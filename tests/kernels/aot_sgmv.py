"""The kernels in the tuning tables of SGMV."""

from collections.abc import Iterator, Mapping
from typing import Any

from inference_service.engine.kernels.launch import ARCHITECTURES
from inference_service.engine.kernels.sgmv import triton_kernels, tuning
from inference_service.engine.kernels.sgmv.layout import MAX_SLICES, Phase
from tests.kernels.aot import Variant, typed, with_halves

TYPES = typed(
    {
        "*fp32": "p_y p_scales p_vectors",
        "*i32": "p_token_ids p_seg_start p_seg_slot p_pass p_end p_planes",
        "*i64": "p_table",
    }
)
# As the launcher specialises: what is not a multiple of 16 in general.
UNALIGNED = {*triton_kernels.PLANE_SCALARS, *triton_kernels.SEGMENT_POINTERS}
# What a gated delta rule reads: the widest table, and slices that differ.
GROUP = {
    "OFFSETS": (0, 8192, 12288, 12320),
    "SIZES": (8192, 4096, 32, 32),
    "ALIGNMENT": 16,
    "N_SLICES": MAX_SLICES,
}
DTYPES = {2: "bf16", 4: "fp32"}
Tiles = tuning.ShrinkConfig | tuning.ExpandConfig


def variants(architecture: int) -> Iterator[Variant]:
    """Yield every entry of the tables; expand with the most planes that it may have to sum."""
    yield from with_halves(architecture, entries(architecture))


def entries(architecture: int) -> Iterator[Variant]:
    shrinks = tuning.SHRINK[architecture]
    for (phase, itemsize), buckets in shrinks.items():
        for bucket, c in buckets.items():
            tiles = {"N_SLICES": MAX_SLICES}
            tiles |= {"BLOCK_T": c.block_t, "BLOCK_R": c.block_r, "BLOCK_K": c.block_k}
            name = f"sgmv.shrink {phase.value} {bucket}"
            yield _variant(name, triton_kernels.shrink_kernel, itemsize, c, tiles)
    for (phase, itemsize), expands in tuning.EXPAND[architecture].items():
        planes = most_planes(itemsize, phase)
        for bucket, e in expands.items():
            tiles = {"BLOCK_T": e.block_t, "BLOCK_R": e.block_r, "STEP_N": e.step_n, "BLOCK_N": e.block_n}
            name = f"sgmv.expand {phase.value} {bucket}"
            yield _variant(name, triton_kernels.expand_kernel, itemsize, e, GROUP | tiles | {"PLANES": planes})


def most_planes(itemsize: int, phase: Phase = Phase.DECODE) -> int:
    """Return how many planes expand has to sum at most."""
    return max(c.split_k for c in tuning.SHRINK[ARCHITECTURES[0]][phase, itemsize].values())


def _variant(name: str, kernel: Any, itemsize: int, config: Tiles, constants: Mapping[str, Any]) -> Variant:
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return Variant(name, kernel, DTYPES[itemsize], {"UPCAST": False, **constants}, options, TYPES, UNALIGNED)
